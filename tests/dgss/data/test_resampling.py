"""Resizing of images and labels against OpenCV, and against values worked out by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rein.dgss.data.resampling import fitted_size, halve_image, halve_label, resize_label
from rein.resizing import resize_image

cv2 = pytest.importorskip("cv2")
# (height, width) before and after, larger and smaller; the first six are those of the published settings
SIZES = [
    ((1024, 2048), (512, 1024)),
    ((1080, 1920), (540, 960)),
    ((1052, 1914), (512, 931)),
    ((720, 1280), (307, 546)),
    ((760, 1280), (1024, 1725)),
    ((1500, 2000), (512, 683)),
    ((33, 47), (101, 64)),
    ((97, 130), (31, 200)),
    ((5, 3), (1, 1)),
    ((1, 1), (4, 7)),
]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_an_image_is_resized_as_by_opencv(before, after):
    """Tolerance: none, with OpenCV 5.0's generic code; 1 of 255 for builds with another arithmetic."""
    pixels = noise(*before)
    expected = cv2.resize(pixels, after[::-1], interpolation=cv2.INTER_LINEAR)
    found = resize_image(as_tensor(pixels), after).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert abs((found.astype(int) - expected).mean()) < 0.01  # no systematic difference


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_a_label_is_resized_as_by_opencv(before, after):
    label = noise(*before)[..., 0]
    expected = cv2.resize(label, after[::-1], interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(resize_label(torch.from_numpy(label), after).numpy(), expected)


def test_values_worked_out_by_hand():
    """Half the size: the mean of two by two pixels. Twice the size: positions at quarters, the border is repeated."""
    row = torch.tensor([[[0, 100, 200, 40]]], dtype=torch.uint8)
    assert resize_image(row.expand(1, 2, 4), (1, 2)).tolist() == [[[50, 120]]]
    assert resize_image(row[..., :2], (1, 4)).tolist() == [[[0, 25, 75, 100]]]
    assert resize_label(row[0], (1, 2)).tolist() == [[0, 200]]
    assert resize_label(row[0, :, :3], (1, 2)).tolist() == [[0, 100]]  # positions 0 and 1.5


def test_no_pixel_is_averaged_when_an_image_shrinks():
    """With antialias, a line of one pixel would leave a trace in the quarter of the size; without, it falls between two positions."""
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[:, :, 0] = 255
    assert resize_image(image, (2, 2)).max() == 0


@pytest.mark.parametrize("after", [(40, 50), (203, 301)])
def test_a_part_equals_the_part_of_the_whole(after):
    pixels = noise(90, 120)
    image, label = as_tensor(pixels), torch.from_numpy(pixels[..., 0])
    for rows, columns in [((0, 17), (0, 50)), ((13, 40), (3, 4)), ((39, 40), (21, 50))]:
        part = slice(*rows), slice(*columns)
        assert torch.equal(resize_image(image, after, part), resize_image(image, after)[:, part[0], part[1]])
        assert torch.equal(resize_label(label, after, part), resize_label(label, after)[part])


def test_an_unchanged_size_is_the_same_image():
    image = as_tensor(noise(4, 5))
    assert resize_image(image, (4, 5)) is image
    assert resize_label(image[0], (4, 5)) is image[0] or torch.equal(resize_label(image[0], (4, 5)), image[0])


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((1024, 2048), (1024, 512), (512, 1024)),  # Cityscapes
        ((720, 1280), (1280, 720), (720, 1280)),  # BDD100K
        ((1080, 1920), (960, 540), (540, 960)),  # ACDC
        ((1500, 2000), (1024, 512), (512, 683)),  # 4:3, the short edge limits: 2000 * 512 / 1500 = 682.67
        ((2000, 1500), (1024, 512), (683, 512)),  # upright
        ((1000, 3000), (1024, 512), (341, 1024)),  # the long edge limits: 1000 * 1024 / 3000 = 341.33
        ((240, 320), (1024, 512), (512, 683)),  # small images are enlarged
        ((1, 5000), (1024, 512), (1, 1024)),  # no side vanishes
    ],
)
def test_an_image_is_fitted_into_the_box_with_its_aspect_ratio(size, box, expected):
    assert fitted_size(size, *box) == expected


def test_an_image_is_halved_with_pillows_filter_and_stored_as_jpeg():
    pixels = noise(31, 45)
    halved = Image.fromarray(pixels).resize((22, 15), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    halved.save(buffer, "JPEG", quality=75)
    expected = np.array(Image.open(buffer))
    found = halve_image(as_tensor(pixels)).permute(1, 2, 0).numpy()
    assert found.shape == (15, 22, 3)
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, np.array(halved))


def test_a_side_of_one_pixel_is_not_halved():
    assert halve_image(as_tensor(noise(1, 3))).shape == (3, 1, 1)
    assert halve_label(torch.zeros(1, 3, dtype=torch.uint8)).shape == (1, 1)


def test_a_label_is_halved_to_one_of_its_own_pixels():
    label = torch.arange(30, dtype=torch.uint8).reshape(5, 6)
    halved = halve_label(label)
    assert halved.shape == (2, 3)
    assert set(halved.flatten().tolist()) <= set(label.flatten().tolist())
    assert halve_label(label[:4]).tolist() == [
        [7, 9, 11],
        [19, 21, 23],
    ]  # Pillow takes the pixel at the middle of each two by two
