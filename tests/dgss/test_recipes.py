"""Recipes: their content, how `bases` are merged, and that each one can be parsed, built, fitted and evaluated at toy size.

The ordinary run fits a few recipes that together cover every method, head, backbone family and list of domains; `-m sweep` fits all.
"""

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
from rein.backbones.creation import POCKET, make_backbone
from rein.cli import main
from rein.dgss import commands, methods, recipes
from rein.dgss.data.datamodule import Domain, DomainData
from rein.dgss.data.datasets import DATASETS
from rein.dgss.training import experiment
from rein.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning, TensorBoard and others warn of at such sizes

RECIPES = recipes.listed()
CONFIGS = {recipe.name: recipes.resolve(recipe.name) for recipe in RECIPES}
PAPER = [recipe for recipe in RECIPES if not recipe.name.startswith(("own-", "streets-"))]
# part of a backbone's name -> a small model of its family
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
    "LinearHead": {},
}
# one for each list of targets: fitted and evaluated in the ordinary run
EVALUATED = (
    "gtav-synthia-urbansyn-dinov2-l-rein",
    "cityscapes-eva02-l-freeze",
    "cityscapes-acdc-1024-dinov2-l-rein",
    "cityscapes-c-dinov2-l-freeze",
    "own-binary",
    "streets-rein",
)


def toy_backbone(name, pretrained, patch_size, **settings):
    if name == POCKET:
        return make_backbone(name, pretrained, patch_size, **settings)
    assert timm.is_model_pretrained(name)
    for part, small in STAGED.items():
        if part in name:
            return timm.create_model(small, num_classes=0)
    (family,) = {small for part, small in TOYS.items() if part in name}
    return build(family, **({} if family == "dinov3" else {"img_size": 32}))


def toy_settings(config):
    """Settings of model and method with which a toy backbone and a small head are built."""
    model = config["model"]
    settings = dict(model.get("method_settings") or {})
    if model["method"].startswith("rein") and "query_dim" not in settings:
        settings["query_dim"] = 256
    return {"head_settings": HEADS[model.get("head", "Mask2FormerHead")], "method_settings": settings}


def covered(config):
    """What a fit of this recipe exercises."""
    model, data = config["model"], config["data"]
    parts = [part for part in (*TOYS, *STAGED, POCKET) if part in model["backbone"]]
    return {
        ("method", model["method"], bool((model.get("method_settings") or {}).get("dora"))),
        ("head", model.get("head", "Mask2FormerHead")),
        *(("backbone", part) for part in parts),
        *((role, json.dumps(data.get(role))) for role in ("sources", "targets", "validation")),
    }


def representatives():
    """`EVALUATED`, and as few other recipes as a greedy choice needs to cover what all recipes cover."""
    chosen = list(EVALUATED)
    missing = set().union(*map(covered, CONFIGS.values())) - set().union(*(covered(CONFIGS[name]) for name in chosen))
    while missing:
        chosen.append(max(CONFIGS, key=lambda name: len(covered(CONFIGS[name]) & missing)))
        missing -= covered(CONFIGS[chosen[-1]])
    return chosen


REPRESENTATIVES = representatives()


def titles(domains):
    return [
        domain.get("title") or " ".join([domain["dataset"], *map(str, (domain.get("options") or {}).values())])
        for domain in domains
    ]


