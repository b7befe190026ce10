"""Tests of the generated street scenes: exact labels, repeatable bytes, and the differences between the domains."""

import hashlib
import os
import random
import subprocess
import sys

import numpy as np
import pytest

import rein
from rein.dgss.labels import CITYSCAPES_CLASSES, IGNORE_LABEL
from rein.dgss.scenes import DOMAINS, palette, render
from rein.dgss.scenes.readback import SKY_DEPTH
from rein.errors import InputError

ROAD, SIDEWALK, BUILDING, POLE, SIGN, VEGETATION, SKY, PERSON, CAR = (
    CITYSCAPES_CLASSES.index(name)
    for name in ("road", "sidewalk", "building", "pole", "traffic sign", "vegetation", "sky", "person", "car")
)


def luminance(image: np.ndarray) -> np.ndarray:
    return image @ np.array([0.2126, 0.7152, 0.0722])


def saturation(image: np.ndarray) -> np.ndarray:
    image = image.astype(float)
    return (image.max(-1) - image.min(-1)) / np.maximum(image.max(-1), 1)


def digest(seed: int, domain: str, size: tuple[int, int]) -> str:
    scene = render(seed, domain, size)
    return hashlib.sha256(scene.image.tobytes() + scene.label.tobytes() + scene.depth.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def days():
    return [render(seed) for seed in range(24)]


@pytest.mark.parametrize("domain", DOMAINS)
def test_equal_arguments_give_equal_bytes(domain):
    first = digest(3, domain, (48, 80))
    render(4, domain, (40, 64))  # a render in between changes nothing
    assert digest(3, domain, (48, 80)) == first


def test_a_fresh_process_gives_the_same_bytes():
    code = (
        "import hashlib, sys, types\n"
        "package = types.ModuleType('rein')\n"  # not the real package, which imports torch
        f"package.__path__ = {list(rein.__path__)!r}\n"
        "sys.modules['rein'] = package\n"
        "from rein.dgss.scenes import DOMAINS, render\n"
        "for domain in DOMAINS:\n"
        "    scene = render(5, domain, (48, 96))\n"
        "    print(hashlib.sha256(scene.image.tobytes() + scene.label.tobytes() + scene.depth.tobytes()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [digest(5, domain, (48, 96)) for domain in DOMAINS]


def test_the_renderer_imports_nothing_of_rein_but_its_errors():
    code = (
        "import sys, types\n"
        "package = types.ModuleType('rein')\n"
        f"package.__path__ = {list(rein.__path__)!r}\n"
        "sys.modules['rein'] = package\n"
        "import rein.dgss.scenes\n"
        "print(*(name for name in sys.modules if name.partition('.')[0] in ('rein', 'torch')))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    imported = {name for name in result.stdout.split() if not name.startswith("rein.dgss.scenes")}
    assert imported == {"rein", "rein.dgss", "rein.errors"}


def test_labels_are_the_cityscapes_train_ids():
    names = [name.upper().replace(" ", "_") for name in CITYSCAPES_CLASSES]
    assert [getattr(palette, name) for name in names] == list(range(19))


def test_different_seeds_give_different_streets():
    labels = {render(seed, size=(48, 96)).label.tobytes() for seed in range(10)}
    assert len(labels) == 10


def test_global_random_states_are_neither_read_nor_written():
    np.random.seed(1)
    random.seed(1)
    before, numpy_before = random.getstate(), np.random.get_state()
    first = digest(2, "snow", (40, 64))
    assert random.getstate() == before
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_before, strict=True))
    np.random.seed(2)
    random.seed(2)
    assert digest(2, "snow", (40, 64)) == first


@pytest.mark.parametrize("domain", DOMAINS[1:])
def test_a_domain_changes_the_image_but_neither_labels_nor_depth(domain):
    for seed in (0, 7):
        day, other = render(seed, "day", (64, 128)), render(seed, domain, (64, 128))
        assert np.array_equal(day.label, other.label)
        assert np.array_equal(day.depth, other.depth)
        assert np.abs(day.image.astype(float) - other.image).mean() > 15


@pytest.mark.parametrize("size", [(128, 256), (97, 211), (32, 96), (64, 64), (33, 32)])
@pytest.mark.parametrize("domain", DOMAINS)
def test_arrays_have_the_requested_size_and_valid_values(domain, size):
    scene = render(1, domain, size)
    assert scene.image.shape == (*size, 3)
    assert scene.label.shape == scene.depth.shape == size
    assert (scene.image.dtype, scene.label.dtype, scene.depth.dtype) == (np.uint8, np.uint8, np.float32)
    assert set(np.unique(scene.label)) <= {*range(len(CITYSCAPES_CLASSES)), IGNORE_LABEL}
    assert np.isfinite(scene.depth).all()
    assert scene.depth.min() > 0
    assert scene.image.std() > 5


def test_different_sizes_show_the_same_street():
    small, large = render(6, size=(64, 128)), render(6, size=(128, 256))
    assert (small.label == large.label[::2, ::2]).mean() > 0.93


def test_every_street_has_a_road_pavement_buildings_cars_and_sky_or_vegetation(days):
    for scene in days:
        pixels = np.bincount(scene.label.ravel(), minlength=len(CITYSCAPES_CLASSES))
        assert pixels[ROAD] > 2000
        assert min(pixels[SIDEWALK], pixels[BUILDING], pixels[CAR], pixels[SKY] + pixels[VEGETATION]) > 0


def test_most_classes_appear_and_small_objects_appear_often(days):
    pixels = np.stack([np.bincount(scene.label.ravel(), minlength=len(CITYSCAPES_CLASSES)) for scene in days])
    assert (pixels.max(axis=0) > 10).sum() >= 16
    for name in (PERSON, POLE, CAR, SIGN):
        assert (pixels[:, name] > 12).mean() > 0.8, CITYSCAPES_CLASSES[name]


def test_only_the_sky_is_far_away(days):
    for scene in days:
        assert np.array_equal(scene.depth == SKY_DEPTH, scene.label == SKY)
        assert scene.depth[scene.label != SKY].max() <= 500


def test_depth_decreases_towards_the_bottom_of_the_road(days):
    for scene in days:
        rows = [scene.depth[row][scene.label[row] == ROAD] for row in range(80, 128)]
        middles = [np.median(row) for row in rows if len(row) > 20]
        assert len(middles) > 20
        assert (np.diff(middles) < 0).all()


def test_objects_below_the_sky_are_nearer_than_the_sky(days):
    for scene in days:
        above = scene.label[:-1] == SKY
        assert (scene.depth[1:][above] <= scene.depth[:-1][above]).all()


def test_night_is_dark_but_not_black():
    for seed in range(6):
        day, night = (luminance(render(seed, domain, (64, 128)).image) for domain in ("day", "night"))
        assert 10 < night.mean() < 0.5 * day.mean()
        assert night.max() > 200  # lamps, windows, headlights


def test_fog_reduces_contrast_with_distance():
    for seed in range(6):
        day, fog = render(seed, "day"), render(seed, "fog")
        airlight = fog.image[fog.label == SKY].mean(axis=0)
        contrast = np.abs(fog.image - airlight).mean(axis=-1)
        ground = fog.label != SKY
        near, far = ground & (fog.depth < 12), ground & (fog.depth > 60)
        assert contrast[far].mean() < 0.4 * contrast[near].mean()
        assert fog.image[far].std() < 0.5 * day.image[far].std()


def test_rain_reduces_saturation_and_brightness():
    for seed in range(6):
        day, rain = (render(seed, domain, (64, 128)).image for domain in ("day", "rain"))
        assert saturation(rain).mean() < 0.7 * saturation(day).mean()
        assert luminance(rain).mean() < luminance(day).mean()


def test_a_wet_road_mirrors_the_cars_on_it():
    def correlation(domain: str) -> float:
        """Correlation between road pixels below cars and the pixels at the same distance above the foot of the car."""
        below, above = [], []
        for seed in range(8):
            scene = render(seed, domain)
            reach = 9
            road = np.stack([scene.label[k : 129 - reach + k - 1] == ROAD for k in range(1, reach)]).all(axis=0)
            rows, columns = np.nonzero((scene.label[: road.shape[0]] == CAR) & road)
            rows, columns = rows[rows > reach], columns[rows > reach]
            for k in range(4, reach):
                below.append(scene.image[rows + k, columns].astype(float))
                above.append(scene.image[rows - k + 1, columns].astype(float))
        below, above = np.concatenate(below), np.concatenate(above)
        return float(np.corrcoef((below[:, 0] - below[:, 2]), (above[:, 0] - above[:, 2]))[0, 1])

    assert correlation("rain") > max(correlation("day"), correlation("fog")) + 0.2


def test_snow_brightens_the_ground():
    for seed in range(6):
        day, snow = render(seed, "day"), render(seed, "snow")
        for name, factor in ((ROAD, 1.3), (SIDEWALK, 1.15)):
            ground = day.label == name
            assert luminance(snow.image)[ground].mean() > factor * luminance(day.image)[ground].mean()


@pytest.mark.parametrize("seed", [-1, 1.0, "3", None, True])
def test_a_seed_that_is_not_a_non_negative_integer_is_rejected(seed):
    with pytest.raises(InputError, match=r"seed is .*; expected a non-negative integer. Pass one"):
        render(seed)


def test_numpy_integers_are_valid_seeds():
    assert np.array_equal(render(np.int64(3), size=(32, 32)).image, render(3, size=(32, 32)).image)


def test_an_unknown_domain_is_rejected():
    with pytest.raises(InputError, match="domain is 'dusk'; expected one of day, fog, night, rain, snow. Correct"):
        render(0, "dusk")


def test_a_size_below_the_minimum_is_rejected():
    with pytest.raises(InputError, match="size is 31 x 64; expected at least 32 pixels on each side. Use"):
        render(0, size=(31, 64))


@pytest.mark.parametrize("size", [(64,), (64, 64, 3), 64, (64.0, 64)])
def test_a_size_that_is_not_a_pair_of_integers_is_rejected(size):
    with pytest.raises(InputError, match=r"expected two integers, \(height, width\)"):
        render(0, size=size)
