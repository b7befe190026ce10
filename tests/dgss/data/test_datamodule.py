"""Domains of an experiment: their classes, and which of them training has not seen."""

import json

import pytest

from dgss.folders import make_folder
from rein.dgss.data.datamodule import Domain, DomainData
from rein.dgss.recipes import resolve
from rein.errors import InputError


def roles(sources, targets, validation=(), **settings):
    def domains(entries):
        return [Domain(**{"options": {}, **entry}) for entry in entries]

    data = DomainData(sources=domains(sources), targets=domains(targets), validation=domains(validation), **settings)
    return list(data.roles().values())


def entry(dataset, split=None, title=None, path=None, **options):
    return {"dataset": dataset, "split": split, "title": title, "path": path, "options": options}


FOLDER = {"classes": ["a", "b"]}
CASES = {
    "other data sets are unseen": ([entry("gtav")], [entry("cityscapes"), entry("acdc")], ["unseen", "unseen"]),
    "another split of a source": ([entry("cityscapes")], [entry("cityscapes"), entry("acdc")], ["held-out source", "unseen"]),
    "the split of a source, under another title": (
        [entry("cityscapes")],
        [entry("cityscapes", "train", "mine")],
        ["source"],
    ),
    "the copy of a source in another folder": (
        [entry("cityscapes", path="one")],
        [entry("cityscapes", path="two")],
        ["held-out source"],
    ),
    "another condition is another domain": (
        [entry("acdc", condition="fog")],
        [entry("acdc", condition="night"), entry("acdc", condition="fog"), entry("acdc")],
        ["unseen", "held-out source", "held-out source"],
    ),
    "a mean counts the pairs of unseen conditions once": (
        [entry("cityscapes")],
        [entry("acdc", condition="fog"), entry("acdc"), entry("acdc", "test", condition="night"), entry("bdd100k")],
        ["part of another target", "unseen", "unseen", "unseen"],
    ),
    "a condition of all": ([entry("acdc")], [entry("acdc", condition="night")], ["held-out source"]),
    "corruptions are another domain": (
        [entry("cityscapes")],
        [entry("cityscapes-c", kind="fog", severity=1), entry("cityscapes-c", kind="snow", severity=1)],
        ["unseen", "unseen"],
    ),
    "how files are read does not count": (
        [entry("gtav", skip_misfits=False)],
        [entry("gtav", "train", split_file="split.mat")],
        ["source"],
    ),
    "other weather is another domain, other streets are not": (
        [entry("scenes", domain="day", count=8)],
        [entry("scenes", "test", "day", domain="day", count=2, seed=3), entry("scenes", "test", "fog", domain="fog")],
        ["held-out source", "unseen"],
    ),
    "folders beside each other are domains": (
        [entry("folder", "day", "a", "mine", **FOLDER)],
        [
            entry("folder", "night", "b", "mine", **FOLDER),
            entry("folder", "day", "c", "./mine", **FOLDER),
            entry("folder", None, "d", "mine/day", values=[0, 255], **FOLDER),
        ],
        ["unseen", "source", "held-out source"],
    ),
    "folders that are named as splits are parts of one domain": (
        [entry("folder", None, "a", "mine", **FOLDER)],
        [entry("folder", "val", "b", "mine", **FOLDER), entry("folder", "Test", "c", "mine", **FOLDER)],
        ["held-out source", "held-out source"],
    ),
    "splits of one domain beside those of another": (
        [entry("folder", None, "a", "mine/day", **FOLDER)],
        [entry("folder", None, "b", "mine/day", **FOLDER), entry("folder", None, "c", "mine/night", **FOLDER)],
        ["held-out source", "unseen"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_role_of_a_target_is_found_from_its_data_set_folder_split_and_options(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    sources, targets, expected = CASES[case]
    assert roles(sources, targets) == expected


def test_folders_that_exist_have_the_same_roles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "mine", domains=("day", "night"))
    sources, targets, _ = CASES["folders beside each other are domains"]
    assert roles(sources, targets) == ["unseen", "source", "source"]  # mine/day itself holds the images


def test_a_validation_domain_is_a_held_out_source(tmp_path):
    days = [entry("folder", f"day_{part}", f"day {part}", "mine", **FOLDER) for part in ("train", "val")]
    dusk = entry("folder", "dusk", "dusk", "mine", **FOLDER)
    assert roles(days[:1], [days[1], dusk]) == ["unseen", "unseen"]
    assert roles(days[:1], [days[1], dusk], validation=days[1:]) == ["held-out source", "unseen"]
    assert roles([days[0] | {"title": "day"}], [days[1] | {"title": "day"}, dusk]) == ["held-out source", "unseen"]


def test_names_that_are_made_of_the_options_say_nothing_about_the_role():
    sources, targets = ([entry("folder", None, None, path, **FOLDER)] for path in ("one", "two"))
    assert roles(sources, targets) == ["unseen"]


def test_day_of_the_generated_streets_is_a_held_out_source():
    data = resolve("streets-rein")["data"]
    assert roles(*(data[role] for role in ("sources", "targets", "validation"))) == ["held-out source", *["unseen"] * 4]


def test_domains_of_one_title_must_have_the_same_classes():
    with pytest.raises(InputError, match=r"day has the classes b, a, day has a, b; expected the same classes"):
        roles(
            [entry("folder", "x", "day", "mine", classes=["a", "b"])], [entry("folder", "y", "day", "mine", classes=["b", "a"])]
        )


def test_the_index_of_a_domains_own_folder_counts(tmp_path):
    root = make_folder(tmp_path, domains=("day", "night"))
    (root / "night" / "index.json").write_text(json.dumps({"classes": ["other", "names", "here"], "ignore_label_on_disk": 11}))
    domains = [Domain("folder", str(root), name, name) for name in ("day", "night")]
    with pytest.raises(InputError, match="night has the classes other, names, here, day has sky, ground, thing"):
        DomainData(sources=domains[:1], targets=domains[1:])
    (root / "index.json").rename(root / "day" / "index.json")
    assert DomainData(sources=domains[:1]).space.names == ("sky", "ground", "thing")