def contains(actual, expected):
    """Whether `actual` has every setting of `expected`; mappings of `actual` may have more."""
    if isinstance(expected, dict):
        return isinstance(actual, dict) and all(key in actual and contains(actual[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return isinstance(actual, (list, tuple)) and len(actual) == len(expected) and all(map(contains, actual, expected))
    return actual == expected


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All data sets in one folder, with few pairs of each split."""
    path = tmp_path_factory.mktemp("root") / "data"
    for name in ("gtav", "synthia", "urbansyn", "cityscapes", "bdd100k", "mapillary"):
        for split in ("train", "val"):
            if not DATASETS[name].splits or split in DATASETS[name].splits:
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


@pytest.fixture(scope="module")
def parser():
    """The parser of the four commands, built once."""

    class Parsed(Exception):  # noqa: N818
        pass

    def stop(cli):
        raise Parsed(cli.parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands.ReinCLI, "instantiate_classes", stop)
        with pytest.raises(Parsed) as caught:
            commands.run(["fit", "--config", "streets-rein"])
    return caught.value.args[0]


@pytest.fixture
def at_root(root, monkeypatch):
    """The working directory holds the data sets in `data`, and backbones are small models of their families."""
    monkeypatch.setattr(experiment, "make_backbone", toy_backbone)
    monkeypatch.chdir(root.parent)


@pytest.mark.parametrize("recipe", CONFIGS)
def test_the_command_line_takes_every_setting_of_a_recipe(recipe, parser):
    parsed = parser.parse_args(recipes.resolved(["fit", "--config", recipe]))
    assert contains(parsed["fit"].as_dict(), CONFIGS[recipe])


def names_of(key, exclude=()):
    """One recipe for each value of `key(config)`, without the values of the recipes to exclude."""
    found = {json.dumps(key(config)): name for name, config in CONFIGS.items()}
    for name in exclude:
        found.pop(json.dumps(key(CONFIGS[name])), None)
    return sorted(found.values())


@pytest.mark.parametrize("recipe", names_of(lambda config: config["data"]))
def test_the_domains_of_a_recipe_can_be_opened(recipe, root, at_root):
    config = CONFIGS[recipe]["data"]
    settings = {key: value for key, value in config.items() if key not in ("sources", "targets", "validation")}
    domains = {key: [Domain(**domain) for domain in config.get(key, [])] for key in ("sources", "targets", "validation")}
    data = DomainData(str(root), **domains, **settings)
    assert [domain.name for domain in data.targets] == titles(config["targets"])
    for key, split in (("sources", "train"), ("targets", "val"), ("validation", "val")):
        assert all(len(domain.open(root, split)) for domain in domains[key])


def toy_model(config):
    """What decides which toy model is built."""
    model = config["model"]
    part = next(part for part in (*TOYS, *STAGED, POCKET) if part in model["backbone"])
    return [part, *(model.get(key) for key in ("method", "method_settings", "head"))]


@pytest.mark.parametrize("recipe", names_of(toy_model, REPRESENTATIVES))  # fits build the models of the others
def test_the_model_of_a_recipe_can_be_built(recipe, at_root):
    config = CONFIGS[recipe]
    model = experiment.Experiment(3, **config["model"] | toy_settings(config))
    assert model.method == config["model"]["method"]
    assert (model.tuned_parameters > 0) == (config["model"]["method"] != "freeze")


def fit(recipe, root, tmp_path, **data):
    """Fit a recipe for one step at toy size; returns its configuration and the run's folder."""
    config, out = CONFIGS[recipe], tmp_path / "out"
    toy = {
        "out": str(out),
        "model": {**toy_settings(config), "window": 32, "stride": 21},
        "data": {
            "root": str(root),
            "crop": 32,
            "held_out": min(len(config["data"]["sources"]), config["data"].get("held_out", 100)),
            "batch_size": 1,
            "workers": 0,
            "eval_edge": 32,
            "limit": 1,
            **data,
        },
        "trainer": {
            "max_steps": 1,
            "val_check_interval": 1,
            "precision": "32-true",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        },
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy))
    assert main(["fit", "--config", recipe, "--config", str(path)]) == 0
    state = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 1
    assert state["rein"]["method"] == config["model"]["method"]
    saved = yaml.safe_load((out / "config.yaml").read_text())
    for section in ("model", "data", "trainer"):
        assert contains(saved[section], config[section] | toy[section])
    return config, out


def evaluate(config, out, targets, capsys):
    """Evaluate a run from the configuration that its fit saved."""
    assert main(["test", "--config", str(out / "config.yaml")]) == 0
    content = json.loads((out / "test/results.json").read_text())
    assert list(content["results"][0]["miou"]) == titles(targets)
    published = config.get("published")
    assert content["published"] == (published and {"miou": {}, "mean": None, "note": "", **published})
    assert ("published, for the settings of the recipe: " in capsys.readouterr().out) == bool(
        published and published.keys() & {"miou", "mean"}
    )


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.sweep) for name in CONFIGS]
)
def test_a_recipe_fits_one_step(recipe, root, at_root, tmp_path, capsys):
    targets = CONFIGS[recipe]["data"]["targets"]
    if len(targets) > 9:
        targets = targets[::17]  # corruptions at all severities, without glass blur, which takes a second
    config, out = fit(recipe, root, tmp_path, targets=targets)
    if recipe in EVALUATED:
        evaluate(config, out, targets, capsys)


