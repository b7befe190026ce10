"""One contract for every data set that can be opened by name, published samples of four data sets, and `rein data check`."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dgss import trees
from rein.cli import main
from rein.dgss.data import check
from rein.dgss.data.datasets import DATASETS, Images, files, generated, open_dataset, space_of
from rein.dgss.data.datasets.class_maps import MAPILLARY
from rein.dgss.data.datasets.corruptions import KINDS, corrupt
from rein.dgss.data.datasets.encodings import read_first_of_three_16_bit
from rein.dgss.data.datasets.generated import Scenes
from rein.dgss.labels import CITYSCAPES
from rein.errors import InputError, MissingExtraError

FORMATS = Path(__file__).parents[2] / "fixtures" / "formats"
ON_DISK = [name for name in trees.NAMES if name != "scenes"]
VARIANTS = [
    *((name, {}) for name in ON_DISK),
    ("cityscapes", {"labels": "trainIds"}),
    ("acdc", {"labels": "Ids"}),
    ("acdc", {"conditions": ("night",)}),
    ("bdd100k", {"old": True}),
    ("mapillary", {"version": "v2.0"}),
    ("mapillary", {"version": "v1.1"}),
    ("mapillary", {"config": True}),
    ("mapillary", {"config": True, "version": "v2.0"}),
    ("idd", {"labels": "trainIds"}),
    ("idd", {"labels": "polygons"}),
]


def variant_id(variant):
    name, choices = variant
    return "-".join([name, *(f"{key}={value}" for key, value in choices.items())])


def test_every_data_set_is_described_and_has_a_tree():
    assert tuple(DATASETS) == trees.NAMES
    for name, spec in DATASETS.items():
        assert spec.name == name
        assert spec.summary
        assert spec.layout_text
        assert spec.encoding_text
        assert bool(spec.url) == bool(spec.documentation) == (name not in ("folder", "scenes"))


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_labels_are_read_as_they_were_drawn(tmp_path, variant):
    name, choices = variant
    tree = trees.make(name, tmp_path, count=4, **choices)
    data = open_dataset(name, tmp_path, **tree.options)
    assert len(data) == 4
    assert [image for image, _ in data.pairs] == tree.images
    assert data.left_out == {}
    for index, expected in enumerate(tree.labels):
        image, label = data[index]
        assert image.dtype == label.dtype == torch.uint8
        assert image.shape == (3, *expected.shape)
        assert np.array_equal(label.numpy(), expected)
        assert torch.equal(data.read_image(index), image)
    if not choices and name != "mapillary":
        assert set(np.unique(tree.labels)) == {*range(len(data.space.names)), 255}
    assert data.space == space_of(name, tmp_path)


@pytest.mark.parametrize("name", trees.NAMES)
def test_names_do_not_depend_on_the_folder_and_a_pickled_copy_is_equal(tmp_path, name):
    tree = trees.make(name, tmp_path / "one", size=(64, 64))
    data = open_dataset(name, tmp_path / "one", **tree.options)
    names = [data.name_of(index) for index in range(len(data))]
    assert len(set(names)) == len(data) == 3
    assert not any(Path(name).suffix or Path(name).is_absolute() for name in names)
    trees.make(name, tmp_path / "two", size=(64, 64))
    elsewhere = open_dataset(name, tmp_path / "two", **tree.options)
    assert [elsewhere.name_of(index) for index in range(3)] == names
    copied = pickle.loads(pickle.dumps(data))
    for original, copy in zip(data[1], copied[1], strict=True):
        assert torch.equal(original, copy)


@pytest.mark.parametrize("name", ON_DISK)
def test_opening_refuses_an_image_without_a_label(tmp_path, name):
    tree = trees.make(name, tmp_path)
    tree.label_files[1].unlink()
    with pytest.raises(
        InputError, match=f"{tree.images[1].name} has no label; expected .*{tree.label_files[1].stem[:5]}.*labels=false"
    ):
        open_dataset(name, tmp_path, **tree.options)
    alone = open_dataset(name, tmp_path, labels=False, **tree.options)
    image, label = alone[1]
    assert (label == 255).all()
    assert label.shape == image.shape[1:]
    assert alone.pairs[1][1] is None


@pytest.mark.parametrize("name", ON_DISK)
def test_opening_reads_no_file_and_reading_names_the_damaged_file(tmp_path, name):
    tree = trees.make(name, tmp_path)
    for path in [*tree.images, *tree.label_files[1:]]:
        path.write_bytes(path.read_bytes()[:40])
    data = open_dataset(name, tmp_path, **tree.options)
    assert len(data) == 3
    with pytest.raises(InputError, match=f"{tree.images[0].name} cannot be read"):
        data[0]
    label = np.zeros((64, 128, 3), np.uint8)
    Image.fromarray(label).save(tree.images[1])
    with pytest.raises(InputError, match=f"{tree.label_files[1].name} cannot be read"):
        data[1]


@pytest.mark.parametrize("name", [name for name in ON_DISK if name != "gtav"])
def test_a_label_of_another_size_is_refused(tmp_path, name):
    tree = trees.make(name, tmp_path)
    with Image.open(tree.images[2]) as image:
        image.resize((128, 60)).save(tree.images[2])
    data = open_dataset(name, tmp_path, **tree.options)
    with pytest.raises(InputError, match=r"is 128 x 60 pixels and its label .* is 128 x 64; expected equal sizes"):
        data[2]


@pytest.mark.parametrize("name", ON_DISK)
def test_a_value_outside_the_class_map_is_an_error_that_names_the_file(tmp_path, name):
    tree = trees.make(name, tmp_path)
    path = tree.label_files[0]
    if name == "synthia":
        pixels = np.zeros((64, 128, 3), np.uint16)
        pixels[3, 4, 0] = 300
        trees.write_16_bit_rgb(path, pixels)
    else:
        pixels = np.full((64, 128), 255, np.uint8)
        pixels[3, 4] = 150
        Image.fromarray(pixels).save(path)
    data = open_dataset(name, tmp_path, **tree.options)
    with pytest.raises(InputError, match=rf"{path.name} has label values \[(150|300)\]; expected .* \(ignored\)"):
        data[0]
    data[1]


def test_a_polygon_with_an_unknown_label_is_an_error_that_names_the_file(tmp_path):
    tree = trees.make("idd", tmp_path, labels="polygons")
    content = json.loads(tree.label_files[0].read_text())
    content["objects"][0]["label"] = "spaceship"
    tree.label_files[0].write_text(json.dumps(content))
    tree.label_files[1].write_text('{"objects": []}')
    data = open_dataset("idd", tmp_path)
    with pytest.raises(InputError, match=f"{tree.label_files[0].name} has the label 'spaceship'; expected one of road, parking"):
        data[0]
    with pytest.raises(InputError, match=f"{tree.label_files[1].name} cannot be read as a polygon file: KeyError 'img"):
        data[1]


def test_pillow_reads_labels_of_16_bits_as_zeros_and_rein_does_not(tmp_path):
    tree = trees.make("synthia", tmp_path)
    with Image.open(tree.label_files[0]) as picture:
        assert not np.array(picture)[..., 0].any()
    assert read_first_of_three_16_bit(tree.label_files[0]).max() == 22


def test_urbansyn_labels_may_have_several_channels_if_they_are_equal(tmp_path):
    tree = trees.make("urbansyn", tmp_path)
    for path in tree.label_files[:2]:
        with Image.open(path) as picture:
            picture.convert("RGBA").save(path)
    data = open_dataset("urbansyn", tmp_path)
    assert np.array_equal(data[0][1].numpy(), tree.labels[0])
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (64, 128, 3)).astype(np.uint8)).save(tree.label_files[1])
    with pytest.raises(
        InputError, match=r"ss_0002.png has colour channels that differ; expected a label with the class number in every channel"
    ):
        data[1]


class TestGTAV:
    def test_train_has_every_image_unless_the_publishers_split_is_set(self, tmp_path):
        trees.make("gtav", tmp_path, count=4)
        assert len(open_dataset("gtav", tmp_path)) == 4
        data = open_dataset("gtav", tmp_path, split_file="split.mat")
        assert [data.name_of(i) for i in range(len(data))] == ["00001", "00002", "00003"]
        data = open_dataset("gtav", tmp_path, "val", split_file="split.mat")
        assert [data.name_of(i) for i in range(len(data))] == ["00004"]
        assert data.left_out == {}
        with pytest.raises(
            InputError, match=r"gtav has the split 'val' only with its publisher's split.mat. Set split_file=split.mat"
        ):
            open_dataset("gtav", tmp_path, "val")
        (tmp_path / "split.mat").write_bytes(b"nothing")
        with pytest.raises(InputError, match=r"split.mat cannot be read as the publisher's split.mat"):
            open_dataset("gtav", tmp_path, "val", split_file="split.mat")

    def test_a_label_of_another_size_is_resized_to_its_image(self, tmp_path, capsys):
        """As in the published settings, in which all 24,966 pairs train."""
        tree = trees.make("gtav", tmp_path)
        with Image.open(tree.images[1]) as image:
            image.resize((64, 32)).save(tree.images[1])
        data = open_dataset("gtav", tmp_path)
        assert (len(data), data.left_out) == (3, {})
        image, label = data[1]
        assert image.shape == (3, 32, 64)
        assert np.array_equal(label.numpy(), tree.labels[1][::2, ::2])
        assert main(["data", "check", "gtav", str(tmp_path)]) == 0
        expected = f"labels resized to their image, which has another size: 1; the first is {tree.label_files[1]}"
        assert expected in capsys.readouterr().out.splitlines()

    def test_pairs_of_unequal_sizes_can_be_left_out_and_are_named(self, tmp_path):
        tree = trees.make("gtav", tmp_path)
        with Image.open(tree.images[1]) as image:
            image.resize((128, 60)).save(tree.images[1])
        data = open_dataset("gtav", tmp_path, skip_misfits=True)
        assert [data.name_of(i) for i in range(len(data))] == ["00001", "00003"]
        assert data.left_out == {tree.images[1]: "128 x 60 pixels, its label 128 x 64"}
        assert np.array_equal(data[1][1].numpy(), tree.labels[2])


# the values of Mapillary Vistas 1.2 by class, as the published settings of Rein state them
PUBLISHED = {
    "road": (7, 8, 10, 13, 14, 23, 24),
    "sidewalk": (2, 9, 11, 15),
    "building": (17,),
    "wall": (6,),
    "fence": (3,),
    "pole": (44, 45, 47),
    "traffic light": (48,),
    "traffic sign": (46, 49, 50),
    "vegetation": (30,),
    "terrain": (29,),
    "sky": (27,),
    "person": (19,),
    "rider": (20, 21, 22),
    "car": (55,),
    "truck": (61,),
    "bus": (54,),
    "train": (58,),
    "motorcycle": (57,),
    "bicycle": (52,),
}
ROBUSTNET = PUBLISHED | {"road": (13, 24, 41), "sidewalk": (2, 15), "pole": (45, 47), "traffic sign": (50,)}
# the names of some values of version 1.2, in the publisher's config file
NAMES_V1 = {
    2: "construction--barrier--curb",
    4: "construction--barrier--guard-rail",
    7: "construction--flat--bike-lane",
    8: "construction--flat--crosswalk-plain",
    9: "construction--flat--curb-cut",
    10: "construction--flat--parking",
    11: "construction--flat--pedestrian-area",
    12: "construction--flat--rail-track",
    13: "construction--flat--road",
    14: "construction--flat--service-lane",
    15: "construction--flat--sidewalk",
    16: "construction--structure--bridge",
    17: "construction--structure--building",
    20: "human--rider--bicyclist",
    23: "marking--crosswalk-zebra",
    24: "marking--general",
    35: "object--billboard",
    41: "object--manhole",
    43: "object--pothole",
    44: "object--street-light",
    45: "object--support--pole",
    46: "object--support--traffic-sign-frame",
    47: "object--support--utility-pole",
    48: "object--traffic-light",
    49: "object--traffic-sign--back",
    50: "object--traffic-sign--front",
    55: "object--vehicle--car",
    56: "object--vehicle--caravan",
    58: "object--vehicle--on-rails",
    65: "void--unlabeled",
}


class TestMapillary:
    def test_version_1_2_is_the_default_and_2_0_can_be_selected(self, tmp_path):
        first = trees.make("mapillary", tmp_path, version="v1.2")
        trees.make("mapillary", tmp_path, version="v2.0")
        assert open_dataset("mapillary", tmp_path).pairs[0][1] == first.label_files[0]
        assert "v2.0" in str(open_dataset("mapillary", tmp_path, version="v2.0").pairs[0][1])
        shutil.rmtree(tmp_path / "training" / "v1.2")
        assert "v2.0" in str(open_dataset("mapillary", tmp_path).pairs[0][1])
        with pytest.raises(InputError, match=r"has no label; expected .*v1.2"):
            open_dataset("mapillary", tmp_path, version="v1.2")
        with pytest.raises(InputError, match=r"version of mapillary is 'v3'; expected one of v1.2, v2.0, v1.1"):
            open_dataset("mapillary", tmp_path, version="v3")

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("construction--flat--road", "road"),
            ("marking--general", "road"),
            ("marking--continuous--dashed", "road"),
            ("marking--crosswalk-zebra", None),
            ("marking-only--discrete--crosswalk-zebra", None),
            ("object--manhole", "road"),
            ("construction--barrier--curb", "sidewalk"),
            ("human--person", "person"),
            ("human--person--person-group", "person"),
            ("human--rider--other-rider", "rider"),
            ("object--traffic-light--pedestrians", "traffic light"),
            ("object--traffic-sign--back", None),
            ("object--traffic-sign--temporary-front", "traffic sign"),
            ("object--support--traffic-sign-frame", None),
            ("object--vehicle--on-rails", "train"),
            ("void--unlabeled", None),
            ("bird", None),
        ],
    )
    def test_a_name_has_the_class_of_its_nearest_ancestor(self, name, expected):
        found = MAPILLARY["robustnet"].class_of(name)
        assert found == (255 if expected is None else CITYSCAPES.names.index(expected))

    @pytest.mark.parametrize(("name", "published"), [("rein", PUBLISHED), ("robustnet", ROBUSTNET)])
    def test_the_class_maps_are_the_published_ones(self, name, published):
        expected = dict.fromkeys(range(66), 255)
        expected |= {value: k for k, key in enumerate(CITYSCAPES.names) for value in published[key]}
        assert MAPILLARY[name].v1 == expected
        assert {value: MAPILLARY[name].class_of(text) for value, text in NAMES_V1.items()} == {k: expected[k] for k in NAMES_V1}

    @pytest.mark.parametrize("mapping", MAPILLARY.values())
    def test_every_class_has_a_value_in_both_versions(self, mapping):
        assert (len(mapping.v1), len(mapping.v2)) == (66, 124)
        assert set(mapping.v1.values()) == set(mapping.v2.values()) == {*range(19), 255}

    def test_the_class_map_can_be_selected(self, tmp_path):
        tree = trees.make("mapillary", tmp_path, count=1)
        label = np.full((64, 128), 41, np.uint8)  # a manhole
        label[:, :64] = 7  # a bike lane
        Image.fromarray(label).save(tree.label_files[0])
        for choice, expected in ((None, [0, 255]), ("rein", [0, 255]), ("robustnet", [255, 0])):
            data = open_dataset("mapillary", tmp_path, class_map=choice)
            assert data[0][1][0, [0, 127]].tolist() == expected
            assert data.coding_of(0) == f"Mapillary Vistas v1.2, mapped as in {choice or 'rein'}"
        with pytest.raises(InputError, match="class_map of mapillary is 'other'; expected one of rein, robustnet"):
            open_dataset("mapillary", tmp_path, class_map="other")

    def test_a_bad_config_is_named(self, tmp_path):
        trees.make("mapillary", tmp_path)
        (tmp_path / "config_v1.2.json").write_text('{"labels": [{"id": 4}]}')
        with pytest.raises(InputError, match=r"config_v1.2.json cannot be read as a config file of Mapillary Vistas: KeyError"):
            open_dataset("mapillary", tmp_path)


def test_acdc_opens_one_condition_or_all(tmp_path):
    tree = trees.make("acdc", tmp_path, split="val", count=8)
    assert len(open_dataset("acdc", tmp_path, "val")) == 8
    night = open_dataset("acdc", tmp_path, "val", condition="night")
    assert [night.name_of(i) for i in range(2)] == ["night/GOPR01/GOPR01_frame_0001", "night/GOPR05/GOPR05_frame_0005"]
    assert np.array_equal(night[1][1].numpy(), tree.labels[3])
    with pytest.raises(InputError, match=r"condition of acdc is 'dusk'; expected one of fog, night, rain, snow"):
        open_dataset("acdc", tmp_path, "val", condition="dusk")
    with pytest.raises(InputError, match=r"rgb_anon/fog/train has no images; expected \*_rgb_anon.png"):
        open_dataset("acdc", tmp_path, condition="fog")


class TestCorruptions:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_higher_severity_changes_the_image_more(self, kind):
        grid = np.indices((64, 96)).sum(0) // 8 % 2
        image = np.stack([60 + 90 * grid, 80 + 60 * grid, 100 + 20 * grid], axis=-1).astype(np.uint8)
        mild, severe = (np.abs(corrupt(image, kind, s, "a").astype(int) - image).mean() for s in (1, 5))
        assert 0 < mild < severe

    @pytest.mark.parametrize("kind", ["gaussian_noise", "impulse_noise", "glass_blur", "frost", "elastic_transform", "snow"])
    def test_a_corruption_does_not_depend_on_the_random_state_and_restores_it(self, kind):
        image = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
        np.random.seed(5)
        torch.manual_seed(5)
        before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
        first = corrupt(image, kind, 3, "city/one")
        assert np.array_equal(np.random.get_state()[1], before)
        assert torch.equal(torch.get_rng_state(), torch_before)
        np.random.seed(99)
        assert np.array_equal(corrupt(image, kind, 3, "city/one"), first)
        assert not np.array_equal(corrupt(image, kind, 3, "city/two"), first)

    def test_labels_are_unchanged_and_names_have_kind_and_severity(self, tmp_path):
        tree = trees.make("cityscapes-c", tmp_path)
        data = open_dataset("cityscapes-c", tmp_path, kind="fog", severity=4)
        clean = open_dataset("cityscapes", tmp_path)
        assert data.name_of(0) == "fog/4/aachen/aachen_000000_000019"
        assert np.array_equal(data[0][1].numpy(), tree.labels[0])
        assert not torch.equal(data[0][0], clean[0][0])

    def test_missing_or_invalid_settings_are_refused(self, tmp_path, monkeypatch):
        trees.make("cityscapes-c", tmp_path, size=(24, 64))
        with pytest.raises(
            InputError, match=r"kind of cityscapes-c is not set; expected one of gaussian_noise, shot_noise, .*Set kind="
        ):
            open_dataset("cityscapes-c", tmp_path, severity=1)
        with pytest.raises(InputError, match=r"severity of cityscapes-c is 6; expected one of 1, 2, 3, 4, 5"):
            open_dataset("cityscapes-c", tmp_path, kind="fog", severity=6)
        data = open_dataset("cityscapes-c", tmp_path, kind="fog", severity=1)
        with pytest.raises(InputError, match="is 64 x 24 pixels; expected at least 32 pixels on each side"):
            data[0]
        monkeypatch.setitem(__import__("sys").modules, "imagecorruptions", None)
        with pytest.raises(MissingExtraError, match=r"needs imagecorruptions, .*rein-adapter\[data\]"):
            open_dataset("cityscapes-c", tmp_path, kind="fog", severity=1)


class TestFolder:
    def test_a_folder_is_one_data_set_or_has_splits_in_subfolders(self, tmp_path):
        tree = trees.make("folder", tmp_path, split="day")
        trees.make("folder", tmp_path, split="dusk", count=2)
        assert len(open_dataset("folder", tmp_path, "day")) == 3
        assert len(open_dataset("folder", tmp_path, "dusk")) == 2
        day = open_dataset("folder", tmp_path / "day")  # index.json is in the parent folder
        assert np.array_equal(day[2][1].numpy(), tree.labels[2])
        with pytest.raises(InputError, match=r"day has no split 'dusk': it has no folder dusk/images"):
            open_dataset("folder", tmp_path / "day", "dusk")
        with pytest.raises(InputError, match=r"night does not exist; expected images/.*The splits of .* are day, dusk"):
            open_dataset("folder", tmp_path, "night")

    def test_classes_may_be_passed_as_options(self, tmp_path):
        trees.make("folder", tmp_path)
        (tmp_path / "index.json").unlink()
        with pytest.raises(InputError, match="The class names are unknown"):
            open_dataset("folder", tmp_path)
        data = open_dataset("folder", tmp_path, classes=["a", "b", "c", "d"], ignored=(11,))
        assert data.space.names == ("a", "b", "c", "d")
        assert data.space == space_of("folder", tmp_path, classes=["a", "b", "c", "d"], ignored=(11,))
        assert len(open_dataset("folder", tmp_path, labels=False)) == 3


def test_scenes_differ_between_splits_and_seeds_and_agree_between_domains(tmp_path):
    def labels(split, **options):
        data = open_dataset("scenes", None, split, count=2, size=(32, 64), **options)
        return [data[index][1] for index in range(2)]

    streets = [*labels("train"), *labels("val"), *labels("test"), *labels("train", seed=1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(streets) for b in streets[:i])
    assert torch.equal(labels("train", domain="night")[1], streets[1])
    with pytest.raises(InputError, match=r"domain of scenes is 'dusk'; expected one of day, fog"):
        open_dataset("scenes", None, domain="dusk")
    with pytest.raises(InputError, match="size is 4 x 4; expected at least 32"):
        open_dataset("scenes", None, size=(4, 4))
    with pytest.raises(InputError, match="count is 0; expected 1 to"):
        open_dataset("scenes", None, count=0)


def test_equal_scenes_are_rendered_once(monkeypatch):
    rendered, render = [], generated.scenes.render
    monkeypatch.setattr(generated.scenes, "render", lambda *args: rendered.append(args) or render(*args))
    generated._rendered.cache_clear()
    first, second = (Scenes("night", range(70, 73), (32, 48)) for _ in range(2))
    for index in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first[index], second[index], strict=True))
    assert rendered == [(seed, "night", (32, 48)) for seed in range(70, 73)]
    assert not torch.equal(Scenes("day", range(70, 71), (32, 48))[0][0], first[0][0])
    assert Scenes("night", range(70, 71), (32, 64))[0][1].shape == (32, 64)


def test_images_without_labels_are_found_in_a_folder_and_its_subfolders(tmp_path):
    for name in ("b.png", "a.jpg", "deep/c.JPG", "twin.png", "twin.jpg", ".hidden.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            Image.new("RGB", (20, 10), (1, 2, 3)).save(path)
    images = Images(tmp_path)
    assert [images.name_of(i) for i in range(len(images))] == ["a", "b", "deep/c", "twin.jpg", "twin.png"]
    assert images[1].shape == (3, 10, 20)
    assert images[1].dtype == torch.uint8
    assert Images(tmp_path / "b.png").name_of(0) == "b"
    for name in ("0.jpg", "0.png", "0.jpg.jpg"):
        Image.new("RGB", (20, 10)).save(tmp_path / "deep" / name)
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    names = [images.name_of(i) for images in [Images(tmp_path / "deep")] for i in range(len(images))]
    assert len(set(names)) == len(names) == 4 + 4  # a folder is read once, also through links
    for path in (tmp_path / "notes.txt", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"has no images; expected files that end in .jpg|does not exist; expected a folder"):
            Images(path)


def test_an_unknown_name_is_an_error_that_lists_the_known_names(tmp_path):
    trees.make("cityscapes", tmp_path)
    with pytest.raises(InputError, match="Unknown data set 'citiscapes'; expected one of gtav, synthia, .*scenes"):
        open_dataset("citiscapes", tmp_path)
    with pytest.raises(InputError, match="cityscapes has no split 'training'; expected one of train, val, test"):
        open_dataset("cityscapes", tmp_path, "training")
    with pytest.raises(InputError, match="acdc has no option 'weather'; expected one of condition, labels"):
        open_dataset("acdc", tmp_path, weather="fog")
    with pytest.raises(InputError, match=r"leftImg8bit/val has no images; expected \*_leftImg8bit.png. .*/val does not exist"):
        open_dataset("cityscapes", tmp_path, "val")
    with pytest.raises(InputError, match="nowhere does not exist; expected the folder of the data set"):
        open_dataset("cityscapes", tmp_path / "nowhere")
    with pytest.raises(InputError, match="No folder given for the data set. Pass its path"):
        open_dataset("cityscapes", None)
    with pytest.raises(InputError, match="labels of acdc is 'no'; expected true or false"):
        open_dataset("acdc", tmp_path, labels="no")


class TestPublishedSamples:
    def test_cityscapes_is_the_same_in_label_ids_and_in_train_ids(self, tmp_path):
        data = open_dataset("cityscapes", FORMATS / "cityscapes", "val")
        assert data.name_of(0) == "frankfurt/frankfurt_000000_000294"
        assert data.pairs[0][1].name.endswith("_labelIds.png")
        image, label = data[0]
        assert image.shape == (3, 128, 256)
        shutil.copytree(FORMATS / "cityscapes", tmp_path, dirs_exist_ok=True)
        next(tmp_path.rglob("*_labelIds.png")).unlink()
        other = open_dataset("cityscapes", tmp_path, "val")
        assert other.pairs[0][1].name.endswith("_labelTrainIds.png")
        assert (other[0][1] == label).float().mean() > 0.995  # the two samples were resized separately and differ at edges
        assert set(label.unique().tolist()) == {0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 255}

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_bdd100k_labels_are_train_ids(self, split):
        data = open_dataset("bdd100k", FORMATS / "bdd100k", split)
        assert len(data) == 3
        assert all(set(data[i][1].unique().tolist()) <= {2, 8} and data[i][0].shape == (3, 8, 8) for i in range(3))

    @pytest.mark.parametrize("version", ["v1.2", "v2.0"])
    def test_mapillary_vistas_is_mapped_by_its_config_file(self, version):
        data = open_dataset("mapillary", FORMATS / "mapillary_vistas", "val", version=version)
        assert [sorted(data[i][1].unique().tolist()) for i in range(2)] == [
            [255],
            [18, 255],
        ]  # 2 is a bicycle, 0 and 1 have no class

    def test_mapillary_vistas_without_a_config_file_is_the_same_in_both_versions(self, tmp_path):
        sample, folder = FORMATS / "mapillary", tmp_path / "validation"
        shutil.copytree(sample / "images", folder / "images")
        for version in ("v1.2", "v2.0"):
            shutil.copytree(sample / version, folder / version / "labels")
        first, second = (open_dataset("mapillary", tmp_path, "val", version=version)[0][1] for version in ("v1.2", "v2.0"))
        assert torch.equal(first, second)
        assert set(first.unique().tolist()) == {2, 5}  # building, and pole and street light

    def test_a_coloured_synthia_label_is_refused(self):
        with pytest.raises(InputError, match="has 3 channels of 8 bits; expected three channels of 16 bits"):
            read_first_of_three_16_bit(FORMATS / "synthia" / "GT" / "000000.png")


class TestCheck:
    @pytest.mark.parametrize("name", trees.NAMES)
    def test_a_good_tree_is_counted(self, tmp_path, name):
        tree = trees.make(name, tmp_path / "data", size=(32, 64))
        report = check.check(name, tmp_path / "data", options=tree.options)
        assert (report.images, report.usable, report.read) == (3, 3, 3)
        assert report.sizes == {(64, 32): 3}
        assert report.problems == []
        if tree.labels:
            drawn = np.bincount(np.concatenate([label.ravel() for label in tree.labels]), minlength=256)
            assert np.array_equal(report.found.pixels, drawn[: len(report.found.pixels)])
            assert report.found.ignored == drawn[255]
            assert report.verdict() == ""

    def test_the_report_shows_the_share_of_each_class(self, tmp_path):
        trees.make("folder", tmp_path, count=1, size=(32, 64))
        Image.fromarray(np.repeat([[0], [0], [0], [2]], 64, 1).repeat(8, 0).astype(np.uint8)).save(
            tmp_path / "train" / "labels" / "000.png"
        )
        text = check.check("folder", tmp_path).text()
        assert text.splitlines()[:3] == [
            "folder, train: 1 images, 1 usable, 1 read without errors",
            "sizes: 64 x 32 (1)",
            "labels: values 0 to 2 in one channel (1)",
        ]
        assert "sky      75.00  ######" in text
        assert "thing    25.00  ############" in text
        assert "ground       -" in text
        assert "classes without pixels: ground" in text
        assert "ignored: 0.00 % of all pixels" in text

    def test_the_command_counts_good_pairs_and_names_the_first_bad_pair(self, tmp_path, capsys):
        tree = trees.make("cityscapes", tmp_path / "data", count=6)
        assert main(["data", "check", "cityscapes", str(tmp_path / "data"), "--out", str(tmp_path / "a.png")]) == 0
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.width > 1200
        tree.label_files[3].unlink()
        tree.label_files[5].write_bytes(b"none")
        out = tmp_path / "b.png"
        capsys.readouterr()
        assert main(["data", "check", "cityscapes", str(tmp_path / "data"), "--out", str(out)]) == 2
        printed = capsys.readouterr()
        assert "6 images, 5 usable, 4 read without errors" in printed.out
        assert "bad pairs: 2 of 6; the first: " in printed.err
        assert f"{tree.images[3].name} has no label" in printed.err
        assert printed.err.count("\n") == 1
        assert out.exists()

    def test_every_bad_pair_is_listed_up_to_a_limit(self, tmp_path, capsys):
        tree = trees.make("folder", tmp_path, count=9)
        for path in tree.label_files[:2]:
            path.unlink()
        for path in tree.label_files[4:7]:
            path.write_bytes(b"none")
        names = [path.name for path in [*tree.images[:2], *tree.label_files[4:7]]]
        for options, count in (([], 5), (["--max-problems", "3"], 3)):
            assert main(["data", "check", "folder", str(tmp_path), *options]) == 2
            printed = capsys.readouterr()
            lines = printed.out.partition("bad pairs: 5\n")[2].splitlines()
            assert [name in line for name, line in zip(names, lines, strict=False)] == [True] * count + [False] * (
                len(lines) - count
            )
            assert lines[count:] == ["  and 2 more"] * (count < 5)
            assert "bad pairs: 5 of 9; the first: " in printed.err

    @pytest.mark.parametrize("name", ON_DISK)
    def test_labels_without_an_image_are_reported(self, tmp_path, name, capsys):
        tree = trees.make(name, tmp_path, size=(32, 64))
        assert open_dataset(name, tmp_path, **tree.options).unused_labels == []
        tree.images[1].unlink()
        assert open_dataset(name, tmp_path, **tree.options).unused_labels == [tree.label_files[1]]
        assert open_dataset(name, tmp_path, labels=False, **tree.options).unused_labels == []
        options = [text for key, value in tree.options.items() for text in ("--option", f"{key}={value}")]
        assert main(["data", "check", name, str(tmp_path), *options]) == 2
        printed = capsys.readouterr()
        assert f"labels without an image: 1\n  {tree.label_files[1]}\n" in printed.out
        assert (
            f"labels without an image: 1; the first: {tree.label_files[1]}. Add the images, or remove the labels." in printed.err
        )

    def test_one_class_alone_is_refused(self, tmp_path, capsys):
        trees.make("folder", tmp_path)
        options = ["--option", "classes=crack", "--option", "ignored=1,2,11"]
        assert main(["data", "check", "folder", str(tmp_path), *options]) == 2
        assert "the only class is 'crack'; expected two or more. Name what is not 'crack', too" in capsys.readouterr().err

    def test_the_first_missing_part_of_a_path_is_named(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        trees.make("folder", tmp_path / "mine", split="day")
        shutil.rmtree(tmp_path / "mine" / "day" / "labels")
        (tmp_path / "file").touch()
        for arguments, said in (
            (["folder", "nosuch", "--split", "dawn"], "nosuch does not exist; expected images/"),
            (["folder", "mine", "--split", "dawn"], "mine/dawn does not exist; expected images/"),
            (["folder", "mine", "--split", "day"], "mine/day/labels does not exist. To open images without labels"),
            (["cityscapes", "no/such"], "no does not exist; expected the folder of the data set"),
            (["cityscapes", "file"], "file is not a folder; expected the folder of the data set"),
            (["cityscapes", "mine"], "has no images; expected *_leftImg8bit.png. mine/leftImg8bit does not exist."),
        ):
            assert main(["data", "check", *arguments]) == 2
            assert said in capsys.readouterr().err
        with pytest.raises(InputError, match="^no does not exist; expected a folder of images or an image file"):
            Images("no/such.png")

    def test_a_limit_reads_evenly_spaced_pairs(self, tmp_path, capsys):
        tree = trees.make("bdd100k", tmp_path, count=9, size=(32, 32))
        for path in [*tree.label_files[1:4], *tree.label_files[5:8]]:
            path.write_bytes(b"none")
        assert main(["data", "check", "bdd100k", str(tmp_path), "--limit", "3"]) == 0
        assert "9 images, 9 usable, 3 read without errors" in capsys.readouterr().out

    def test_pairs_that_a_data_set_leaves_out_are_not_errors(self, tmp_path, capsys):
        tree = trees.make("gtav", tmp_path)
        with Image.open(tree.images[0]) as image:
            image.resize((128, 60)).save(tree.images[0])
        assert main(["data", "check", "gtav", str(tmp_path), "--option", "skip_misfits=true"]) == 0
        assert "left out: 1; the first is " in capsys.readouterr().out

    def test_options_and_splits_are_passed_on(self, tmp_path, capsys):
        trees.make("acdc", tmp_path, split="val", count=4)
        arguments = ["data", "check", "acdc", str(tmp_path), "--split", "val", "--option"]
        assert main([*arguments, "condition=snow"]) == 0
        assert "acdc, val: 1 images" in capsys.readouterr().out
        for text, message in (
            ("condition=dusk", "condition of acdc is 'dusk'"),
            ("weather=fog", "'weather=fog' is not an option of acdc; expected one of condition=, labels="),
            ("labels=maybe", "labels of acdc cannot be 'maybe'; expected true or false, to load labels (true)"),
        ):
            assert main([*arguments, text]) == 2
            assert message in capsys.readouterr().err
        assert main(["data", "check", "scenes", "--option", "count=2", "--option", "size=32x64"]) == 0
        assert "sizes: 64 x 32 (2)" in capsys.readouterr().out
        assert main(["data", "check", "nothing"]) == 2
        assert "Unknown data set 'nothing'" in capsys.readouterr().err

    def test_every_data_set_is_listed(self, capsys):
        assert main(["data", "list"]) == 0
        printed = capsys.readouterr().out
        for name, spec in DATASETS.items():
            assert f"{name}: {spec.summary}" in printed
            assert spec.url in printed


def test_the_first_layout_with_labels_is_used(tmp_path):
    trees.make("idd", tmp_path, labels="polygons")
    assert open_dataset("idd", tmp_path).pairs[0][1].suffix == ".json"
    trees.make("idd", tmp_path, labels="ids")
    assert open_dataset("idd", tmp_path).pairs[0][1].name.endswith("_labelids.png")


def test_opening_lists_folders_and_does_not_stat_single_files(tmp_path, monkeypatch):
    (tmp_path / "RGB").mkdir()
    (tmp_path / "GT" / "LABELS").mkdir(parents=True)
    for number in range(2000):
        for folder in ("RGB", "GT/LABELS"):
            (tmp_path / folder / f"{number:07}.png").touch()

    def listed(*args, **kwargs):
        raise AssertionError("a single file was accessed")

    monkeypatch.setattr(files.Path, "exists", listed)
    monkeypatch.setattr(files.Path, "open", listed)
    assert len(open_dataset("synthia", tmp_path)) == 2000


def test_masks_of_0_and_255_are_two_classes_if_values_are_set(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    mask = np.zeros((20, 30), np.uint8)
    mask[:5] = 255
    Image.fromarray(np.repeat(mask[:, :, None], 3, 2)).save(tmp_path / "images" / "0.JPEG")
    Image.fromarray(mask).save(tmp_path / "labels" / "0.PNG")  # suffixes may be in upper case
    settings = {"classes": ["background", "crack"]}
    label = open_dataset("folder", tmp_path, **settings)[0][1]
    assert sorted(set(label.flatten().tolist())) == [0, 255]
    label = open_dataset("folder", tmp_path, **settings, values=(0, 255))[0][1]
    assert torch.equal(label, torch.from_numpy(mask // 255))
    with pytest.raises(InputError, match="values is .*; expected one different number for each class of background, crack"):
        open_dataset("folder", tmp_path, **settings, values=(0, 1, 255))


def test_a_folder_without_the_split_lists_its_splits(tmp_path):
    trees.make("folder", tmp_path / "mine", split="day")
    with pytest.raises(InputError, match="The splits of .* are day"):
        open_dataset("folder", tmp_path / "mine")
