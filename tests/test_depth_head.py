"""`DepthHead`: the depth that it predicts, its loss, training, and files."""

import copy
import math

import pytest
import torch

import rein
from models import amplify_adapter, build, images
from rein import heads
from rein.errors import InputError

FPN = {"decoder": "FPNHead", "decoder_settings": {"channels": 16, "tower_channels": 8}}
DPT = {"decoder": "DecoderHead", "decoder_settings": {"options": {"intermediate_channels": [8] * 4, "fusion_channels": 8}}}
every_decoder = pytest.mark.parametrize("settings", [{}, FPN, DPT], ids=["linear", "fpn", "dpt"])


def make(**settings):
    torch.manual_seed(0)
    return heads.DepthHead([32] * 4, **{"num_bins": 16, "depth_range": (2.0, 50.0), **settings}).eval()


def maps(batch=2, height=4, width=6):
    torch.manual_seed(1)
    return [torch.randn(batch, 32, height, width) for _ in range(4)]


class Fixed(torch.nn.Module):
    """A decoder that gives the same logits for every pixel."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, maps):
        return self.logits[None, :, None, None].expand(len(maps[0]), -1, 4, 6)


def test_the_depth_is_the_weighted_geometric_mean_of_evenly_spaced_logarithms():
    head = make(num_bins=3, depth_range=(1.0, 100.0))  # the depths are 1, 10 and 100
    head.decoder = Fixed(torch.tensor([0.5, 0.25, 0.25]).log())
    expected = 1.0**0.5 * 10.0**0.25 * 100.0**0.25
    assert torch.allclose(head.predict(maps(), (8, 12)), torch.full((2, 1, 8, 12), expected), rtol=1e-6)


@every_decoder
def test_the_depth_has_the_size_of_the_image_and_stays_in_the_range(settings):
    head = make(**settings)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(100)
    depth = head.predict(maps(), (45, 70))
    assert depth.shape == (2, 1, 45, 70)
    assert 2.0 * (1 - 1e-5) <= depth.min() < depth.max() <= 50.0 * (1 + 1e-5)


def reference_loss(predicted, true, weight):
    """Equation 4 of Eigen et al., image by image and pixel by pixel."""
    losses = []
    for d, t in zip(predicted.flatten(1).tolist(), true.flatten(1).tolist(), strict=True):
        g = [math.log(one) - math.log(other) for one, other in zip(d, t, strict=True) if 2.0 <= other <= 50.0]
        if g:
            losses.append(sum(e * e for e in g) / len(g) - weight * (sum(g) / len(g)) ** 2)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_loss_is_the_scale_invariant_error_over_the_known_pixels(weight):
    head = make(scale_invariance=weight)
    depth = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(2)) * 60
    depth[1, 0, :4] = torch.tensor([0.0, math.nan, math.inf, -1.0])
    depth[2] = 1000.0  # sky: this image does not count
    predicted = head.predict(maps(3), (4, 6))[:, 0]
    assert head.loss(maps(3), depth).item() == pytest.approx(reference_loss(predicted, depth, weight), rel=1e-5)


def test_a_common_factor_costs_nothing_if_the_loss_is_fully_scale_invariant():
    known = torch.full((2, 4, 6), 10.0)
    head = make(scale_invariance=1.0)
    head.decoder = Fixed(torch.randn(16))
    assert head.loss(maps(), known).item() == pytest.approx(0, abs=1e-6)
    head = make(scale_invariance=0.5)
    head.decoder = Fixed(torch.randn(16))
    assert head.loss(maps(), known) > 1e-3


def test_without_a_known_pixel_loss_and_gradients_are_zero():
    head = make()
    loss = head.loss(maps(), torch.full((2, 32, 48), math.nan))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@every_decoder
def test_every_parameter_gets_a_gradient_and_the_error_falls(settings):
    head, features = make(**settings), maps()
    depth = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(2)).mul(40).add(3)
    depth = depth.repeat_interleave(16, 1).repeat_interleave(16, 2)
    optimizer = torch.optim.Adam(head.parameters(), 0.03)
    losses = []
    for _ in range(60):
        loss = head.loss(features, depth)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_a_segmenter_trains_on_depth_of_any_size_saves_it_and_loads_it(tmp_path):
    torch.manual_seed(0)
    bare = build("vit with registers")
    segmenter = rein.Segmenter(amplify_adapter(rein.wrap(copy.deepcopy(bare))), make(**FPN))
    x, depth = images(2, 27, 44), torch.full((2, 27, 44), 7.0)
    optimizer = torch.optim.AdamW(rein.param_groups(segmenter, lr=1e-2))
    for _ in range(40):
        loss = segmenter(x, depth)
        optimizer.zero_grad()
        loss.backward()
        assert segmenter.backbone.rein.tokens_a.grad.any()
        optimizer.step()
    predicted = segmenter.predict(x)
    assert predicted.shape == (2, 1, 27, 44)
    assert (predicted - 7.0).abs().mean() < 0.7
    segmenter.save(tmp_path / "depth.safetensors")
    again = rein.Segmenter.load(tmp_path / "depth.safetensors", bare)
    assert again.head.arguments == segmenter.head.arguments
    assert torch.equal(again.predict(x), predicted)
    windows = again.predict(x, window=24, stride=12, flip=True)
    assert windows.shape == (2, 1, 27, 44)


def test_padding_does_not_change_the_loss():
    """The padded pixels have no depth; here they would change the mean if they had one."""
    torch.manual_seed(0)
    segmenter = rein.Segmenter(rein.wrap(build("vit with registers")), make(num_bins=3)).eval()
    segmenter.head.decoder = Fixed(torch.tensor([0.1, 0.2, 0.3]))
    losses = [segmenter(images(1, *size), torch.full((1, *size), 7.0)) for size in ((32, 32), (25, 31))]
    assert torch.allclose(*losses)


def test_a_large_range_does_not_prevent_a_small_head_from_loading(tmp_path):
    bare = build("vit with registers")
    segmenter = rein.Segmenter(rein.wrap(copy.deepcopy(bare)), make(depth_range=(1.0, 1e9)))
    segmenter.save(tmp_path / "depth.safetensors")
    assert rein.Segmenter.load(tmp_path / "depth.safetensors", bare).head.settings["depth_range"] == [1.0, 1e9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_half_and_double_precision_give_depth_of_at_least_single_precision(dtype):
    depth = make().to(dtype).predict([each.to(dtype) for each in maps()], (8, 12))
    assert depth.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(2, 32, 32, dtype=torch.long), r"are torch.int64 of shape \(2, 32, 32\); expected the depth of every pixel"),
        (
            torch.ones(2, 1, 32, 32),
            r"of shape \(2, 1, 32, 32\); expected .* of shape \(2, 32, 32\), .* with 0 for an unknown depth",
        ),
        (torch.ones(2, 32, 31), r"of shape \(2, 32, 31\)"),
        ([1.0], "are list; expected"),
    ],
)
def test_labels_that_are_no_depth_are_refused(labels, message):
    segmenter = rein.Segmenter(rein.wrap(build("vit with registers")), make())
    with pytest.raises(InputError, match=message):
        segmenter(images(), labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_bins": 1}, "num_bins is 1; it must be an integer from 2 to 255"),
        ({"num_bins": 2.5}, "num_bins is 2.5; it must be an integer"),
        ({"depth_range": (0, 80)}, r"depth_range is \(0, 80\); it must be two finite numbers above 0"),
        ({"depth_range": (80, 1)}, "the smaller one first"),
        ({"depth_range": (1, math.inf)}, "two finite numbers"),
        ({"depth_range": 80}, "depth_range is 80; it must be two"),
        ({"depth_range": ("1", "80")}, "it must be two"),
        ({"scale_invariance": 1.5}, "scale_invariance is 1.5; it must be a number from 0 to 1"),
        ({"decoder": "Mask2FormerHead"}, "decoder is 'Mask2FormerHead'; expected one of LinearHead, FPNHead, DecoderHead"),
        ({"decoder": []}, r"decoder is \[\]; expected one of"),
        (
            {"decoder_settings": {"width": 3}},
            "decoder_settings is {'width': 3}; expected arguments of LinearHead without .* 'width'",
        ),
        ({"decoder_settings": {"loss": "dice"}}, "decoder_settings has loss; a DepthHead has a loss of its own. Leave them out"),
        ({"decoder_settings": 3}, "decoder_settings is 3; expected a dictionary"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make(**settings)


def test_a_recipe_refuses_the_depth_head_because_it_trains_segmentations():
    from rein.dgss.training.experiment import make_head

    with pytest.raises(InputError, match="the head 'DepthHead' does not exist; expected one of DecoderHead, FPNHead, LinearHead"):
        make_head("DepthHead", build("vit"), 5, {})