@pytest.mark.sweep
def test_a_recipe_is_evaluated_on_every_corruption(root, at_root, tmp_path, capsys):
    config, out = fit("cityscapes-c-dinov2-l-freeze", root, tmp_path)
    assert len(config["data"]["targets"]) == 75
    evaluate(config, out, config["data"]["targets"], capsys)


def test_every_list_of_targets_is_evaluated():
    def datasets(name):
        return [domain["dataset"] for domain in CONFIGS[name]["data"]["targets"]]

    evaluated = [datasets(name) for name in EVALUATED]
    assert all(datasets(name) in evaluated for name in CONFIGS)


@pytest.mark.parametrize("recipe", PAPER, ids=lambda recipe: recipe.name)
def test_a_recipe_states_its_title_and_published_figures(recipe):
    config = CONFIGS[recipe.name]
    assert " -> " in recipe.title
    assert config["out"] == f"runs/{recipe.name}"
    published = config["published"]
    assert published["source"]
    assert not (published["source"].startswith("none") and published.keys() & {"miou", "mean"})
    domains = [target["dataset"] for target in config["data"]["targets"]]
    assert set(published.get("miou", {})) <= set(domains)
    figures = [*published.get("miou", {}).values(), *([published["mean"]] if "mean" in published else [])]
    assert all(40 < figure < 85 for figure in figures) or "mae" in recipe.name
    assert all(str(figure) in recipe.published for figure in (figures if "mean" not in published else figures[-1:]))
    if len(published.get("miou", {})) == len(domains) and "mean" in published:
        assert published["mean"] == pytest.approx(sum(published["miou"].values()) / len(domains), abs=0.11)
    assert set(domains) <= set(DATASETS)


@pytest.mark.parametrize("recipe", [r for r in PAPER if "soma" not in r.name], ids=lambda recipe: recipe.name)
def test_a_recipe_has_the_protocol_of_the_published_figures(recipe):
    """SoMA's recipes have schedules of their own."""
    config = CONFIGS[recipe.name]
    model, data, trainer = config["model"], config["data"], config["trainer"]
    assert data["held_out"] == 0
    assert "state" not in config
    assert "max_steps" not in trainer  # 40,000, as the default
    assert "eval_edge" not in data
    schedule = [model.get(key) for key in ("lr", "warmup_steps", "warmup_factor")]
    setting = data["crop"], model["window"], model["stride"], data["protocol"], data.get("batch_size", 4), schedule
    if "-1024-" in recipe.name or recipe.name.startswith("cityscapes-c-"):
        assert setting == (1024, 1024, 683, "rein-1024", 8, [6e-5, 10_000, 1e-6])
    else:
        assert setting == (512, 512, 341, "rein", 4, [None, None, None])  # 1e-4 and no warm-up, as the defaults


def test_the_defaults_are_those_of_the_published_settings_with_crops_of_512(parser):
    plain = parser.parse_args(["fit", "--config", "data: {sources: [{dataset: gtav}]}"])["fit"]
    assert (plain.trainer.max_steps, plain.trainer.accumulate_grad_batches) == (40_000, 1)
    model, data = plain.model, plain.data
    assert (model.lr, model.weight_decay, model.power, model.warmup_steps, model.ema) == (1e-4, 0.05, 0.9, 0, None)
    assert (data.batch_size, data.crop, tuple(data.scales), data.max_share, data.photometric) == (4, 512, (0.5, 2.0), 0.75, True)


