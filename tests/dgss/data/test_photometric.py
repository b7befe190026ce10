"""Photometric distortion against the same steps with OpenCV's 8-bit HSV."""

import numpy as np
import pytest
import torch

from rein.dgss.data.photometric import Distortion, PhotometricDistort, hsv_to_rgb, rgb_to_hsv

cv2 = pytest.importorskip("cv2")


def pictures():
    """Noise, grey, nearly grey, and saturated colours, (H, W, 3).

    Widths are multiples of 64: OpenCV's vector code truncates colours, and its code for the last pixels of a row rounds them.
    """
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(4, 64, 1), 3, 2)
    nearly = np.clip(grey.astype(int) + random.integers(-3, 4, grey.shape), 0, 255).astype(np.uint8)
    hues = np.stack([np.arange(192) % 180, np.full(192, 255), np.full(192, 255)], -1).astype(np.uint8)[None]
    return {"noise": noise, "grey": grey, "nearly grey": nearly, "hues": cv2.cvtColor(hues, cv2.COLOR_HSV2RGB)}


PICTURES = pictures()


def convert(pixels, factor=1.0, offset=0.0):
    return np.clip(pixels.astype(np.float32) * np.float32(factor) + np.float32(offset), 0, 255).astype(np.uint8)


def reference(pixels, draw):
    """The rule, step by step, with OpenCV."""
    if draw.brightness is not None:
        pixels = convert(pixels, offset=draw.brightness)
    if draw.contrast is not None and draw.contrast_first:
        pixels = convert(pixels, draw.contrast)
    if draw.saturation is not None:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = convert(hsv[..., 1], draw.saturation)
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if draw.hue is not None:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + draw.hue) % 180
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if draw.contrast is not None and not draw.contrast_first:
        pixels = convert(pixels, draw.contrast)
    return pixels


def as_tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize("name", PICTURES)
def test_hue_saturation_and_value_are_those_of_opencv(name):
    pixels = PICTURES[name]
    found = torch.stack(rgb_to_hsv(as_tensor(pixels))).permute(1, 2, 0).numpy()
    assert np.array_equal(found, cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV))


def test_colours_are_those_of_opencv_for_every_hue():
    """Tolerance: 1 of 255 where float rounding decides, which happens to fewer than one value in a thousand."""
    random = np.random.default_rng(1)
    hsv = np.stack([np.arange(180).repeat(128).reshape(180, 128), *random.integers(0, 256, (2, 180, 128))], -1).astype(np.uint8)
    found = hsv_to_rgb(*torch.from_numpy(hsv).permute(2, 0, 1).int()).permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(found - cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001


STEPS = [
    Distortion(brightness=31.7),
    Distortion(brightness=-20.25),
    Distortion(contrast=1.43),
    Distortion(saturation=1.5),
    Distortion(saturation=0.61),
    Distortion(hue=17),
    Distortion(hue=-18),
]


@pytest.mark.parametrize("draw", STEPS, ids=str)
@pytest.mark.parametrize("name", PICTURES)
def test_each_step_is_that_of_opencv(name, draw):
    """Tolerance: that of the conversion above."""
    found = draw.apply(as_tensor(PICTURES[name])).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - reference(PICTURES[name], draw)).max() <= 1


@pytest.mark.parametrize("name", PICTURES)
def test_all_steps_together_are_those_of_opencv(name):
    """Tolerance: a difference of 1 before the last conversions may grow to a few; it is rare."""
    torch.manual_seed(0)
    for _ in range(40):
        draw = Distortion.draw()
        difference = np.abs(
            draw.apply(as_tensor(PICTURES[name])).permute(1, 2, 0).numpy().astype(int) - reference(PICTURES[name], draw)
        )
        assert (difference > 1).mean() < 0.002, draw


def test_the_order_of_contrast_and_saturation_counts():
    image = as_tensor(PICTURES["noise"])
    settings = {"contrast": 1.5, "saturation": 1.5}
    first, last = (Distortion(contrast_first=choice, **settings).apply(image) for choice in (True, False))
    assert (first != last).float().mean() > 0.2


def test_values_worked_out_by_hand():
    """Each result is clipped and then truncated, not rounded. A turn of 120 degrees is 60 steps: red becomes green."""
    image = torch.tensor([10, 200, 99], dtype=torch.uint8)[:, None, None]
    assert Distortion(brightness=-20.5).apply(image).flatten().tolist() == [0, 179, 78]
    assert Distortion(contrast=1.305).apply(image).flatten().tolist() == [13, 255, 129]
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    assert Distortion(hue=60).apply(red).flatten().tolist() == [0, 255, 0]
    assert Distortion(saturation=0.5).apply(red).flatten().tolist() == [
        255,
        127,
        127,
    ]  # saturation 127 of 255, and 128 - 2e-6 truncated


def test_the_draws_have_the_published_ranges_and_probabilities():
    torch.manual_seed(0)
    draws = [Distortion.draw() for _ in range(4000)]
    for name, low, high in (("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5), ("hue", -18, 17)):
        values = [getattr(draw, name) for draw in draws if getattr(draw, name) is not None]
        assert len(values) == pytest.approx(2000, abs=150)  # 5 standard deviations
        assert low <= min(values) < low + 0.02 * (high - low) + 1e-9
        assert high >= max(values) > high - 0.02 * (high - low) - 1e-9
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))
    assert {draw.hue for draw in draws} == {None, *range(-18, 18)}
    assert sum(draw.contrast_first for draw in draws) == pytest.approx(2000, abs=150)


def test_the_distortion_is_drawn_from_torchs_random_state():
    image = as_tensor(PICTURES["noise"])
    torch.manual_seed(3)
    draw = Distortion.draw()
    torch.manual_seed(3)
    assert torch.equal(PhotometricDistort()(image), draw.apply(image))
