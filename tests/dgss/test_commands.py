"""`rein fit / validate / test / predict / recipes / compare` from end to end, at toy size."""

import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from PIL import Image
from safetensors.torch import load_file

import rein
from dgss.folders import CLASSES, make_folder
from rein.backbones.creation import make_backbone
from rein.cli import main
from rein.dgss import commands
from rein.dgss.data.protocols import PROTOCOLS
from rein.dgss.training.experiment import Experiment

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning, TensorBoard and others warn of at such sizes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), domains=("day", "dusk", "fog"), count=6)


def domain(data, name):
    return {"dataset": "folder", "path": str(data), "split": name, "title": name}


def configuration(data, out, **model):
    return {
        "out": str(out),
        "checkpoint_every": 2,
        "model": {
            "backbone": "test_vit",
            "pretrained": False,
            "patch_size": 8,
            "method_settings": {"num_tokens": 5, "rank": 2, "query_dim": None},
            "head": "LinearHead",
            "lr": 3e-3,
            "window": 32,
            **model,
        },
        "data": {
            "sources": [domain(data, "day")],
            "targets": [domain(data, "dusk"), domain(data, "fog")],
            "held_out": 2,
            "crop": 32,
            "batch_size": 2,
            "workers": 0,
        },
        "trainer": {"max_steps": 6, "val_check_interval": 3, "enable_progress_bar": False, "accelerator": "cpu"},
    }


def write(path, config):
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished and evaluated run of Rein."""
    folder = tmp_path_factory.mktemp("run")
    config = write(folder / "small.yaml", configuration(data, folder / "rein"))
    assert main(["fit", "--config", config]) == 0
    assert main(["test", "--config", str(folder / "rein" / "config.yaml")]) == 0
    return folder / "rein"


def weights(path):
    return torch.load(path, weights_only=True)


def test_a_run_leaves_configuration_logs_pictures_and_small_checkpoints(run):
    assert (run / "config.yaml").exists()
    assert list(run.glob("logs/version_0/events*"))
    assert "source_miou" in (run / "logs/version_0/metrics.csv").read_text()
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["000003.png", "000006.png"]
    state = weights(run / "checkpoints" / "last.ckpt")
    backbone = [name for name in state["state_dict"] if name.startswith("segmenter.backbone.")]
    assert backbone
    assert all(name.startswith("segmenter.backbone.rein.") for name in backbone)
    assert weights(run / "checkpoints" / "best.ckpt")["state_dict"].keys() == state["state_dict"].keys()


def test_the_segmenter_of_a_run_loads_without_the_experiment(run):
    torch.manual_seed(0)
    backbone = make_backbone("test_vit", False, 8)
    segmenter = rein.Segmenter.load(run / "segmenter.safetensors", backbone)
    state = weights(run / "checkpoints" / "last.ckpt")["state_dict"]
    assert torch.equal(segmenter.head.classifier.weight, state["segmenter.head.classifier.weight"])


def test_the_segmenter_of_a_run_explains_itself(run, capsys):
    torch.manual_seed(0)
    segmenter = rein.Segmenter.load(run / "segmenter.safetensors", make_backbone("test_vit", False, 8))
    assert segmenter.classes == CLASSES
    assert len(segmenter.palette) == len(CLASSES)
    assert segmenter.normalization == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    notes = segmenter.notes
    assert (notes["sources"], notes["method"], notes["steps"], notes["window"]) == (["day"], "rein", 6, 32)
    assert notes["protocol"]["name"] == "full-resolution"
    table = (run / "logs/version_0/metrics.csv").read_text().splitlines()
    column = table[0].split(",").index("source_miou")
    logged = [float(row.split(",")[column]) for row in table[1:] if row.split(",")[column]]
    scores = notes["scores"]["source validation"]
    assert scores["mIoU"] == pytest.approx(logged[-1], abs=1e-4)
    assert set(scores["IoU"]) <= set(CLASSES)
    assert main(["info", str(run / "segmenter.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert f"mIoU {scores['mIoU']:.4g}" in printed
    assert "rein fit --config small.yaml" in printed
    assert str(run.parent) not in printed.split("\n", 1)[1], "the file names a folder of the machine"


def test_a_photograph_is_segmented_as_the_run_predicts_it(run, data, tmp_path):
    torch.manual_seed(0)
    segmenter = rein.Segmenter.load(run / "segmenter.safetensors", make_backbone("test_vit", False, 8))
    photo = next((data / "fog" / "images").iterdir())
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / photo.name).write_bytes(photo.read_bytes())
    config = ["--config", str(run / "config.yaml"), "--data.predict", str(folder), "--out", str(tmp_path / "out")]
    assert main(["predict", *config]) == 0
    segmenter.segment(photo).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as found, Image.open(next(tmp_path.glob("out/predictions/*.png"))) as expected:
        assert np.array_equal(np.array(found), np.array(expected))
        assert np.array_equal(np.array(found.convert("RGB")), np.array(expected.convert("RGB")))


def test_a_newcomer_trains_on_a_folder_and_a_colleague_segments_a_photograph_with_the_one_file(data, tmp_path, capsys):
    config = configuration(data, tmp_path / "run", backbone="pocket_vit", pretrained=True)
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "seg.safetensors").write_bytes((tmp_path / "run/segmenter.safetensors").read_bytes())
    photo = next((data / "fog" / "images").iterdir())
    Image.open(photo).save(elsewhere / "photo.png")
    program = """
