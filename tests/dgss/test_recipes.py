"""Every recipe: what it names exists, and it fits and judges at toy size on made-up trees in the publishers' layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import rein
from dgss import trees
from models import build
from rein import catalogue
from rein.cli import main
from rein.dgss import experiment, methods, recipes
from rein.dgss.datasets import ROWS

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning, TensorBoard and others warn of at such sizes

RECIPES = recipes.listed()
PAPER = [recipe for recipe in RECIPES if not recipe.name.startswith("own-")]
# the class of a recipe's backbone -> one of its family, small
TOYS = {"dinov2": "vit with registers", "clip": "clip", "mae": "vit", "samvit": "sam", "eva02": "eva02", "dinov3": "dinov3"}
STAGED = {"convnext": "test_convnext", "resnet": "test_resnet"}
HEADS = {
    "Mask2FormerHead": {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "num_points": 16,
        "decoder_feedforward": 16,
        "encoder_feedforward": 16,
    },
    "FPNHead": {"channels": 16, "tower_channels": 16},
}


def toy_backbone(name, pretrained, patch_size, *, img_size, weights, required):
    assert timm.is_model_pretrained(name)
    assert required
    for part, small in STAGED.items():
        if part in name:
            return timm.create_model(small, num_classes=0), False
    (family,) = {small for part, small in TOYS.items() if part in name}
    return build(family, **({} if family == "dinov3" else {"img_size": 32})), False


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All data sets side by side, two pairs of each split."""
    path = tmp_path_factory.mktemp("root") / "data"
    for name in ("gtav", "synthia", "urbansyn", "cityscapes", "bdd100k", "mapillary"):
        for split in ("train", "val"):
            if not ROWS[name].splits or split in ROWS[name].splits:
                trees.make(name, path / name, split=split, count=3, size=(48, 64))
    trees.make("acdc", path / "acdc", split="val", count=4, size=(48, 64))  # one for each condition
    (path / "cityscapes-c").symlink_to(path / "cityscapes")
    for domain in ("day", "night"):
        for number in range(2):
            label = np.zeros((48, 64), np.uint8)
            label[number : 20 + number, 10:30] = 1
            for folder, picture in (("images", np.repeat(label[:, :, None], 3, 2) * 90 + 50), ("labels", label)):
                (path / "mine" / domain / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path / "mine" / domain / folder / f"{number}.png")
    (path / "mine" / "index.json").write_text('{"classes": ["background", "crack"]}')
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_fits_one_step(recipe, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "make_backbone", toy_backbone)
    monkeypatch.chdir(root.parent)
    config = yaml.safe_load(recipe.path.read_text())
    head = config["model"].get("head", "Mask2FormerHead")
    settings = dict(config["model"].get("method_settings") or {})
    if config["model"]["method"].startswith("rein") and "query_dim" not in settings:
        settings["query_dim"] = 256
    toy = {
        "out": str(tmp_path / "out"),
        "model": {"head_settings": HEADS[head], "method_settings": settings},
        "data": {"root": str(root), "crop": 32, "held_out": len(config["data"]["sources"]), "batch_size": 1},
        "trainer": {
            "max_steps": 1,
            "val_check_interval": 1,
            "precision": "32-true",
            "logger": False,
            "enable_progress_bar": False,
        },
    }
    toy["trainer"] |= {"enable_model_summary": False, "accelerator": "cpu"}
    toy["model"] |= {"window": 32}
    toy["data"] |= {"workers": 0, "judged_edge": 32, "limit": 1}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy))
    assert main(["fit", "--config", recipe.name, "--config", str(path)]) == 0
    state = torch.load(tmp_path / "out/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 1
    assert state["rein"]["method"] == config["model"]["method"]
    if recipe.name in JUDGED:
        assert main(["test", "--config", recipe.name, "--config", str(path)]) == 0
        content = json.loads((tmp_path / "out/test/results.json").read_text())
        titles = [
            t.get("title") or " ".join([t["dataset"], *map(str, (t.get("options") or {}).values())])
            for t in config["data"]["targets"]
        ]
        assert list(content["results"][0]["miou"]) == titles
        published = config.get("published")
        assert content["published"] == (published and {"miou": {}, "mean": None, "note": "", **published})
        assert ("published: " in capsys.readouterr().out) == bool(published and published.keys() & {"miou", "mean"})


# one for each list of targets
JUDGED = {
    "gtav-synthia-urbansyn-dinov2-l-rein",
    "cityscapes-eva02-l-freeze",
    "cityscapes-acdc-1024-dinov2-l-rein",
    "cityscapes-c-dinov2-l-freeze",
    "own-binary",
}


@pytest.mark.parametrize("recipe", PAPER, ids=lambda recipe: recipe.name)
def test_a_recipe_says_what_it_is_and_aims_at(recipe):
    config = yaml.safe_load(recipe.path.read_text())
    assert " -> " in recipe.title
    assert config["out"] == f"runs/{recipe.name}"
    published = config["published"]
    assert published["source"]
    domains = [target["dataset"] for target in config["data"]["targets"]]
    assert set(published.get("miou", {})) <= set(domains)
    figures = [*published.get("miou", {}).values(), *([published["mean"]] if "mean" in published else [])]
    assert all(40 < figure < 85 for figure in figures) or "mae" in recipe.name
    if len(published.get("miou", {})) == len(domains) and "mean" in published:
        assert published["mean"] == pytest.approx(sum(published["miou"].values()) / len(domains), abs=0.11)
    assert set(domains) <= set(ROWS)


def test_the_recipes_cover_the_papers_tables():
    names = {recipe.name for recipe in RECIPES}
    backbones = ("clip-l", "mae-l", "sam-h", "eva02-l", "dinov2-s", "dinov2-b", "dinov2-l", "dinov3-l")
    assert {f"gtav-{backbone}-{method}" for backbone in backbones for method in ("full", "freeze", "rein")} <= names
    assert {
        f"gtav-dinov2-l-{method}" for method in ("lora", "vpt", "adaptformer", "rein-core", "rein-link", "rein-share")
    } <= names
    assert {f"gtav-{backbone}-rein" for backbone in ("convnext-l", "resnet-50", "resnet-101")} <= names


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gtav-dinov2-l-rein", 2_990_081),
        ("gtav-dinov2-s-rein", 684_033),
        ("gtav-dinov2-b-rein", 1_741_569),
        ("gtav-sam-h-rein", 4_510_721),
        ("gtav-dinov2-l-rein-core", 52_838_400),
        ("gtav-dinov2-l-rein-link", 59_332_864),
        ("gtav-dinov2-l-rein-share", 5_016_065),
        ("gtav-dinov2-l-rein-rank64", 4_284_929),
        ("gtav-dinov2-l-rein-tokens200", 3_028_481),
        ("gtav-dinov2-l-lora", 786_432),
        ("gtav-dinov2-l-vpt", 3_686_400),
        ("gtav-eva02-l-adaptformer", 3_171_840),
        ("gtav-dinov2-l-freeze", 0),
    ],
)
def test_a_recipe_trains_as_many_parameters_as_published(name, count):
    model = yaml.safe_load(recipes.find(name).path.read_text())["model"]
    with torch.device("meta"):
        backbone = catalogue.build_on_meta(model["backbone"])
        methods.apply(model["method"], backbone, **(model.get("method_settings") or {}))
    assert sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad) == count


def test_recipes_are_listed_and_printed(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(RECIPES) + 1
    assert main(["recipes", "gtav-dinov2-l-rein"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["method"] == "rein"
    assert main(["recipes", "gtav-dinov2-l-rain"]) == 2
    assert "near it are gtav-" in capsys.readouterr().err
    assert main(["fit", "--config", "gtav-dinov2"]) == 2
    assert "there is no recipe 'gtav-dinov2'" in capsys.readouterr().err


def test_recipes_are_in_the_package():
    assert all(Path(recipe.path).is_relative_to(Path(rein.__file__).parent) for recipe in RECIPES)
