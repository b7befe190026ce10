"""`rein demo`: recipes on generated streets or on a user's folder, fitted, tested and compared like any other run."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import rein
from dgss.folders import make_folder
from rein.backbones.creation import make_backbone
from rein.cli import main
from rein.dgss import commands, demo
from rein.dgss.data.datamodule import DomainData
from rein.dgss.data.datasets.files import Files
from rein.errors import CheckpointError, InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning and TensorBoard warn of at such sizes

SMALL = ["--backbone", "test_vit", "--patch-size", "8", "--steps", "6", "--batch-size", "2"]


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """The folder of a small demo on generated streets with all methods, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    said = []
    options = demo.Options(out=out, backbone="test_vit", pretrained=False, patch_size=8, steps=4, batch_size=2, lr=1e-3, scenes=8)
    table = demo.run(options, said.append)
    return out, table, said


def test_the_demo_compares_all_methods_and_leaves_its_files(streets):
    out, table, said = streets
    content = json.loads((out / "results.json").read_text())
    frozen, full, with_rein = content["results"]
    assert [result["method"] for result in content["results"]] == ["frozen", "full", "rein"]
    assert frozen["tuned_parameters"] == 0
    norm = sum(parameter.numel() for parameter in timm.create_model("test_vit").norm.parameters())  # reaches no feature map
    assert full["tuned_parameters"] == full["backbone_parameters"] - norm
    assert len({result["backbone_parameters"] for result in content["results"]}) == 1
    assert len({result["head_parameters"] for result in content["results"]}) == 1
    assert (content["sources"], content["targets"]) == (["day"], ["fog", "night", "rain", "snow"])
    for result in content["results"]:
        assert set(result["miou"]) == {"day", "fog", "night", "rain", "snow"}
        assert all(0 <= value <= 1 for value in result["miou"].values())
        assert result["mean_miou_of_unseen"] == pytest.approx(np.mean([result["miou"][d] for d in content["targets"]]))
        assert 0 < result["step"] <= 4
    assert table == (out / "table.txt").read_text().rstrip("\n")
    assert table.splitlines()[0].split()[:7] == ["method", "head", "tuned", "in", "backbone", "%", "day*"]
    assert f"{with_rein['tuned_parameters']:,}" in table
    assert any("RANDOM weights" in text for text in said)
    with Image.open(out / "panel.png") as picture:
        assert picture.width > 5 * 300


def test_the_demo_leaves_ordinary_run_folders(streets, tmp_path, capsys):
    out, _, _ = streets
    config = str(out / "rein" / "config.yaml")
    before = json.loads((out / "rein" / "test" / "results.json").read_text())["results"]
    assert main(["test", "--config", config]) == 0
    assert json.loads((out / "rein" / "test" / "results.json").read_text())["results"] == before
    capsys.readouterr()
    assert main(["compare", str(out / "frozen"), str(out / "full"), "--out", str(tmp_path / "compared")]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("freeze")
    Image.new("RGB", (64, 48), (90, 90, 90)).save(tmp_path / "photo.png")
    where = ["--data.predict", str(tmp_path / "photo.png"), "--out", str(tmp_path / "predicted")]
    assert main(["predict", "--config", config, "--ckpt_path", str(out / "rein/checkpoints/best.ckpt"), *where]) == 0
    with Image.open(tmp_path / "predicted/predictions/photo.png") as picture:
        assert picture.size == (64, 48)
    vit = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True, patch_size=8)
    rein.load(vit, out / "rein" / "adapter.safetensors", check_weights=False)  # random ones
    for name in ("frozen", "rein"):
        rein.Segmenter.load(out / name / "segmenter.safetensors", make_backbone("test_vit", False, 8), check_weights=False)


def test_the_evaluated_state_is_the_best_on_the_source_and_the_one_that_is_exported(streets):
    out, _, _ = streets
    result = json.loads((out / "rein" / "test" / "results.json").read_text())["results"][0]
    best = torch.load(out / "rein/checkpoints/best.ckpt", weights_only=True)
    assert result["step"] == best["global_step"]
    assert result["source_miou"] == best["rein"]["source_miou"]
    segmenter = rein.Segmenter.load(
        out / "rein" / "segmenter.safetensors", make_backbone("test_vit", False, 8), check_weights=False
    )
    exported = segmenter.head.state_dict()
    assert all(torch.equal(exported[key], best["state_dict"][f"segmenter.head.{key}"]) for key in exported)