import rein
segmenter = rein.Segmenter.load("seg.safetensors")
segmenter.segment("photo.png").save("mask.png")
"""
    subprocess.run([sys.executable, "-c", program], cwd=elsewhere, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    trained = commands.run(["validate", "--config", str(tmp_path / "run/config.yaml")], quiet=True).model.eval()
    pixels = torch.from_numpy(np.array(Image.open(photo).convert("RGB"))).permute(2, 0, 1)[None]
    with Image.open(elsewhere / "mask.png") as mask:
        assert np.array_equal(np.array(mask), trained.predict_logits(pixels).argmax(1)[0].numpy())
    capsys.readouterr()
    assert main(["info", str(elsewhere / "seg.safetensors")]) == 0
    printed = capsys.readouterr().out
    for part in ("pocket_vit.v2", ", ".join(CLASSES), "day", "mIoU", "rein fit"):
        assert part in printed


def test_the_scores_of_the_best_state_are_its_own(data, tmp_path):
    config = write(tmp_path / "c.yaml", configuration(data, tmp_path / "out"))
    assert main(["fit", "--config", config, "--state", "best"]) == 0
    torch.manual_seed(0)
    segmenter = rein.Segmenter.load(tmp_path / "out/segmenter.safetensors", make_backbone("test_vit", False, 8))
    best = weights(tmp_path / "out/checkpoints/best.ckpt")
    assert segmenter.notes["scores"] == {"source validation": {"mIoU": round(best["rein"]["source_miou"], 4)}}
    assert segmenter.notes["state"] == "best"


def test_weights_that_were_not_evaluated_have_no_scores(data, tmp_path):
    config = configuration(data, tmp_path / "out")
    config["trainer"] |= {"max_steps": 1, "limit_val_batches": 0}
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 0
    torch.manual_seed(0)
    segmenter = rein.Segmenter.load(tmp_path / "out/segmenter.safetensors", make_backbone("test_vit", False, 8))
    assert segmenter.notes["scores"] == {}


def test_a_test_gives_every_domain_and_class_and_examples(run):
    content = json.loads((run / "test" / "results.json").read_text())
    (result,) = content["results"]
    assert list(result["miou"]) == ["dusk", "fog"]
    assert list(result["iou"]["fog"]) == CLASSES
    seen = [value for value in result["iou"]["fog"].values() if value is not None]
    assert result["miou"]["fog"] == pytest.approx(np.mean(seen))
    assert result["mean_miou_of_unseen"] == pytest.approx(np.mean(list(result["miou"].values())))
    assert content["seed"] == 0
    (first, *_) = content["examples"]["dusk"]
    with Image.open(next((run / "test/examples/dusk").glob("*-prediction.png"))) as picture:
        assert picture.mode == "P"
        assert np.array(picture).max() < 3
    assert first
    page = (run / "test/index.html").read_text()
    assert all(f"<h3>{name}</h3>" in page for names in content["examples"].values() for name in names)
    assert all(f'data-value="{100 * value:.6g}"' in page for value in [*seen, result["miou"]["dusk"]])


def test_a_test_counts_what_the_segmenter_predicts(run, data):
    """The same figures, computed from the exported file."""
    torch.manual_seed(0)
    segmenter = rein.Segmenter.load(run / "segmenter.safetensors", make_backbone("test_vit", False, 8))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    hit, union = np.zeros(3), np.zeros(3)
    for image in sorted((data / "fog" / "images").iterdir()):
        pixels = torch.from_numpy(np.array(Image.open(image)))
        batch = ((pixels / 255 - mean) / std).permute(2, 0, 1)[None].float()
        predicted = segmenter.predict(batch, 32).argmax(1)[0].numpy()
        label = np.array(Image.open(data / "fog" / "labels" / f"{image.stem}.png"))
        counted = label != 11
        for k in range(3):
            hit[k] += ((label == k) & (predicted == k) & counted).sum()
            union[k] += (((label == k) | (predicted == k)) & counted).sum()
    (result,) = json.loads((run / "test" / "results.json").read_text())["results"]
    assert list(result["iou"]["fog"].values()) == pytest.approx(list(hit / union), abs=1e-6)


def test_predicting_a_folder_writes_classes_of_each_image(run, data, tmp_path, capsys):
    images = data / "dusk" / "images"
    out = ["--out", str(tmp_path / "out"), "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    assert main(["predict", "--config", str(run / "config.yaml"), "--data.predict", str(images), *out]) == 0
    page = (tmp_path / "out/index.html").read_text()
    assert all(f"<h3>{name.stem}</h3>" in page for name in images.iterdir())
    written = sorted((tmp_path / "out" / "predictions").iterdir())
    assert [path.stem for path in written] == [path.stem for path in sorted(images.iterdir())]
    with Image.open(written[0]) as picture:
        assert picture.size == (48, 32)
        assert np.array(picture).max() < 3


def test_validate_evaluates_the_held_out_source_pairs(run, capsys):
    assert main(["validate", "--config", str(run / "config.yaml")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["class", "source", "validation"]
    assert [line.split()[0] for line in said[2:]] == [*CLASSES, "mean"]


def test_runs_are_compared_in_a_table_and_a_panel_for_each_domain(run, data, tmp_path, capsys):
    other = tmp_path / "frozen"
    config = write(tmp_path / "frozen.yaml", configuration(data, other, method="freeze", method_settings={}))
    assert main(["fit", "--config", config]) == 0
    assert main(["test", "--config", config]) == 0
    capsys.readouterr()
    assert main(["compare", str(other), str(run), "--out", str(tmp_path / "panels")]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[2:4]] == ["freeze", "rein"]
    assert {path.name for path in (tmp_path / "panels").iterdir()} == {
        *("dusk.png", "fog.png", "panel.png", "table.txt", "results.json", "index.html")
    }
    page = (tmp_path / "panels/index.html").read_text()
    assert all(f">{name}</option>" in page for name in ("truth", "freeze", "errors of freeze", "rein", "errors of rein"))
    assert all(f"<summary>{domain}</summary>" in page for domain in ("dusk", "fog"))
    both = json.loads((tmp_path / "panels" / "results.json").read_text())
    assert [result["method"] for result in both["results"]] == ["freeze", "rein"]
    assert both["sources"] == ["day"]
    with Image.open(tmp_path / "panels" / "dusk.png") as picture:
        red = (np.array(picture.convert("RGB")) == (220, 30, 30)).all(2)
    assert red.any()  # errors
    both_runs = [str(other), str(run)]
    assert main(["compare", *both_runs, "--domains", "dusk", "--out", str(tmp_path / "dusk")]) == 0
    heights = [Image.open(tmp_path / folder / "panel.png").height for folder in ("panels", "dusk")]
    assert heights[1] < heights[0]
    assert main(["compare", *both_runs, "--domains", "dusk,noon", "--out", str(tmp_path / "no")]) == 2
    assert "the runs have no domain 'noon'; expected some of dusk, fog" in capsys.readouterr().err
    stored = json.loads((run / "test/results.json").read_text())
    changed = tmp_path / "changed"
    (changed / "test").mkdir(parents=True)
    stored["classes"] = ["a", "b", "c"]
    (changed / "test" / "results.json").write_text(json.dumps(stored))
    assert main(["compare", str(run), str(changed), "--out", str(tmp_path / "no")]) == 2
    assert "comparable only on the same domains and classes" in capsys.readouterr().err
    assert main(["test", "--config", config, "--data.eval_edge", "24"]) == 0
    capsys.readouterr()
    assert main(["compare", str(other), str(run), "--out", str(tmp_path / "no")]) == 2
    assert "were evaluated differently: eval_edge None and 24" in capsys.readouterr().err


def test_a_test_prints_and_stores_its_protocol_and_runs_of_two_protocols_are_not_compared(run, data, tmp_path, capsys):
    arguments = ["test", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    folders = []
    for protocol in ("full-resolution", "rein"):
        folders.append(tmp_path / protocol)
        assert main([*arguments, "--out", str(folders[-1]), "--data.protocol", protocol]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[:3] == [
            f"protocol {protocol}: {PROTOCOLS[protocol].summary}",
            "  folder: image at its own size",
            "  resized bilinear without antialias, 8 bits; predicted in windows of 32, stride 21; counted at the size of the label",
        ]
        stored = json.loads((folders[-1] / "test" / "results.json").read_text())["evaluation"]
        assert stored["protocol"] == PROTOCOLS[protocol].describe()
        assert (stored["window"], stored["stride"]) == (32, 21)
    compare = ["compare", *map(str, folders), "--out", str(tmp_path / "no")]
    assert main(compare) == 2
    assert "were evaluated differently: protocol rein and full-resolution. Run rein test again" in capsys.readouterr().err
    path = folders[0] / "test" / "results.json"
    content = json.loads(path.read_text())
    del content["evaluation"]["protocol"]  # as before there were protocols
    path.write_text(json.dumps(content))
    for order in (folders, folders[::-1]):
        assert main(["compare", *map(str, order), "--out", str(tmp_path / "no")]) == 2
        assert re.search("protocol (None and rein|rein and None)", capsys.readouterr().err)


def test_runs_are_compared_whose_images_and_labels_differ_in_size(run, tmp_path, capsys):
    arguments = ["test", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        assert main([*arguments, "--out", str(folder), "--data.eval_edge", "24"]) == 0
        with Image.open(next((folder / "test/examples/dusk").glob("*-image.png"))) as picture:
            assert picture.size == (48, 32)  # the label's
    assert "  folder: image resized to a shortest edge of 24" in capsys.readouterr().out.splitlines()
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "out")]) == 0


def test_without_held_out_pairs_all_train_and_the_last_state_is_evaluated(data, tmp_path, capsys, caplog):
    config = configuration(data, tmp_path / "out")
    config["data"]["held_out"] = 0
    path = write(tmp_path / "c.yaml", config)
    assert main(["fit", "--config", path]) == 0
    assert "source day: 6 of 6 pairs train" in caplog.messages
    assert [file.name for file in (tmp_path / "out/checkpoints").iterdir()] == ["last.ckpt"]
    assert main(["test", "--config", path]) == 0
    content = json.loads((tmp_path / "out/test/results.json").read_text())
    assert (content["checkpoint"], content["results"][0]["step"], content["results"][0]["source_miou"]) == ("last", 6, None)
    capsys.readouterr()
    assert main(["validate", "--config", path]) == 2
    assert "so that there are no source validation pairs. Set one of them" in capsys.readouterr().err
    assert main(["fit", "--config", path, "--state", "best", "--out", str(tmp_path / "best")]) == 2
    assert "so that no state can be chosen. Set state: last, or hold out pairs" in capsys.readouterr().err
    assert not (tmp_path / "best/checkpoints").exists()


def test_the_best_state_can_be_exported_and_evaluated(data, tmp_path):
    config = configuration(data, tmp_path / "out")
    config["state"] = "best"
    config["trainer"] |= {"max_steps": 6, "val_check_interval": 1}
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 0
    best = weights(tmp_path / "out/checkpoints/best.ckpt")
    segmenter = rein.Segmenter.load(
        tmp_path / "out/segmenter.safetensors", make_backbone("test_vit", False, 8), check_weights=False
    )
    assert torch.equal(segmenter.head.classifier.weight, best["state_dict"]["segmenter.head.classifier.weight"])
    alone = rein.load(make_backbone("test_vit", False, 8), tmp_path / "out/adapter.safetensors", check_weights=False)
    assert all(
        torch.equal(tensor, best["state_dict"][f"segmenter.backbone.rein.{name}"])
        for name, tensor in alone.rein.state_dict().items()
    )
    assert main(["test", "--config", str(tmp_path / "out/config.yaml")]) == 0
    content = json.loads((tmp_path / "out/test/results.json").read_text())
    assert (content["checkpoint"], content["results"][0]["step"]) == ("best", best["global_step"])
    scores = [line.split(",") for line in (tmp_path / "out/logs/version_0/metrics.csv").read_text().splitlines()]
    found = [float(row[scores[0].index("source_miou")]) for row in scores[1:] if row[scores[0].index("source_miou")]]
    assert content["results"][0]["source_miou"] == pytest.approx(max(found), abs=1e-6)


def test_training_learns_on_the_source(data, tmp_path):
    config = configuration(data, tmp_path / "out")
    config["trainer"] |= {"max_steps": 40, "val_check_interval": 40}
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 0
    assert weights(tmp_path / "out/checkpoints/last.ckpt")["rein"]["source_miou"] > 0.6


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_help_is_short_and_says_what_is_written(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 70
    assert text.count("\n  --") <= 16
    assert "--help-all" in text
    if command != "validate":
        assert "Writes" in text or "write test/results.json" in text
    if command == "predict":
        assert "--data.predict" in text
        assert "predictions/<name>.png" in text


def test_all_options_are_shown_on_demand(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--help-all"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--trainer.accumulate_grad_batches" in text
    assert "--model.adapter_factor" in text


def test_a_run_is_not_overwritten(run, capsys):
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    assert main(["fit", "--config", str(run / "config.yaml")]) == 2
    assert "holds a run already. Resume it with --ckpt_path last" in capsys.readouterr().err
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.method=lor", "expected one of full, freeze, rein"),
        ("--model.backbone=vit_giant_of_nowhere", "timm has no model"),
        ("--model.head=Linear", "expected one of DecoderHead"),
        ("--data.root=/nowhere", None),
        ("--data.held_out=6", "were to be held out"),
        ("--data.targets=[{dataset: cityscapes, path: .}]", "expected the same classes in all sources and targets"),
        ("--data.targets=[{dataset: gtaw}]", "expected one of gtav"),
        ("--model.lr=-1", "rates must be above 0"),
        ("--checkpoint_every=0", "must be at least 1"),
        ("--trainer.max_steps=-1", "it must be at least 1: the learning rate"),
        ("--trainer.accumulate_grad_batches=0", "nothing would be trained; it must be at least 1"),
        ("--trainer.max_epochs=0", "nothing would be trained; it must be at least 1"),
        ("--model.num_maps=0", "num_maps is 0; it must be at least 1, or null"),
        ("--model=3", "(see rein fit --help-all)"),
    ],
)
def test_a_bad_setting_is_one_line_and_code_2(data, tmp_path, capsys, option, said):
    config = write(tmp_path / "c.yaml", configuration(data, tmp_path / "out"))
    code = main(["fit", "--config", config, "--trainer.max_steps=1", option])
    if said is None:
        assert code == 0  # no domain of this configuration lies there
        return
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rein: ")
    assert said in error
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("option", ["--model.num_token=3", "--data.crops=3", "--trainer.steps=4", "--modle.lr=1"])
def test_unknown_keys_are_rejected(data, tmp_path, capsys, option):
    config = write(tmp_path / "c.yaml", configuration(data, tmp_path / "out"))
    assert main(["fit", "--config", config, option]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rein: ")]
    assert option.partition("=")[0].lstrip("-") in line


def test_an_unknown_key_in_a_file_is_rejected(data, tmp_path, capsys):
    config = configuration(data, tmp_path / "out")
    config["data"]["cropp"] = 3
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 2
    assert "cropp" in capsys.readouterr().err


def test_a_test_without_a_fit_says_so(data, tmp_path, capsys):
    config = write(tmp_path / "c.yaml", configuration(data, tmp_path / "none"))
    assert main(["test", "--config", config]) == 2
    assert "last.ckpt does not exist. Run rein fit first" in capsys.readouterr().err


def test_the_best_state_of_a_run_without_validation_is_refused(data, tmp_path, capsys):
    config = configuration(data, tmp_path / "out")
    config["trainer"] |= {"max_steps": 1, "limit_val_batches": 0}
    path = write(tmp_path / "c.yaml", config)
    assert main(["fit", "--config", path, "--state", "best"]) == 2
    assert "best.ckpt does not exist, since the run was not validated. Export the last state" in capsys.readouterr().err
    assert main(["fit", "--config", path, "--state", "last", "--ckpt_path", "last"]) == 0
    assert (tmp_path / "out" / "segmenter.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.method": "freeze", "model.method_settings": {}}, "checkpoint's method is 'rein'"),
        ({"seed_everything": 7}, "frozen weights differ from those"),
        ({"model.method_settings": {"num_tokens": 6, "rank": 2, "query_dim": None}}, "tensors are not those"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(run, data, tmp_path, capsys, change, said):
    config = configuration(data, run)
    for key, value in change.items():
        if "." in key:
            config[key.partition(".")[0]][key.partition(".")[2]] = value
        else:
            config[key] = value
    assert main(["test", "--config", write(tmp_path / "c.yaml", config)]) == 2
    assert said in capsys.readouterr().err


def test_the_average_of_the_weights_is_evaluated_and_exported(data, tmp_path):
    config = configuration(data, tmp_path / "ema", ema=0.9)
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 0
    state = weights(tmp_path / "ema/checkpoints/last.ckpt")
    average = state["rein"]["average"]
    key = "head.classifier.weight"
    assert not torch.equal(average[key], state["state_dict"][f"segmenter.{key}"])
    torch.manual_seed(0)
    segmenter = rein.Segmenter.load(tmp_path / "ema/segmenter.safetensors", make_backbone("test_vit", False, 8))
    assert torch.equal(segmenter.head.classifier.weight, average[key])


@pytest.mark.parametrize(("method", "settings"), [("soma", {"rank": 2}), ("lora", {"rank": 2})])
def test_the_backbone_of_a_method_that_can_be_merged_is_exported_as_a_bare_one(data, tmp_path, capsys, method, settings):
    config = configuration(data, tmp_path / "out", method=method, method_settings=settings, ema=0.5)
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 0
    assert main(["test", "--config", str(tmp_path / "out/config.yaml")]) == 0
    command = commands.run(["validate", "--config", str(tmp_path / "out/config.yaml")], quiet=True)
    bare = make_backbone("test_vit", False, 8)
    bare.load_state_dict(load_file(tmp_path / "out/backbone.safetensors"))
    segmenter = rein.Segmenter.load(tmp_path / "out/segmenter.safetensors", bare.requires_grad_(False))
    images = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8)
    model = command.model.eval()
    expected = model.predict_logits(images)
    got = segmenter.eval().predict(model.normalize(images), 32)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * expected.abs().max().item())
    alone = rein.Segmenter.load(tmp_path / "out/segmenter.safetensors", weights=tmp_path / "out/backbone.safetensors")
    assert torch.equal(alone.predict(model.normalize(images), 32), got)
    described = rein.checkpoint.describe_file(tmp_path / "out/segmenter.safetensors")
    assert described.endswith('rein.Segmenter.load(path, weights="backbone.safetensors")')


def test_the_average_starts_at_its_step_and_every_step_has_its_weight_decay(data, tmp_path, monkeypatch):
    config = configuration(data, tmp_path / "late", ema=0.5, ema_from=4, final_weight_decay=1e-5)
    weights_by_step, decays = {}, []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            decays.append(max(group["weight_decay"] for group in optimizer.param_groups))

        def on_train_batch_end(self, trainer, module, *arguments):
            weights_by_step[trainer.global_step] = module.segmenter.head.classifier.weight.detach().clone()
            assert bool(module._average) == (trainer.global_step >= 4)

    monkeypatch.setattr(Experiment, "configure_callbacks", lambda self: [Watch()])
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 0
    steps = config["trainer"]["max_steps"]
    assert len(decays) == steps == 6
    expected = [1e-5 + (0.05 - 1e-5) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    assert decays == pytest.approx(expected, rel=1e-6)
    average = weights_by_step[4]
    for step in (5, 6):
        average = 0.5 * average + 0.5 * weights_by_step[step]
    state = weights(tmp_path / "late/checkpoints/last.ckpt")
    torch.testing.assert_close(state["rein"]["average"]["head.classifier.weight"], average)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.max_steps", "12"], "trainer.max_steps was 6, is 12"),
        (["--model.lr", "0.05"], "model.lr was 0.003, is 0.05"),
        (["--data.batch_size", "1", "--data.crop", "16"], "data.batch_size was 2, is 1; data.crop was 32, is 16"),
        (["--model.ema", "0.5"], "model.ema was None, is 0.5"),
    ],
)
def test_a_run_resumes_only_with_its_own_settings(run, capsys, options, said):
    before = (run / "config.yaml").read_text()
    assert main(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", *options]) == 2
    assert said in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before


def test_an_incomplete_checkpoint_is_refused(run, tmp_path, capsys):
    config = str(run / "config.yaml")
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((run / "checkpoints/last.ckpt").read_bytes()[:-100_000])
    for command in ("fit", "test"):
        for path, said in ((broken, "is not a complete checkpoint"), (tmp_path / "none.ckpt", "does not exist")):
            assert main([command, "--config", config, "--ckpt_path", str(path)]) == 2
            assert said in capsys.readouterr().err
    assert main(["fit", "--config", config, "--ckpt_path", "best"]) == 2
    assert "holds weights only" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, capsys):
    config = write(tmp_path / "c.yaml", configuration(data, tmp_path / "out", lr=1e30))
    assert main(["fit", "--config", config]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"rein: the loss is (nan|inf) at step \d\. Train with a smaller learning rate\.", line)


def test_a_short_run_is_validated_at_its_end(data, tmp_path):
    config = configuration(data, tmp_path / "short")
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 500}
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 0
    assert (tmp_path / "short/checkpoints/best.ckpt").exists()
    assert "loss" in (tmp_path / "short/logs/version_0/metrics.csv").read_text()


def test_predictions_keep_the_names_of_the_images(run, tmp_path):
    names = ["街", "道", "x y", "x-y", "sub/x", "sub-x"]
    for name in names:
        (tmp_path / "odd" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (90, 90, 90)).save(tmp_path / "odd" / f"{name}.png")
    arguments = ["predict", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "out"), "--data.predict"]
    assert main([*arguments, str(tmp_path / "odd")]) == 0  # with the state of the run, not of --out
    written = {path.relative_to(tmp_path / "out/predictions") for path in (tmp_path / "out/predictions").rglob("*.png")}
    assert written == {Path(f"{name}.png") for name in names}


def test_images_that_cannot_be_read_are_named_and_the_others_predicted(run, tmp_path, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        Image.new("RGB", (40, 32)).save(tmp_path / "in" / f"{name}.png")
    Image.new("I;16", (40, 32)).save(tmp_path / "in" / "c.png")
    (tmp_path / "in" / "d.jpg").write_bytes((tmp_path / "in" / "a.png").read_bytes()[:60])
    arguments = ["predict", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "out")]
    arguments += ["--ckpt_path", str(run / "checkpoints/last.ckpt"), "--data.predict"]
    assert main([*arguments, str(tmp_path / "in")]) == 1
    said = capsys.readouterr()
    assert f"2 of 4 predictions are in {tmp_path / 'out' / 'predictions'}" in said.out
    errors = [line for line in said.err.splitlines() if line.startswith("rein: no prediction: ")]
    assert len(errors) == 2
    assert "c.png has mode I;16" in errors[0]
    assert "d.jpg cannot be read as an image" in errors[1]
    found = {path.relative_to(tmp_path / "out/predictions").as_posix() for path in (tmp_path / "out/predictions").rglob("*.png")}
    assert found == {"a.png", "deep/b.png"}
    assert main([*arguments, str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_the_limit_of_the_evaluation_does_not_limit_predictions(run, data, tmp_path, capsys):
    arguments = ["predict", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "out"), "--data.limit", "2"]
    arguments += ["--ckpt_path", str(run / "checkpoints/last.ckpt"), "--data.predict", str(data / "dusk" / "images")]
    assert main(arguments) == 0
    assert f"6 of 6 predictions are in {tmp_path / 'out' / 'predictions'}" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "predictions").iterdir())) == 6


def test_predictions_are_replaced_only_on_demand(run, data, tmp_path, capsys):
    arguments = ["predict", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "out")]
    arguments += ["--ckpt_path", str(run / "checkpoints/last.ckpt"), "--data.predict", str(data / "dusk" / "images")]
    assert main(arguments) == 0
    kept = tmp_path / "out" / "predictions" / "000.png"
    kept.write_bytes(b"mine")
    assert main(arguments) == 2
    assert "6 of 6 predictions exist already, the first: " in capsys.readouterr().err
    assert kept.read_bytes() == b"mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert kept.read_bytes() != b"mine"


def test_a_prediction_never_replaces_an_input(run, tmp_path, capsys):
    path = tmp_path / "predictions" / "a.png"
    path.parent.mkdir()
    Image.new("RGB", (40, 32), (90, 90, 90)).save(path)
    before = path.read_bytes()
    arguments = ["predict", "--config", str(run / "config.yaml"), "--data.predict", str(path.parent), f"--out={tmp_path}"]
    assert main([*arguments, "--overwrite"]) == 2
    assert f"would replace the image {path}. Choose another --out" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main([*arguments[:-1], "--out"]) == 2
    assert "--out has no value" in capsys.readouterr().err


def test_a_checkpoint_with_values_that_are_not_finite_is_refused(run, tmp_path, capsys):
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    state["state_dict"]["segmenter.head.classifier.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.ckpt")
    assert main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", str(tmp_path / "nan.ckpt")]) == 2
    assert "values that are not finite in segmenter.head.classifier.weight" in capsys.readouterr().err


def test_a_key_that_stands_twice_in_a_configuration_is_refused(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: {backbone: test_vit}\nmodel: {head: LinearHead}\n")
    assert main(["fit", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "the key 'model' stands twice in one mapping" in capsys.readouterr().err


def test_an_error_of_a_loading_process_is_one_line(tmp_path, capsys):
    data = make_folder(tmp_path / "data", count=4)
    Image.fromarray(np.full((32, 48), 7, np.uint8)).save(data / "day/labels/001.png")
    config = configuration(data, tmp_path / "out")
    config["data"]["targets"] = config["data"]["targets"][:1]
    config["data"]["workers"] = 1
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"rein: {data / 'day/labels/001.png'} has label values [7]; expected 0 to 2")


def test_a_source_among_the_targets_is_marked_and_not_in_the_mean(run, data, tmp_path, capsys):
    config = configuration(data, run)
    config["data"]["targets"] = [domain(data, "day"), domain(data, "fog")]
    arguments = ["--ckpt_path", str(run / "checkpoints/last.ckpt"), "--out", str(tmp_path / "out")]
    assert main(["test", "--config", write(tmp_path / "c.yaml", config), *arguments]) == 0
    assert "day*" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out/test/results.json").read_text())["results"]
    assert result["mean_miou_of_unseen"] == result["miou"]["fog"]


def test_gradient_checkpointing_changes_memory_and_not_the_weights(run, data, tmp_path):
    config = configuration(data, tmp_path / "out", gradient_checkpointing=True)
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 0
    plain, recomputed = (weights(out / "checkpoints/last.ckpt")["state_dict"] for out in (run, tmp_path / "out"))
    assert all(torch.allclose(tensor, recomputed[name], atol=1e-4) for name, tensor in plain.items())


def test_a_run_in_bfloat16_keeps_its_weights_in_float32(data, tmp_path):
    config = configuration(data, tmp_path / "out")
    config["trainer"]["precision"] = "bf16-mixed"
    assert main(["fit", "--config", write(tmp_path / "c.yaml", config)]) == 0
    state = weights(tmp_path / "out/checkpoints/last.ckpt")["state_dict"]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in state.values())


class TestKilled:
    """After SIGKILL at any moment, the same command gives the same weights, bit for bit."""

    @pytest.fixture(scope="class")
    def config(self, data):
        head = {"channels": 64, "encoder_layers": 1, "decoder_layers": 1, "num_points": 32, "decoder_feedforward": 32}
        method = {"method_settings": {"num_tokens": 6, "rank": 2, "query_dim": 64}}
        schedules = {"ema": 0.9, "ema_from": 3, "final_weight_decay": 1e-3}
        config = configuration(data, "?", head="Mask2FormerHead", head_settings=head, **schedules, **method)
        config["trainer"] |= {"max_steps": 5, "accumulate_grad_batches": 2, "val_check_interval": 4, "gradient_clip_val": 1.0}
        return config

    @pytest.fixture(scope="class")
    def whole(self, config, tmp_path_factory):
        folder = tmp_path_factory.mktemp("whole")
        assert main(["fit", "--config", write(folder / "c.yaml", {**config, "out": str(folder / "out")})]) == 0
        return folder / "out"

    @pytest.mark.parametrize(
        ("when", "batches"),
        [
            pytest.param("on_train_batch_start", [1], marks=pytest.mark.sweep),
            ("on_train_batch_start", [9, 9]),  # and again with one gradient gathered since it went on from batch 8
            pytest.param("on_before_optimizer_step", [9], marks=pytest.mark.sweep),
            ("on_validation_batch_start", [7]),
        ],
    )
    def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(self, config, whole, tmp_path, when, batches):
        killed = {**config, "out": str(tmp_path / "out")}
        resumed = ["fit", "--config", write(tmp_path / "c.yaml", killed), "--ckpt_path", "last"]
        for batch in batches:
            callback = {"class_path": "dgss.killing.Kill", "init_args": {"when": when, "batch": batch}}
            killed["trainer"] = {**config["trainer"], "callbacks": [callback]}
            command = [sys.executable, "-m", "rein.cli", "fit", "--config", write(tmp_path / "k.yaml", killed)]
            # as many threads as here: sums over another number of them round differently
            paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*command, "--ckpt_path", "last"], env=environment, capture_output=True, text=True)
            assert done.returncode == -signal.SIGKILL, done.stderr
        assert main(resumed) == 0
        for name in ("last", "best"):
            one, other = (weights(out / "checkpoints" / f"{name}.ckpt") for out in (whole, tmp_path / "out"))
            assert one["global_step"] == other["global_step"]
            assert one["state_dict"].keys() == other["state_dict"].keys()
            for key, tensor in one["state_dict"].items():
                assert torch.equal(tensor, other["state_dict"][key]), key
            for key, tensor in one["rein"]["average"].items():
                assert torch.equal(tensor, other["rein"]["average"][key]), key


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("active", "active")])
def test_the_command_keeps_idle_threads_from_spinning_and_the_library_does_not(given, expected):
    program = """
import importlib.metadata, os, sys
entry = importlib.metadata.EntryPoint("rein", "_rein_command:main", "console_scripts").load()
assert "torch" not in sys.modules
import rein.cli
print(os.environ.get("OMP_WAIT_POLICY"))
rein.cli.main = lambda: print(os.environ["OMP_WAIT_POLICY"]) or 0
assert entry() == 0
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(given), expected]


def test_the_installed_command_is_that_entry_point():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="rein")
    assert {script.value for script in scripts} == {"_rein_command:main"}
