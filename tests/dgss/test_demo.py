"""The main job, small, and the command line around it."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image

import rein
from dgss.folders import make_folder
from rein.cli import main
from rein.dgss import demo, panel, report, weights
from rein.dgss.domains import Domains, generated_domains
from rein.dgss.labels import CITYSCAPES
from rein.dgss.training import Schedule
from rein.dgss.weights import make_backbone
from rein.errors import InputError

SMALL = ["--backbone", "test_vit", "--patch-size", "8", "--steps", "6", "--batch-size", "2"]
CONFIG, _ = demo.suited("test_vit")


def test_the_generated_demo_compares_all_methods_and_leaves_its_files(tmp_path):
    out = tmp_path / "out"
    domains = generated_domains((32, 64), count=8)
    schedule = Schedule(steps=4, batch_size=2, lr=1e-3, validations=2)
    options = demo.Options(out, "test_vit", schedule, CONFIG, patch_size=8, full=True)
    said = []
    results = demo.run(domains, options, said.append)
    assert [result.method for result in results] == ["frozen", "rein", "full"]
    frozen, with_rein, full = results
    assert frozen.tuned_parameters == 0
    assert full.tuned_parameters == full.backbone_parameters == frozen.backbone_parameters == with_rein.backbone_parameters
    assert frozen.head_parameters == with_rein.head_parameters == full.head_parameters
    content = json.loads((out / "results.json").read_text())
    assert content["targets"] == ["fog", "night", "rain", "snow"]
    assert (content["adapter"], content["patch_size"]) == (CONFIG.to_dict(), 8)
    for stored, result in zip(content["results"], results, strict=True):
        assert stored["miou"] == result.miou
        assert set(result.miou) == {"day", "fog", "night", "rain", "snow"}
        assert all(0 <= value <= 1 for value in result.miou.values())
        assert stored["mean_miou_of_unseen"] == pytest.approx(np.mean([result.miou[d] for d in content["targets"]]))
        seen = [value for value in stored["iou"]["fog"].values() if value is not None]
        assert result.miou["fog"] == pytest.approx(np.mean(seen))
    with Image.open(out / "panel.png") as picture:
        assert picture.width > 5 * 300
    text = report.table(results, [domains.source])
    assert text.splitlines()[0].split()[:7] == ["method", "head", "tuned", "in", "backbone", "%", "day*"]
    assert f"{with_rein.tuned_parameters:,}" in text
    assert len(said) == 1
    assert "RANDOM weights" in said[0]
    assert content["weights"] == "random"

    vit = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True, patch_size=8)
    torch.manual_seed(options.schedule.seed)
    rein.load(vit, out / "adapter.safetensors")
    assert rein.summary(vit).adapter_parameters == with_rein.tuned_parameters
    for method in ("frozen", "rein"):
        rein.Segmenter.load(out / "states" / f"{method}.safetensors", make_backbone("test_vit", False, 8)[0])


def test_the_demo_starts_from_the_pretrained_pocket_backbone_unless_told_otherwise(tmp_path, monkeypatch):
    asked = []

    def run(domains, options):
        asked.append((options.backbone, options.pretrained))
        raise InputError("that is all")

    monkeypatch.setattr(demo, "run", run)
    for more in ([], ["--backbone", "test_vit"], ["--backbone", "test_vit", "--pretrained"]):
        assert main(["demo", "--scenes", "1", *more]) == 2
    assert asked == [("pocket_vit", True), ("test_vit", False), ("test_vit", True)]


def test_another_backbone_gets_the_papers_rates_and_not_those_of_the_pocket_one():
    config, rates = demo.suited("vit_small_patch14_dinov2")
    schedule = Schedule(steps=1, **rates)
    assert schedule.lr * schedule.adapter_factor == pytest.approx(1e-4)
    assert schedule.lr * schedule.backbone_factor == pytest.approx(1e-5)
    assert config == rein.ReinConfig(query_dim=None, zero_init=True)


def test_the_head_rate_can_be_given(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run", lambda domains, options: asked.append(options) or sys.exit(3))
    for more in ([], ["--lr", "0.5"]):
        with pytest.raises(SystemExit):
            main(["demo", "--scenes", "1", *more])
    assert [options.schedule.lr for options in asked] == [0.03, 0.5]


def test_every_method_starts_from_the_same_backbone_and_head(tmp_path, monkeypatch):
    starts = []

    def remember(segmenter, *args, best, **settings):
        state = {k: v.clone() for k, v in segmenter.state_dict().items() if ".rein." not in k}
        starts.append((state, segmenter.predict(torch.ones(1, 3, 32, 32))))
        best.save(segmenter, best.path)
        best.miou = 0.5

    monkeypatch.setattr(demo, "fit", remember)
    domains = generated_domains((32, 32), count=2)
    demo.run(domains, demo.Options(tmp_path, "test_vit", Schedule(steps=4), CONFIG, full=True))
    (first, logits), *others = starts
    assert len(others) == 2
    for state, other_logits in others:
        assert state.keys() == first.keys()
        assert all(torch.equal(first[k], v) for k, v in state.items())
        assert torch.equal(logits, other_logits)  # the adapter starts as the identity


def test_targets_are_never_touched_before_the_state_is_chosen(tmp_path, monkeypatch):
    domains = generated_domains((32, 32), count=2)
    fitted = []

    class Guarded:
        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            assert fitted, "a target was read before training ended"
            return self.data[index]

    real_fit = demo.fit

    def fit(*args, **settings):
        fitted.clear()
        real_fit(*args, **settings)
        fitted.append(True)

    monkeypatch.setattr(demo, "fit", fit)
    guarded = Domains(
        domains.source, domains.space, domains.train, domains.validation, {k: Guarded(v) for k, v in domains.tests.items()}
    )
    demo.run(guarded, demo.Options(tmp_path, "test_vit", Schedule(steps=2, batch_size=1), CONFIG))
    assert fitted


def test_the_command_runs_on_a_folder_and_prints_the_table(tmp_path, capsys):
    root, out = make_folder(tmp_path / "data", ("day", "dusk", "night"), count=5), tmp_path / "out"
    code = main(["demo", "--data", str(root), "--source", "day", "--crop", "32", "--limit", "3", "--out", str(out), *SMALL])
    printed = capsys.readouterr().out
    assert code == 0
    header = next(line for line in printed.splitlines() if line.startswith("method"))
    assert header.split() == ["method", "head", *["tuned", "in", "backbone"], "%", "dusk", "night", *["mean", "of", "unseen"]]
    assert "fitted on 'day' only" in printed
    assert (out / "adapter.safetensors").stat().st_size < 2e6
    content = json.loads((out / "results.json").read_text())
    assert content["source"] == "day"
    assert sorted(content["results"][0]["iou"]["dusk"]) == ["ground", "sky", "thing"]
    assert main(["info", str(out / "adapter.safetensors")]) == 0
    printed = capsys.readouterr().out
    for part in ("adapter, format 1", "test_vit", "6, blocks.0 to blocks.5; width 64; prefix tokens 1", "rank=16", "rein.load"):
        assert part in printed
    assert main(["info", str(out / "states" / "rein.safetensors")]) == 0
    assert "LinearHead" in capsys.readouterr().out


def test_pretrained_weights_that_cannot_be_had_are_replaced_with_one_clear_line(monkeypatch):
    real = timm.create_model

    def offline(name, pretrained=False, **settings):
        if pretrained:
            assert constants.HF_HUB_OFFLINE  # so that its client does not try for a minute
            raise ConnectionError("no route to the hub\nand a long trace")
        return real(name, pretrained=False, **settings)

    def unreachable(*args, **settings):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(weights, "getproxies", dict)
    monkeypatch.setattr(timm, "create_model", offline)
    said = []
    model, loaded = make_backbone("test_vit", True, None, said.append)
    assert not loaded
    assert model.num_features == 64
    assert len(said) == 1
    assert not constants.HF_HUB_OFFLINE
    assert "test_vit cannot be downloaded (ConnectionError: no route to the hub); using RANDOM weights instead" in said[0]


def test_pretrained_weights_are_used_where_they_can_be_had(monkeypatch):
    asked = []
    real = timm.create_model

    def online(name, pretrained=False, **settings):
        asked.append((name, pretrained, settings.get("num_classes")))
        return real(name, pretrained=False, **settings)

    monkeypatch.setattr(socket, "create_connection", lambda *args, **settings: socket.socket())
    monkeypatch.setattr(timm, "create_model", online)
    said = []
    assert make_backbone("test_vit", True, None, said.append)[1]
    assert asked == [("test_vit", True, 0)]
    assert not said


BAD = {
    "a missing folder": (lambda root: ["demo", "--data", f"{root}/nowhere", "--source", "day"], "nowhere is not a folder"),
    "no source": (lambda root: ["demo", "--data", f"{root}"], "--source is missing: which of day, dusk shall it fit on"),
    "an unknown source": (
        lambda root: ["demo", "--data", f"{root}", "--source", "noon"],
        "has no domain 'noon'; it has day, dusk",
    ),
    "source without data": (lambda root: ["demo", "--source", "day"], "--source belongs to --data FOLDER"),
    "an unknown backbone": (
        lambda root: ["demo", "--backbone", "vit_gigantic", "--scenes", "1"],
        "timm has no model 'vit_gigantic'; near it are vit_giga",
    ),
    "a backbone rein does not know": (
        lambda root: ["demo", "--backbone", "vgg11", "--data", f"{root}", "--source", "day"],
        "where the blocks of VGG are is not known",
    ),
    "an unknown tag": (lambda root: ["demo", "--backbone", "test_vit.foo", "--scenes", "1"], "Invalid pretrained tag (foo)"),
    "scenes and data": (lambda root: ["demo", "--scenes", "3", "--data", f"{root}", "--source", "day"], "--scenes belongs to"),
    "an empty class name": (
        lambda root: ["demo", "--data", f"{root}", "--source", "day", "--classes", ","],
        "class names must differ and must not be empty",
    ),
    "a folder where a result belongs": (
        lambda root: ["demo", "--data", f"{root}", "--source", "day", "--out", f"{root}", *SMALL],
        "results.json is a folder; choose another --out",
    ),
    "a learning rate that explodes": (
        lambda root: [
            "demo",
            "--data",
            f"{root}",
            "--source",
            "day",
            "--crop",
            "32",
            "--lr",
            "100",
            "--out",
            f"{root}/out",
            *SMALL,
        ],
        "train with a smaller learning rate",
    ),
    "a file that is a folder": (lambda root: ["info", f"{root}"], "it is a folder"),
    "a file that is no adapter": (lambda root: ["info", f"{root}/index.json"], "index.json is not a complete safetensors file"),
    "a file that is missing": (lambda root: ["info", f"{root}/a.safetensors"], "cannot read"),
    "an output that is a file": (
        lambda root: ["demo", "--out", f"{root}/index.json", "--data", f"{root}", "--source", "day"],
        "cannot make the folder",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_exit_code_two(tmp_path, capsys, case):
    arguments, message = BAD[case]
    root = make_folder(tmp_path / "data")
    if case == "a folder where a result belongs":
        (root / "results.json").mkdir()
    code = main(arguments(root))
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("rein: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "option",
    [
        ["--steps", "0"],
        ["--lr", "fast"],
        ["--lr", "1e9"],
        ["--seed", "-1"],
        ["--seed", "9" * 12],
        ["--limit", "2.5"],
        ["--frobnicate"],
    ],
)
def test_bad_options_exit_with_two(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *option])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_too_few_domains_or_images_are_refused(tmp_path, capsys):
    alone = make_folder(tmp_path / "alone", ("day",))
    assert main(["demo", "--data", str(alone), "--source", "day"]) == 2
    assert "at least one other domain" in capsys.readouterr().err
    single = make_folder(tmp_path / "single", count=1)
    assert main(["demo", "--data", str(single), "--source", "day"]) == 2
    assert "at least 2 are needed" in capsys.readouterr().err


def test_ctrl_c_leaves_the_best_state_and_says_where(tmp_path):
    root, out = make_folder(tmp_path / "data"), tmp_path / "out"
    options = ["--source", "day", "--out", str(out), "--backbone", "test_vit", "--crop", "32", "--steps", "400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rein.cli", "demo", "--data", str(root), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("fit frozen: step 80 of 400"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "rein: interrupted: the best state of frozen (step 80, source mIoU" in errors
    assert str(out / "states" / "frozen.safetensors") in errors
    assert "Traceback" not in errors
    rein.Segmenter.load(out / "states" / "frozen.safetensors", make_backbone("test_vit", False, None)[0])


def test_the_message_after_ctrl_c_names_the_file(tmp_path, monkeypatch):
    domains = generated_domains((32, 32), count=2)

    def fit(segmenter, *args, best, name, **settings):
        best.save(segmenter, best.path)
        best.miou, best.step = 0.25, 40
        if name == "rein":
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "fit", fit)
    saved = r"the best state of rein \(step 40, source mIoU 25.0\) is in .*rein.safetensors"
    with pytest.raises(demo.Interrupted, match=saved) as caught:
        demo.run(domains, demo.Options(tmp_path, "test_vit", Schedule(steps=4), CONFIG))
    assert "frozen is finished" in str(caught.value)
    rein.Segmenter.load(tmp_path / "states" / "rein.safetensors", make_backbone("test_vit", False, None)[0])


def test_a_target_without_labels_is_a_dash_and_null(tmp_path):
    root = make_folder(tmp_path / "data", ("day", "dusk", "void"))
    for path in (root / "void" / "labels").iterdir():
        Image.fromarray(np.full((32, 48), 255, np.uint8)).save(path)
    arguments = ["--source", "day", "--crop", "32", "--out", str(tmp_path / "out"), *SMALL]
    assert main(["demo", "--data", str(root), *arguments]) == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    assert stored["miou"]["void"] is None
    assert stored["mean_miou_of_unseen"] == stored["miou"]["dusk"]


def test_the_panel_shows_errors_only_where_the_truth_is_known():
    label = np.full((16, 32), 255, np.uint8)
    label[:, :16] = 0
    row = panel.Row("day", np.zeros((16, 32, 3), np.uint8), label, {"m": np.ones((16, 32), int)}, {"m": 0.5})
    picture = np.array(panel.draw([row], CITYSCAPES, "title", cell_width=200))
    truth, wrong = ((picture == CITYSCAPES.palette[k]).all(-1).sum() for k in (0, 1))
    assert wrong == 100 * 100  # the labelled half of the prediction's cell, and nothing of its other half
    assert truth == 100 * 100 + 15 * 15  # the labelled half of the truth's cell, and the legend's square