def test_the_recipes_cover_the_papers_tables():
    names = {recipe.name for recipe in RECIPES}
    backbones = ("clip-l", "mae-l", "sam-h", "eva02-l", "dinov2-s", "dinov2-b", "dinov2-l", "dinov3-l")
    assert {f"gtav-{backbone}-{method}" for backbone in backbones for method in ("full", "freeze", "rein")} <= names
    assert {
        f"gtav-dinov2-l-{method}" for method in ("lora", "vpt", "adaptformer", "rein-core", "rein-link", "rein-share")
    } <= names
    assert {f"gtav-{backbone}-rein" for backbone in ("convnext-l", "resnet-50", "resnet-101")} <= names
    assert {f"{source}-dinov3-7b-rein" for source in ("gtav", "gtav-synthia-urbansyn")} <= names
    assert "gtav-synthia-urbansyn-dinov3-l-rein" in names


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
        ("gtav-dinov2-l-dora", 786_432 + 24 * 2 * 1024),
        ("gtav-dinov2-l-soma", 4_718_592),
        ("gtav-dinov2-l-vpt", 3_686_400),
        ("gtav-eva02-l-adaptformer", 3_171_840),
        ("gtav-dinov2-l-freeze", 0),
    ],
)
def test_a_recipe_trains_as_many_parameters_as_published(name, count):
    model = CONFIGS[name]["model"]
    with torch.device("meta"):
        backbone = catalogue.build_on_meta(model["backbone"])
        methods.apply(model["method"], backbone, **(model.get("method_settings") or {}))
    assert sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad) == count


SCHEDULE = {"final_weight_decay": 1e-5, "ema": 0.9998, "ema_from": 12_000}


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("gtav-dinov2-l-soma", SCHEDULE),
        ("gtav-synthia-dinov2-l-soma", {"final_weight_decay": 1e-5}),
        ("gtav-synthia-urbansyn-dinov2-l-soma", {"final_weight_decay": 1e-5}),
        ("cityscapes-dinov2-l-soma", {**SCHEDULE, "ema_from": 20_000, "warmup_steps": 1500, "warmup_factor": 0.01}),
        (
            "cityscapes-acdc-1024-dinov2-l-soma",
            {**SCHEDULE, "ema_from": 20_000, "warmup_steps": 10_000, "warmup_factor": 1e-6, "lr": 6e-5},
        ),
    ],
)
def test_the_recipes_of_soma_have_its_published_settings(name, schedule):
    model = CONFIGS[name]["model"]
    defaults = {"method_settings": None, "lr": None, "weight_decay": None, "head": None}  # as in Rein's recipes
    expected = {**defaults, "method": "soma", "adapter_factor": 0.5, **schedule}
    settings = {*expected, "ema", "ema_from", "warmup_steps", "warmup_factor", "final_weight_decay"}
    assert {key: model.get(key) for key in settings} == {key: expected.get(key) for key in settings}
    assert CONFIGS[name]["data"].get("batch_size", 4) == (8 if name.startswith("cityscapes") else 4)
    assert methods.METHODS["soma"].settings == {"rank": 16, "blocks": None}


@pytest.mark.parametrize("method", ["rein", "lora", "dora"])
def test_a_method_with_somas_schedule_differs_in_the_schedule_only(method):
    plain, scheduled = (json.loads(json.dumps(CONFIGS[f"gtav-dinov2-l-{method}{end}"])) for end in ("", "-soma-schedule"))
    assert scheduled["model"] == {**plain["model"], **SCHEDULE}
    assert {**scheduled["data"], **scheduled["trainer"]} == {**plain["data"], **plain["trainer"]}
    soma = CONFIGS["gtav-dinov2-l-soma"]
    assert CONFIGS["gtav-dinov2-l-soma-rein-schedule"]["model"] == {
        key: value for key, value in soma["model"].items() if key not in SCHEDULE
    }
    assert scheduled["data"] == soma["data"]