def test_a_finished_demo_is_kept_and_one_with_other_settings_is_refused(streets):
    out, table, _ = streets
    options = {
        "out": out,
        "backbone": "test_vit",
        "pretrained": False,
        "patch_size": 8,
        "batch_size": 2,
        "lr": 1e-3,
    }
    before = (out / "rein/checkpoints/last.ckpt").stat().st_mtime_ns
    assert demo.run(demo.Options(**options, steps=4, scenes=8), lambda text: None) == table
    assert (out / "rein/checkpoints/last.ckpt").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match=r"max_steps was 4, is 5.*start another run with another --out"):
        demo.run(demo.Options(**options, steps=5, scenes=8), lambda text: None)


def test_a_finished_demo_evaluates_new_targets_and_refuses_another_source(tmp_path):
    first, second = (make_folder(tmp_path / name, ("day", "dusk")) for name in ("first", "second"))

    def run(root, limit=None):
        data = demo.FolderData(root=root, source="day", crop=32, limit=limit)
        options = {"backbone": "test_vit", "pretrained": False, "patch_size": 8, "steps": 2, "batch_size": 1}
        demo.run(demo.Options(out=tmp_path / "out", data=data, **options), lambda text: None)
        return json.loads((tmp_path / "out" / "results.json").read_text())["evaluation"]["limit"]

    assert run(first) is None
    assert run(first, limit=1) == 1
    with pytest.raises(CheckpointError, match=r"data\.sources was .*first.*, is .*second"):
        run(second)


def test_the_demo_starts_from_the_pretrained_pocket_backbone_by_default(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run", lambda options: asked.append((options.backbone, options.pretrained)) or "table")
    for more in ([], ["--backbone", "test_vit"], ["--backbone", "test_vit", "--pretrained"]):
        assert main(["demo", "--scenes", "1", *more]) == 0
    assert asked == [("pocket_vit", True), ("test_vit", False), ("test_vit", True)]


def test_another_backbone_gets_the_papers_rates_and_reins_default(tmp_path):
    options = demo.Options(out=tmp_path, backbone="vit_small_patch14_dinov2")
    configs = demo.configurations(options)
    model = configs["rein"]["model"]
    assert model["lr"] * model["adapter_factor"] == pytest.approx(1e-4)
    assert configs["full"]["model"]["lr"] * configs["full"]["model"]["backbone_factor"] == pytest.approx(1e-5)
    assert (model["method"], model.get("method_settings")) == ("rein", None)


def test_options_change_the_recipes(tmp_path):
    options = demo.Options(out=tmp_path, lr=0.5, seed=3, steps=50, batch_size=7, scenes=40)
    config = demo.configurations(options)["frozen"]
    assert (config["model"]["lr"], config["seed_everything"], config["data"]["batch_size"]) == (0.5, 3, 7)
    assert (config["trainer"]["max_steps"], config["trainer"]["val_check_interval"]) == (50, 10)
    counts = {
        role: {domain["options"]["count"] for domain in config["data"][role]} for role in ("sources", "validation", "targets")
    }
    assert counts == {"sources": {40}, "validation": {5}, "targets": {6}}
    assert {domain["options"]["seed"] for role in counts for domain in config["data"][role]} == {3}


def test_absent_classes_of_the_source_may_be_allowed(tmp_path):
    root = make_folder(tmp_path / "data")
    for allowed in (True, False):
        data = demo.FolderData(
            root=root, source="day", classes=["sky", "ground", "thing", "unicorn"], allow_absent_classes=allowed
        )
        options = demo.Options(out=tmp_path / "out", data=data)
        if allowed:
            assert demo.configurations(options)["rein"]["data"]["allow_absent_classes"] is True
        else:
            with pytest.raises(InputError, match="the class 'unicorn' never occurs"):
                demo.configurations(options)


def test_every_method_starts_from_the_same_backbone_and_head(tmp_path):
    options = demo.Options(out=tmp_path, backbone="test_vit", pretrained=False, steps=1, batch_size=1, scenes=2)
    starts = []
    for name, config in demo.configurations(options).items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**config, "out": str(tmp_path / name)}))
        segmenter = commands.run(
            ["fit", "--config", str(path), "--trainer.fast_dev_run", "1", "--model.lr", "1e-30"], quiet=True
        ).model
        segmenter = segmenter.segmenter
        state = {k: v.clone() for k, v in segmenter.state_dict().items() if ".rein." not in k}
        starts.append((state, segmenter.predict(torch.ones(1, 3, 32, 32))))
    (first, logits), *others = starts
    assert len(others) == 2
    for state, other_logits in others:
        assert state.keys() == first.keys()
        assert all(torch.allclose(first[k], v, atol=1e-7) for k, v in state.items())
        assert torch.allclose(logits, other_logits, atol=0.01)  # the adapter starts near the identity


