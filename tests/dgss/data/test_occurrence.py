"""A class that never occurs in the source is refused before training, and never part of a score."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from dgss import trees
from dgss.folders import make_folder
from rein.cli import main
from rein.dgss.data.datamodule import Domain, DomainData
from rein.dgss.data.datasets.files import Files
from rein.dgss.data.sampling import coarse_first
from rein.errors import InputError

NEVER = r"the class 'crack' never occurs in the \d labels of the source 'day', and 9.4 % of their pixels are ignored; expected "
REMEDY = (
    r"pixels of every class. .*option values \(masks of 0 and 255 need values: \[0, 255\]\).*data.allow_absent_classes to true"
)


def make_masks(root, domains=("day", "night"), count=6):
    """Masks of 0 and 255."""
    for domain in domains:
        for folder in ("images", "labels"):
            (root / domain / folder).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((32, 48), np.uint8)
            mask[5 + number : 14 + number, 10:26] = 255
            Image.fromarray(np.repeat(mask[:, :, None] // 2 + 60, 3, 2)).save(root / domain / "images" / f"{number}.png")
            Image.fromarray(mask).save(root / domain / "labels" / f"{number}.png")
    (root / "index.json").write_text(json.dumps({"classes": ["background", "crack"]}))
    return root


def domain(root, name, **options):
    return Domain("folder", str(root), name, name, options)


def opened(sources, targets=(), **settings):
    """A data module with a trainer, as the commands use it."""
    data = DomainData(sources=sources, targets=targets, **{"held_out": 2, "workers": 0, **settings})
    data.trainer = SimpleNamespace(max_steps=3, accumulate_grad_batches=1, global_rank=0, world_size=1)
    return data


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 100])
def test_the_coarse_order_has_every_index_once_and_begins_evenly_spaced(count):
    order = coarse_first(count)
    assert sorted(order) == list(range(count))
    if count == 100:
        assert order[:4] == [0, 64, 32, 96]
        assert np.diff(sorted(order[:13])).max() <= 8


def test_training_and_evaluation_refuse_a_class_that_never_occurs_in_the_source(tmp_path):
    root = make_masks(tmp_path)
    for method in ("train_dataloader", "test_dataloader"):
        with pytest.raises(InputError, match=NEVER + REMEDY):
            getattr(opened([domain(root, "day")], [domain(root, "night")]), method)()
    with pytest.raises(InputError, match="2 other pairs are held out and do not train; data.held_out sets their number"):
        opened([domain(root, "day")]).train_dataloader()
    with pytest.raises(InputError, match=r"\(--allow-absent-classes for rein data check and rein demo\)\.$"):
        opened([domain(root, "day")], held_out=0).train_dataloader()


def test_the_option_that_maps_values_is_the_remedy(tmp_path):
    root = make_masks(tmp_path)
    day, night = (domain(root, name, values=[0, 255]) for name in ("day", "night"))
    data = opened([day], [night])
    data.train_dataloader()
    data.test_dataloader()
    (root / "index.json").write_text(json.dumps({"classes": ["background", "crack"], "values": [0, 255]}))
    opened([domain(root, "day")]).train_dataloader()


def test_absent_classes_may_be_allowed_but_not_in_the_validation_pairs(tmp_path):
    root = make_folder(tmp_path)
    names = ["sky", "ground", "thing", "unicorn"]
    day, dusk = (domain(root, name, classes=names) for name in ("day", "dusk"))
    with pytest.raises(InputError, match=r"the class 'unicorn' never occurs .*; expected pixels of every class"):
        opened([day], [dusk]).train_dataloader()
    data = opened([day], [dusk], allow_absent_classes=True)
    data.train_dataloader()
    data.test_dataloader()
    for number in (2, 3):
        Image.fromarray(np.zeros((32, 48), np.uint8)).save(root / "day" / "labels" / f"00{number}.png")
    with pytest.raises(
        InputError, match=r"the 2 labels of the source validation pairs have pixels of 1 of 4 classes; expected two or more"
    ):
        data.train_dataloader()


def test_only_training_pairs_count_and_all_sources_together(tmp_path):
    root = make_folder(tmp_path)
    for number in range(2):  # the pairs that train
        Image.fromarray(np.full((32, 48), number, np.uint8)).save(root / "day" / "labels" / f"00{number}.png")
    with pytest.raises(InputError, match="the class 'thing' never occurs in the 2 labels of the source 'day'"):
        opened([domain(root, "day")]).train_dataloader()
    opened([domain(root, "day"), domain(root, "dusk")]).train_dataloader()


def test_reading_stops_as_soon_as_every_class_was_seen(tmp_path, monkeypatch):
    root = make_folder(tmp_path, count=40)
    read, real = [], Files.read_label
    monkeypatch.setattr(Files, "read_label", lambda self, index: read.append(index) or real(self, index))
    monkeypatch.setattr(Files, "read_image", None)
    opened([domain(root, "day")]).train_dataloader()
    assert read == [0, 38]  # one of the training pairs, one of the validation pairs


def test_published_data_sets_are_not_read_and_their_classes_count(tmp_path, monkeypatch):
    """SYNTHIA has no terrain, truck and train, so that another source must have them."""
    trees.make("synthia", tmp_path / "synthia")
    monkeypatch.setattr(Files, "read_label", None)
    opened([Domain("synthia", str(tmp_path / "synthia"))], held_out=1).train_dataloader()
    monkeypatch.undo()
    names = list(open_space().names)
    root = make_folder(tmp_path / "mine", domains=("day",), index=False)
    mine = Domain("folder", str(root), "day", "mine", {"classes": names})
    label = np.tile(np.array([9, 14, 16, 255], np.uint8), (32, 12))
    for path in (root / "day" / "labels").iterdir():
        Image.fromarray(label).save(path)
    data = opened([Domain("synthia", str(tmp_path / "synthia")), mine])
    data.train_dataloader()
    label[label == 16] = 0
    for path in (root / "day" / "labels").iterdir():
        Image.fromarray(label).save(path)
    with pytest.raises(InputError, match="the class 'train' never occurs in the 3 labels of the source 'mine'"):
        data.train_dataloader()


def open_space():
    return DomainData(sources=[Domain("scenes", options={"count": 1})]).space


def test_an_evaluation_says_nothing_about_sources_that_are_not_on_this_machine(tmp_path):
    root = make_masks(tmp_path / "here")
    day, night = domain(tmp_path / "away", "day", classes=["background", "crack"]), domain(root, "night")
    opened([day], [night]).test_dataloader()
    shutil.copytree(root, tmp_path / "away")
    with pytest.raises(InputError, match=NEVER):
        opened([day], [night]).test_dataloader()
    for path in (tmp_path / "away" / "day" / "labels").iterdir():
        path.write_bytes(b"damaged")
    opened([day], [night]).test_dataloader()


def configuration(path, sources, targets, **data):
    """A small run of a frozen backbone; returns the path of its configuration."""
    entries = {
        "sources": [{"dataset": "folder", **source} for source in sources],
        "targets": [{"dataset": "folder", **target} for target in targets],
    }
    config = {
        "out": str(path / "out"),
        "model": {
            "backbone": "test_vit",
            "pretrained": False,
            "patch_size": 8,
            "method": "freeze",
            "head": "LinearHead",
            "window": 32,
        },
        "data": entries | {"held_out": 2, "crop": 32, "batch_size": 2, "workers": 0, **data},
        "trainer": {"max_steps": 2, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    (path / "c.yaml").write_text(yaml.safe_dump(config))
    return str(path / "c.yaml")


@pytest.mark.filterwarnings("ignore")  # what Lightning, TensorBoard and others warn of at such sizes
def test_the_commands_refuse_masks_of_0_and_255(tmp_path, capsys):
    root = make_masks(tmp_path / "data")
    day, night = ({"path": str(root), "split": name, "title": name} for name in ("day", "night"))
    assert main(["fit", "--config", configuration(tmp_path, [day], [night])]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rein: the class 'crack' never occurs in the 4 labels of the source 'day'")
    check = ["data", "check", "folder", str(root), "--split", "day"]
    assert main(check) == 2
    checked = capsys.readouterr().err
    remark = " 2 other pairs are held out and do not train; data.held_out sets their number."
    assert said.partition("; ")[2] == checked.partition("; ")[2].strip() + remark
    assert main([*check, "--allow-absent-classes"]) == 0
    assert main([*check, "--limit", "2"]) == 0  # absence is known only after all labels
    assert "classes without pixels, of 2 labels that were read: crack" in capsys.readouterr().out
    assert main([*check, "--option", "values=0,255"]) == 0


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_allows_absent_classes_is_evaluated_without_a_mean_of_one_class(tmp_path, capsys):
    root = make_folder(tmp_path / "data", domains=("day", "dusk", "blank"))
    for path in (root / "blank" / "labels").iterdir():
        Image.fromarray(np.zeros((32, 48), np.uint8)).save(path)
    options = {"classes": ["sky", "ground", "thing", "unicorn"]}
    day, dusk, blank = (
        {"path": str(root), "split": name, "title": name, "options": options} for name in ("day", "dusk", "blank")
    )
    config = configuration(tmp_path, [day], [day, dusk, blank], allow_absent_classes=True)
    assert main(["fit", "--config", config, "--model.lr", "0.01"]) == 0
    saved = str(tmp_path / "out" / "config.yaml")
    assert main(["test", "--config", saved]) == 0
    said = capsys.readouterr().out
    assert "blank: no mean IoU, because fewer than two classes are labelled" in said
    assert "* day: source\nmean of unseen: dusk\n" in said
    assert "dusk: mean over 3 of 4 classes" in said
    stored = json.loads((tmp_path / "out" / "test" / "results.json").read_text())
    assert stored["roles"] == {"day": "source", "dusk": "unseen", "blank": "unseen"}
    assert stored["unseen"] == ["dusk"]
    (result,) = stored["results"]
    assert result["miou"]["blank"] is None
    assert result["mean_miou_of_unseen"] == result["miou"]["dusk"]
    assert main(["test", "--config", saved, "--data.allow_absent_classes", "false"]) == 2
    assert "the class 'unicorn' never occurs" in capsys.readouterr().err