def test_the_recipes_for_generated_streets_differ_in_the_method_only():
    configs = [CONFIGS[f"streets-{method}"] for method in ("frozen", "full", "rein")]
    assert [config["model"].pop("method") for config in map(json.loads, map(json.dumps, configs))] == [
        "freeze",
        "full",
        "rein",
    ]
    for section in ("data", "trainer", "state", "checkpoint_every"):
        assert all(config[section] == configs[0][section] for config in configs)
    rates = [
        (config["model"]["lr"], *(config["model"].get(f"{name}_factor") for name in ("adapter", "backbone")))
        for config in configs
    ]
    assert rates == [(0.03, None, None), (0.03, None, pytest.approx(1 / 30)), (0.03, pytest.approx(1 / 3), None)]
    assert titles(configs[0]["data"]["targets"]) == ["day", "fog", "night", "rain", "snow"]


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(RECIPES) + 1
    (line,) = [line for line in lines if line.startswith("gtav-dinov2-l-rein ")]
    assert line.endswith("DINOv2-L, Rein -- published: mean 64.3 (Wei et al., CVPR 2024, table 2)")


def test_a_printed_recipe_is_a_complete_configuration_file(parser, tmp_path, capsys):
    assert main(["recipes", "gtav-synthia-dinov2-l-rein"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "# GTAV + SYNTHIA -> Cityscapes, BDD100K, Mapillary: DINOv2-L, Rein\nout: runs/gtav-synthia-dinov2-l-rein\n"
    )
    assert "    - {dataset: synthia}\n" in text
    assert yaml.safe_load(text) == CONFIGS["gtav-synthia-dinov2-l-rein"]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert main(["recipes", str(path)]) == 0
    assert capsys.readouterr().out == text
    arguments = ["fit", "--config", str(path)]
    assert recipes.resolved(arguments) == arguments
    by_name = parser.parse_args(recipes.resolved(["fit", "--config", "gtav-synthia-dinov2-l-rein"]))
    assert parser.dump(parser.parse_args(arguments)) == parser.dump(by_name)


def test_similar_names_are_given_for_a_recipe_that_does_not_exist(capsys):
    assert main(["recipes", "gtav-dinov2-l-rain"]) == 2
    assert "There is no recipe 'gtav-dinov2-l-rain'" in (message := capsys.readouterr().err)
    assert "Similar names: gtav-dinov2-l-rein, " in message
    assert main(["fit", "--config", "gtav-dinov2"]) == 2
    assert "There is no recipe 'gtav-dinov2'" in (message := capsys.readouterr().err)
    assert "Similar names: gtav-dinov2-b-freeze, gtav-dinov2-b-full, " in message
    assert main(["recipes", "xyz"]) == 2
    assert "Similar" not in capsys.readouterr().err


def test_recipes_are_in_the_package():
    assert all(Path(recipe.path).is_relative_to(Path(rein.__file__).parent) for recipe in RECIPES)


def test_bases_have_names_of_their_own_and_all_are_used():
    bases = {path.stem for path in recipes.BASES.glob("*.yaml")}
    assert not bases & CONFIGS.keys()
    files = [*recipes.BASES.glob("*.yaml"), *(recipe.path for recipe in RECIPES)]
    assert all(path.read_text().startswith("# ") for path in files)
    used = {name for path in files for name in yaml.safe_load(path.read_text()).get("bases", [])}
    assert bases <= used <= bases | CONFIGS.keys()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Empty folders of recipes and bases. Returns a function that writes files: `NAME` is a recipe, `bases_NAME` is a base."""
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    monkeypatch.setattr(recipes, "BASES", tmp_path / "bases")
    recipes.BASES.mkdir()

    def write(**texts):
        for name, text in texts.items():
            (recipes.FOLDER / f"{name.replace('_', '/')}.yaml").write_text(text)

    return write


def test_bases_are_merged_in_order_and_the_recipes_settings_come_last(folder):
    folder(
        bases_first="model: {lr: 1, ema: 1, method_settings: {rank: 1, query_dim: 1}}\ndata: {sources: [a, b], crop: 1}",
        bases_second="bases: [third]\nmodel: {ema: 2}\ndata: {sources: [c]}",
        bases_third="model: {ema: 3, head: three}",
        parent="bases: [first]\nmodel: {window: 4}",
        recipe="# Title\nbases: [parent, second]\nmodel: {method_settings: {rank: null}, lr: 5}\ndata: {crop: null}",
        other="out: elsewhere\npublished: {mean: 1.0}",
        changed="bases: [other]\nmodel: {lr: 6}",
    )
    assert recipes.resolve("recipe") == {
        "out": "runs/recipe",
        "model": {"lr": 5, "ema": 2, "method_settings": {"rank": None, "query_dim": 1}, "head": "three", "window": 4},
        "data": {"sources": ["c"], "crop": None},
    }
    assert recipes.resolve("other") == {"out": "elsewhere", "published": {"mean": 1.0}}
    assert recipes.resolve("changed") == {"out": "elsewhere", "model": {"lr": 6}}  # the figure is of the base's settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bases: [loop]", "`bases` has a cycle: loop -> back -> loop. .* Remove one"),
        ("bases: [gtaw]", "'gtaw', which does not exist. Expected the name of a recipe .* Similar names: gtav"),
        ("bases: gtav", "`bases` of .*mine.yaml is 'gtav'. Expected a list of names .* Write it as"),
        ("bases: [{gtav: 1}]", r"`bases` of .*mine.yaml is \[{'gtav': 1}\]. Expected a list of names"),
        ("bases:", "`bases` of .*mine.yaml is None. Expected a list of names"),
        ("bases: [empty]", "empty.yaml contains NoneType. Expected a mapping. Write settings as"),
        ("- 1", "mine.yaml contains list. Expected a mapping"),
        ("bases: [", "mine.yaml cannot be read: while parsing .* Expected a YAML file. Check"),
    ],
)
def test_bases_that_cannot_be_merged_are_refused(folder, text, message):
    folder(loop="bases: [back]", bases_back="bases: [loop]", bases_gtav="model: {lr: 1}", bases_empty="")
    (path := recipes.FOLDER / "bases" / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        recipes.resolve(path)


def test_a_configuration_file_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="nowhere.yaml cannot be read: .* Expected a YAML file"):
        recipes.resolve("nowhere.yaml")


def test_a_users_file_may_have_recipes_and_bases_as_bases(parser, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# Mine\nbases: [gtav-dinov2-l-rein, cityscapes-acdc]\nmodel: {lr: 1e-3}\ntrainer: {max_steps: 7}\n")
    config, base = recipes.resolve(path), CONFIGS["gtav-dinov2-l-rein"]
    assert config["out"] == "runs/mine"
    assert config["data"] == CONFIGS["cityscapes-acdc-512-dinov2-l-rein"]["data"]
    (arguments,) = {tuple(recipes.resolved(["fit", option, str(path)])[2:]) for option in ("-c", "--config")}
    assert arguments[0].startswith("# Mine\nout: runs/mine\n")
    parsed = parser.parse_args(["fit", "--config", *arguments])["fit"].as_dict()
    assert contains(parsed, {"model": base["model"] | {"lr": 0.001}, "trainer": base["trainer"] | {"max_steps": 7}})


def test_arguments_other_than_recipes_and_files_with_bases_are_kept(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text("model: {lr: 1}")
    (broken := tmp_path / "broken.yaml").write_text("bases: [")
    text = recipes.to_yaml({"model": {"lr": 1.0}, "data": {"sources": [{"dataset": "gtav"}]}}, "")
    for value in (str(broken), "nowhere.yaml"):
        with pytest.raises(InputError, match="cannot be read"):
            recipes.resolved(["fit", "--config", value])
    for value in (str(path), text, "model: {lr: 1}"):
        for arguments in (
            ["fit", "--config", value],
            ["fit", f"--config={value}", "--out", "streets-rein"],
            ["test", "-c", value],
        ):
            assert recipes.resolved(arguments) == arguments
    assert recipes.resolved(["fit", "--config"]) == ["fit", "--config"]
    resolved = recipes.resolved(["fit", "--config=streets-rein", "--config", str(path)])
    assert resolved[1].startswith("--config=# Generated streets")
    assert resolved[2:] == ["--config", str(path)]