def test_targets_are_never_read_in_training(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "data")
    data = demo.FolderData(root=root, source="day", crop=32)
    options = demo.Options(out=tmp_path / "out", backbone="test_vit", pretrained=False, steps=2, batch_size=1, data=data)
    configs = demo.configurations(options)  # reads every file once, to find bad ones
    read = []
    real = Files.__getitem__
    monkeypatch.setattr(Files, "__getitem__", lambda self, index: read.append(str(self.pairs[index][0])) or real(self, index))
    for name, config in configs.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**config, "out": str(tmp_path / name)}))
        commands.run(["fit", "--config", str(path)], quiet=True)
    assert read
    assert all("/day/" in path for path in read)


def test_the_command_runs_on_a_folder_and_prints_the_table(tmp_path, capsys):
    root, out = make_folder(tmp_path / "data", ("day", "dusk", "night"), count=5), tmp_path / "out"
    code = main(["demo", "--data", str(root), "--source", "day", "--crop", "32", "--limit", "3", "--out", str(out), *SMALL])
    printed = capsys.readouterr().out
    assert code == 0
    header = next(line for line in printed.splitlines() if line.startswith("method"))
    assert header.split() == ["method", "head", *["tuned", "in", "backbone"], "%", "dusk", "night", *["mean", "of", "unseen"]]
    assert "trained on 'day' only" in printed
    assert f"rein test --config {out / 'rein' / 'config.yaml'}" in printed
    assert (out / "rein" / "adapter.safetensors").stat().st_size < 2e6
    content = json.loads((out / "results.json").read_text())
    assert content["sources"] == ["day"]
    assert sorted(content["results"][0]["iou"]["dusk"]) == ["ground", "sky", "thing"]
    assert main(["info", str(out / "rein" / "adapter.safetensors")]) == 0
    printed = capsys.readouterr().out
    for part in ("adapter, format 2", "test_vit", "6, blocks.0 to blocks.5; width 64; prefix tokens 1", "rank=16", "rein.load"):
        assert part in printed
    assert main(["info", str(out / "rein" / "segmenter.safetensors")]) == 0
    assert "LinearHead" in capsys.readouterr().out


