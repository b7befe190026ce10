import pytest
import torch

from rein.dgss.data.resampling import resize_label
from rein.dgss.data.transforms import Normalize, ScaleAndCrop, TrainingTransform
from rein.errors import InputError
from rein.resizing import resize_image


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


def test_padding_has_the_fill_colour_is_ignored_and_is_not_distorted():
    torch.manual_seed(0)
    transform = TrainingTransform(32, scales=(0.5, 0.5), max_share=1.0, fill=(9, 8, 7))
    seen = set()
    for _ in range(20):
        image, label = transform(*pair(40, 40))
        assert (label[:16, :16] != 255).all()
        assert (label[16:] == 255).all()
        assert (label[:, 16:] == 255).all()
        assert image[:, 16:].flatten(1).unique(dim=1).tolist() == [[9], [8], [7]]
        assert image[:, :, 16:].flatten(1).unique(dim=1).tolist() == [[9], [8], [7]]
        seen.add(int(image[2, 0, 0]))
    assert len(seen) > 5  # the image itself is distorted


def test_the_padding_is_normalised_to_zero():
    """Within 0.01: the mean colour is rounded to 8 bits."""
    padding = torch.tensor(TrainingTransform(8).fill, dtype=torch.uint8)[:, None, None]
    assert Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(padding).abs().max() < 0.01


@pytest.mark.parametrize("size", [(60, 120), (150, 90)])
def test_a_crop_equals_a_cut_from_the_resized_image(size):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    label = torch.randint(0, 3, size, generator=generator, dtype=torch.uint8)
    transform = ScaleAndCrop(40, scales=(1.5, 1.5), max_share=1.0)
    scaled = transform.scaled_size(size, 60)
    for seed in range(10):
        torch.manual_seed(seed)
        got = transform(image, label)
        torch.manual_seed(seed)
        torch.randint(16, ())
        top, left = (int(torch.randint(side - 40 + 1, ())) for side in scaled)
        cut = slice(top, top + 40), slice(left, left + 40)
        assert torch.equal(got[0], resize_image(image, scaled)[:, cut[0], cut[1]])
        assert torch.equal(got[1], resize_label(label, scaled)[cut])


@pytest.mark.parametrize("crop", [512, 1024])
def test_the_shortest_edges_are_those_of_the_published_settings(crop):
    """int(51.2 k) or int(102.4 k) for k from 5 to 20, in integers."""
    assert ScaleAndCrop(crop).edges == [crop * k // 10 for k in range(5, 21)]


def test_the_longest_edge_has_at_most_four_crops():
    transform = ScaleAndCrop(512)
    assert transform.scaled_size((1052, 1914), 307) == (307, 559)  # 1914 * 307 / 1052 = 558.55
    assert transform.scaled_size((1052, 1914), 1024) == (1024, 1863)  # 1863.05
    assert transform.scaled_size((1024, 2048), 1024) == (1024, 2048)
    assert transform.scaled_size((500, 2000), 1024) == (512, 2048)  # 4096 would be too long
    assert ScaleAndCrop(1024).scaled_size((1080, 1920), 2048) == (2048, 3641)  # 3640.89
    assert ScaleAndCrop(1024).scaled_size((500, 2000), 2048) == (1024, 4096)


def test_all_sixteen_scales_are_drawn():
    torch.manual_seed(0)
    transform = ScaleAndCrop(32, max_share=1.0)
    sizes = {transform(*pair(64, 128))[1].shape[0] for _ in range(200)}
    assert sizes == {min(edge, 32) for edge in transform.edges}


def test_few_crops_exceed_the_largest_share_of_a_class():
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[:, 48:] = 1
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    torch.manual_seed(0)
    cut = ScaleAndCrop(32, scales=(2.0, 2.0))
    free = ScaleAndCrop(32, scales=(2.0, 2.0), max_share=1.0)

    def crowded(transform):
        shares = [torch.bincount(transform(image, label)[1].flatten().long(), minlength=2) / 1024 for _ in range(60)]
        return sum(float(share.max()) >= 0.75 for share in shares)

    assert crowded(free) > 30
    assert crowded(cut) < 20  # all ten attempts may fail


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


@pytest.mark.parametrize("settings", [{"crop": 0}, {"crop": 8, "scales": (0.0, 1.0)}, {"crop": 8, "scales": (2, 1)}])
def test_invalid_crops_and_scales_are_refused(settings):
    with pytest.raises(InputError, match="expected crop >= 1, "):
        ScaleAndCrop(**settings)


def test_an_invalid_share_is_refused():
    with pytest.raises(InputError, match="max_share is 0; expected .* 0 < max_share <= 1"):
        ScaleAndCrop(8, max_share=0)
