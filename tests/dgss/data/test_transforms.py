import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from rein.dgss.data.transforms import PhotometricDistort, ScaleAndCrop, TrainingTransform, resized
from rein.errors import InputError


def pair(height=48, width=96):
    """Red and green encode the pixel's row and column; the label encodes the row in blocks of 8."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    image = torch.stack([rows * 2, columns * 2, torch.full_like(rows, 50)]).byte()
    return image, (rows // 8).byte()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [(48, 96), (96, 48), (20, 30)])
def test_image_and_label_move_together(seed, size):
    torch.manual_seed(seed)
    image, label = TrainingTransform(crop=32, photometric=False, max_share=1.0)(*pair(*size))
    assert image.shape == (3, 32, 32)
    assert label.shape == (32, 32)
    assert image.dtype == label.dtype == torch.uint8
    seen = label != 255
    row = image[0].float() / 2
    assert seen.any()
    assert (row[seen] // 8 - label[seen]).abs().max() <= 1
    inner = (row % 8 > 2) & (row % 8 < 6) & seen
    assert (row[inner] // 8 == label[inner]).float().mean() > 0.97


def test_padding_has_the_fill_colour_and_is_ignored():
    torch.manual_seed(0)
    image, label = ScaleAndCrop(32, scales=(0.5, 0.5), max_share=1.0, fill=(9, 8, 7))(*pair(40, 40))
    assert (label[:16, :16] != 255).all()
    assert (label[16:] == 255).all()
    assert (label[:, 16:] == 255).all()
    assert image[:, 20, 20].tolist() == [9, 8, 7]


def test_cutting_before_scaling_equals_scaling_before_cutting():
    """Tolerance: a cut in whole source pixels may be off by half a pixel."""
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 12, generator=generator), (60, 120), mode="bicubic")[0]
    image = (smooth.clamp(0, 1) * 255).byte()
    transform = ScaleAndCrop(40, scales=(1.5, 1.5), max_share=1.0)
    state = torch.get_rng_state()
    got, _ = transform(image, torch.zeros(60, 120, dtype=torch.uint8))
    torch.set_rng_state(state)
    torch.randint(16, ())
    top, left = int(torch.randint(60 - 40 + 1, ())), int(torch.randint(120 - 40 + 1, ()))
    whole = TF.resize(image, [60, 120], antialias=True)
    assert (got.int() - whole[:, top : top + 40, left : left + 40].int()).abs().float().mean() < 2


def test_the_shortest_edge_is_between_the_scales_times_the_crop():
    transform = ScaleAndCrop(64, scales=(0.5, 2.0))
    assert transform.edges[0] == 32
    assert transform.edges[-1] == 128
    torch.manual_seed(0)
    zooms = set()
    for _ in range(40):
        _, label = ScaleAndCrop(32, max_share=1.0)(*pair(64, 128))
        zooms.add(int((label[:, 0] != 255).sum()))
    assert min(zooms) == 16  # half the crop, the rest is padding
    assert max(zooms) == 32


def test_few_crops_exceed_the_largest_share_of_a_class():
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[:, 48:] = 1
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    torch.manual_seed(0)
    cut = ScaleAndCrop(32, scales=(2.0, 2.0), max_share=0.75)
    free = ScaleAndCrop(32, scales=(2.0, 2.0), max_share=1.0)

    def crowded(transform):
        shares = [torch.bincount(transform(image, label)[1].flatten().long(), minlength=2) / 1024 for _ in range(60)]
        return sum(float(share.max()) >= 0.75 for share in shares)

    assert crowded(free) > 30
    assert crowded(cut) < 20  # all ten attempts may fail


def test_photometric_distortion_keeps_the_order_of_the_channels():
    """Red stays the strongest channel: OpenMMLab's distortion does not permute channels."""
    image = torch.tensor([200, 60, 20], dtype=torch.uint8)[:, None, None].expand(-1, 8, 8).contiguous()
    torch.manual_seed(0)
    for _ in range(60):
        red, green, blue = PhotometricDistort()(image).float().mean((1, 2))
        assert red > max(green, blue)


@pytest.mark.parametrize("crop", [None, 32])
def test_the_transform_does_not_modify_its_input(crop):
    """Data sets may keep their samples, as `Scenes` does."""
    image, label = pair()
    expected = image.clone(), label.clone()
    torch.manual_seed(0)
    for _ in range(20):
        TrainingTransform(crop)(image, label)
        assert torch.equal(image, expected[0])
        assert torch.equal(label, expected[1])


def test_resized_images_keep_their_aspect_ratio():
    image = torch.zeros(3, 50, 100, dtype=torch.uint8)
    assert resized(image, None) is image
    assert resized(image, 25).shape == (3, 25, 50)
    assert resized(image.mT, 100).shape == (3, 200, 100)


@pytest.mark.parametrize("settings", [{"crop": 0}, {"crop": 8, "scales": (0.0, 1.0)}, {"crop": 8, "scales": (2, 1)}])
def test_invalid_crops_and_scales_are_refused(settings):
    with pytest.raises(InputError, match="expected crop >= 1, "):
        ScaleAndCrop(**settings)


def test_an_invalid_share_is_refused():
    with pytest.raises(InputError, match="max_share is 0; expected .* 0 < max_share <= 1"):
        ScaleAndCrop(8, max_share=0)