BAD = {
    "a missing folder": (lambda root: ["demo", "--data", f"{root}/nowhere", "--source", "day"], "nowhere does not exist"),
    "no source": (lambda root: ["demo", "--data", f"{root}"], "--source is missing; expected one of day, dusk"),
    "an unknown source": (
        lambda root: ["demo", "--data", f"{root}", "--source", "noon"],
        "has no domain 'noon'; expected one of day, dusk",
    ),
    "source without data": (lambda root: ["demo", "--source", "day"], "--source belongs to --data FOLDER"),
    "an unknown backbone": (
        lambda root: ["demo", "--backbone", "vit_gigantic", "--scenes", "1"],
        "timm has no model 'vit_gigantic'. Similar names: vit_giga",
    ),
    "a backbone rein does not know": (
        lambda root: ["demo", "--backbone", "vgg11", "--data", f"{root}", "--source", "day"],
        "VGG",
    ),
    "an unknown tag": (lambda root: ["demo", "--backbone", "test_vit.foo", "--scenes", "1"], "Invalid pretrained tag (foo)"),
    "scenes and data": (lambda root: ["demo", "--scenes", "3", "--data", f"{root}", "--source", "day"], "--scenes belongs to"),
    "an empty class name": (
        lambda root: ["demo", "--data", f"{root}", "--source", "day", "--classes", ","],
        "expected different, non-empty names",
    ),
    "a class that never occurs in the source": (
        lambda root: ["demo", "--data", f"{root}", "--source", "day", "--classes", "sky,ground,thing,unicorn"],
        "the class 'unicorn' never occurs in the 4 labels of the split 'day'",
    ),
    "a folder in place of a result": (
        lambda root: ["demo", "--data", f"{root}", "--source", "day", "--out", f"{root}", *SMALL],
        "results.json is a folder, but a file is to be written there",
    ),
    "a label out of range": (lambda root: ["demo", "--data", f"{root}", "--source", "day"], "has label values [7]"),
    "a file that is a folder": (lambda root: ["info", f"{root}"], "it is a folder"),
    "a file that is no adapter": (lambda root: ["info", f"{root}/index.json"], "index.json is not a complete safetensors file"),
    "a name too long for a file": (lambda root: ["info", "x" * 3000], "File name too long"),
    "data with a name too long": (lambda root: ["data", "check", "folder", "x" * 3000], "cannot use xxx"),
    "a demo with a name too long": (lambda root: ["demo", "--data", "x" * 3000, "--source", "a"], "File name too long"),
    "predictions for a name too long": (
        lambda root: ["predict", "--config", "streets-rein", "--data.predict", "x" * 3000],
        "cannot use xxx",
    ),
    "a recipe with a name too long": (lambda root: ["fit", "--config", "x" * 3000], "There is no recipe 'xxx"),
    "a file that is missing": (lambda root: ["info", f"{root}/a.safetensors"], "cannot read"),
    "an output that is a file": (
        lambda root: ["demo", "--out", f"{root}/index.json", "--data", f"{root}", "--source", "day"],
        "cannot be made",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_and_exit_code_two(tmp_path, capsys, case):
    arguments, message = BAD[case]
    root = make_folder(tmp_path / "data")
    if case == "a folder in place of a result":
        (root / "results.json").mkdir()
    if case == "a label out of range":
        Image.fromarray(np.full((32, 48), 7, np.uint8)).save(root / "dusk" / "labels" / "001.png")
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
    assert "expected at least 2" in capsys.readouterr().err
    for path, message in ((single / "day", "has no domains"), (tmp_path / "none", "none does not exist")):
        with pytest.raises(InputError, match=message):
            demo.find_domains(path)


def test_ctrl_c_keeps_the_state_and_the_same_command_resumes(tmp_path):
    root, out = make_folder(tmp_path / "data"), tmp_path / "out"
    options = ["--source", "day", "--out", str(out), "--backbone", "test_vit", "--crop", "32", "--steps", "400"]
    command = [sys.executable, "-m", "rein.cli", "demo", "--data", str(root), *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stdout:
        if line.startswith("frozen: step 160 of 400"):  # the checkpoints of step 80 are written
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert f"rein: {out / 'frozen'} was interrupted at step" in errors
    assert f"{out / 'frozen' / 'checkpoints'} holds last.ckpt and best.ckpt" in errors
    assert errors.rstrip().endswith("To resume, run the same command again.")
    assert "Traceback" not in errors
    state = torch.load(out / "frozen/checkpoints/last.ckpt", weights_only=True)
    assert 80 <= state["global_step"] < 400


def test_a_target_without_labels_is_a_dash_and_null(tmp_path):
    root = make_folder(tmp_path / "data", ("day", "dusk", "void"))
    for path in (root / "void" / "labels").iterdir():
        Image.fromarray(np.full((32, 48), 255, np.uint8)).save(path)
    arguments = ["--source", "day", "--crop", "32", "--out", str(tmp_path / "out"), *SMALL]
    assert main(["demo", "--data", str(root), *arguments]) == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    assert stored["miou"]["void"] is None
    assert stored["mean_miou_of_unseen"] == stored["miou"]["dusk"]


def test_progress_is_printed_at_least_every_ten_seconds(tmp_path, capsys, monkeypatch):
    from rein.dgss.training import progress

    assert progress.INTERVAL <= 10
    monkeypatch.setattr(progress, "INTERVAL", 0)  # otherwise the test would take minutes
    root = make_folder(tmp_path / "data")
    arguments = ["--source", "day", "--crop", "32", "--out", str(tmp_path / "out"), *SMALL]
    assert main(["demo", "--data", str(root), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("frozen: step") for line in lines) >= 6
    assert any("s left" in line and "source mIoU" in line for line in lines)


def test_data_settings_keep_their_old_name_with_a_warning():
    domain = {"dataset": "scenes", "options": {"count": 1, "size": [32, 32]}}
    from rein.dgss.data.datamodule import Domain

    with pytest.warns(FutureWarning, match="use data.eval_edge"):
        assert DomainData(sources=[Domain(**domain)], judged_edge=40).eval_edge == 40
