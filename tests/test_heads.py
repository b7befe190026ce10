"""Tests that every head must pass: a new head is one new entry of `HEADS`."""

import pytest
import torch

import rein
from rein import heads
from rein.errors import InputError

SMALL = {"channels": 64, "encoder_layers": 1, "decoder_layers": 3, "num_points": 200, "attention_heads": 4}
SMALL |= {"encoder_feedforward": 32, "decoder_feedforward": 32}
HEADS = {
    "linear, one map": lambda k: heads.LinearHead(12, k),
    "linear, four maps": lambda k: heads.LinearHead([12, 12, 12, 12], k, dropout=0.5),
    "fpn": lambda k: heads.FPNHead([12, 12, 12, 12], k, channels=16, tower_channels=8),
    "mask2former": lambda k: heads.Mask2FormerHead([12] * 4, k, num_queries=8, **SMALL),
    "linked mask2former": lambda k: heads.Mask2FormerHead([12] * 4, k, **SMALL),
    "smp dpt": lambda k: heads.DecoderHead([12] * 4, k, "dpt", options={"intermediate_channels": [8] * 4, "fusion_channels": 8}),
    "smp upernet": lambda k: heads.DecoderHead([12] * 4, k, "upernet", options={"decoder_channels": 16}),
    "smp segformer": lambda k: heads.DecoderHead([12] * 4, k, "segformer", options={"segmentation_channels": 16}),
    "smp fpn": lambda k: heads.DecoderHead([12] * 4, k, "fpn", options={"pyramid_channels": 16, "segmentation_channels": 64}),
}
every_head = pytest.mark.parametrize("name", HEADS)


def make(name, num_classes=5):
    torch.manual_seed(0)
    return HEADS[name](num_classes)


def queries_for(head):
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(3)) if head.uses_queries else None


def maps_for(head, sizes=((4, 6),) * 4, batch=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, c, *size, generator=generator) for c, size in zip(head.in_channels, sizes, strict=False)]


@every_head
@pytest.mark.parametrize("num_classes", [2, 19])
def test_logits_have_one_channel_per_class(name, num_classes):
    head = make(name, num_classes)
    logits = head(maps_for(head), queries_for(head))
    assert logits.shape[:2] == (2, num_classes)
    assert logits.shape[2] * 6 == logits.shape[3] * 4


@every_head
@pytest.mark.parametrize("num_classes", [0, 1, 256])
def test_a_head_has_two_classes_or_more(name, num_classes):
    """With one class, the softmax is always 1 and the loss always 0."""
    with pytest.raises(
        InputError, match=rf"num_classes is {num_classes}; it must be 2 to 255. For a binary .* count two classes"
    ):
        make(name, num_classes)


@every_head
@pytest.mark.parametrize(
    "sizes", [((16, 24), (8, 12), (4, 6), (2, 3)), ((7, 5), (7, 5), (7, 5), (7, 5)), ((15, 9), (8, 5), (4, 3), (2, 2))]
)
def test_pyramids_and_odd_sizes_are_accepted(name, sizes):
    head = make(name)
    logits = head(maps_for(head, sizes), queries_for(head))
    assert torch.isfinite(logits).all()
    assert logits.shape[-2] >= sizes[0][0]


@every_head
def test_every_parameter_gets_a_gradient_and_the_loss_falls(name):
    head = make(name)
    maps = maps_for(head)
    labels = (
        torch.randint(0, 5, (2, 2, 3), generator=torch.Generator().manual_seed(2))
        .repeat_interleave(16, 1)
        .repeat_interleave(16, 2)
    )
    labels[:, :4] = 255
    head.eval()
    optimizer = torch.optim.Adam(head.parameters(), 0.003 if "mask2former" in name else 0.03)
    losses = []
    for _ in range(150):
        loss = head.loss(maps, labels, queries_for(head))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@every_head
def test_every_parameter_gets_a_gradient_from_the_logits(name):
    head = make(name).eval()
    head(maps_for(head), queries_for(head)).square().sum().backward()
    assert [key for key, p in head.named_parameters() if p.grad is None] == []


@every_head
def test_class_weights_change_the_loss_and_are_arguments(name):
    head = make(name).eval()
    assert not {"class_weights", "loss"} & head.arguments.keys()  # older versions read the file of such a head
    weighted = type(head)(**head.arguments, class_weights=[1.0, 0.5, 2.0, 0.0, 3.0]).eval()
    weighted.load_state_dict(head.state_dict())  # the weights are no part of it
    labels = torch.arange(5).repeat(2, 32, 10)[..., :48]
    losses = []
    for each in (head, weighted, type(head)(**weighted.arguments).eval()):
        each.load_state_dict(head.state_dict())
        torch.manual_seed(0)  # the points of Mask2Former's loss
        losses.append(each.loss(maps_for(head), labels, queries_for(head)).item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert losses[1] == losses[2]


@pytest.mark.parametrize("name", [name for name in HEADS if "mask2former" not in name])
@pytest.mark.parametrize("loss", ["dice", "focal", {"cross_entropy": 1.0, "dice": 0.5}])
def test_a_head_trains_with_other_losses(name, loss):
    head = make(name).eval()
    head = type(head)(**head.arguments, loss=loss).eval()
    assert type(head)(**head.arguments).arguments == head.arguments
    maps, labels = maps_for(head), torch.zeros(2, 32, 48, dtype=torch.long)
    labels[:, :, 20:], labels[:, :4] = 3, 255
    optimizer = torch.optim.Adam(head.parameters(), 0.03)
    losses = []
    for _ in range(20):
        loss = head.loss(maps, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    ignored = head.loss(maps, torch.full_like(labels, 255))
    optimizer.zero_grad()
    ignored.backward()
    assert ignored.item() == 0
    assert all((p.grad == 0).all() for p in head.parameters())


@every_head
def test_the_loss_ignores_pixels_of_255_and_is_zero_if_all_are_ignored(name):
    head = make(name).eval()
    maps, labels = maps_for(head), torch.zeros(2, 32, 48, dtype=torch.long)
    labels[:, :, 24:] = 255
    if "mask2former" not in name:  # its loss is not a cross-entropy per pixel
        logits = torch.nn.functional.interpolate(head(maps), (32, 48), mode="bilinear")
        expected = -logits.log_softmax(1)[:, 0, :, :24].mean()
        assert head.loss(maps, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    if "mask2former" in name:  # the queries of an image without labels are "no object"
        head = type(head)(**{**head.arguments, "no_object_weight": 0.0}).eval()
    loss = head.loss(maps, torch.full_like(labels, 255), queries_for(head))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in head.parameters())


@every_head
def test_arguments_build_an_identical_head(name):
    head = make(name).eval()
    again = type(head)(**head.arguments).eval()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(maps_for(head), queries_for(head)), head(maps_for(head), queries_for(head)))


@every_head
def test_maps_that_do_not_fit_are_an_error(name):
    head = make(name)
    maps = maps_for(head)
    with pytest.raises(InputError, match=r"expects maps \(B, C, h, w\) with C = \[12.*got shapes"):
        head([m[:, :7] for m in maps])
    with pytest.raises(InputError, match="got shapes"):
        head([*maps, maps[0]])
    with pytest.raises(InputError, match="got shapes"):
        head([m.flatten(2) for m in maps])


@pytest.mark.parametrize(("channels", "classes"), [([], 5), ([12, 0], 5), (12, 0), (12, 256), ("12", 5), (12, "5")])
def test_invalid_channels_or_classes_are_an_error(channels, classes):
    with pytest.raises(InputError, match="must be"):
        heads.LinearHead(channels, classes)


def test_a_constant_map_stays_constant_through_the_pyramid():
    pyramid = heads.FeaturePyramid()
    maps = pyramid([torch.full((1, 2, 6, 10), float(i)) for i in range(4)])
    assert [tuple(m.shape[-2:]) for m in maps] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert all(torch.equal(m, torch.full_like(m, i)) for i, m in enumerate(maps))
    assert [tuple(m.shape[-2:]) for m in pyramid([torch.zeros(1, 2, 1, 1)] * 4)] == [(4, 4), (2, 2), (1, 1), (1, 1)]
    with pytest.raises(InputError, match="FeaturePyramid expects 4 maps, one per scale, got 3"):
        pyramid(maps[:3])


@every_head
def test_predict_gives_logits_of_any_size(name):
    head = make(name).eval()
    maps, queries = maps_for(head), queries_for(head)
    assert head.predict(maps, (33, 50), queries).shape == (2, 5, 33, 50)
    logits = head(maps, queries)
    assert torch.allclose(head.predict(maps, tuple(logits.shape[-2:]), queries), logits, atol=1e-5)


@every_head
def test_probabilities_sum_to_one_and_have_the_same_best_class(name):
    head = make(name).eval()
    logits = head.predict(maps_for(head), (33, 50), queries_for(head))
    probabilities = head.probabilities(logits)
    assert probabilities.shape == logits.shape
    assert (probabilities >= 0).all()
    assert torch.allclose(probabilities.sum(1), torch.ones(2, 33, 50), atol=1e-5)
    assert torch.equal(probabilities.argmax(1), logits.argmax(1))


def test_probabilities_of_semantic_scores_are_their_shares():
    scores = torch.tensor([0.2, 0.6, 0.0]).view(1, 3, 1, 1)
    assert torch.allclose(make("mask2former", 3).probabilities(scores).flatten(), torch.tensor([0.25, 0.75, 0.0]))
    assert make("mask2former", 3).probabilities(torch.zeros(1, 3, 1, 1)).isfinite().all()


@every_head
@pytest.mark.filterwarnings("ignore")
def test_a_head_trains_under_half_precision_autocast(name):
    head = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(maps_for(head), torch.zeros(2, 32, 48, dtype=torch.long), queries_for(head))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


@every_head
@pytest.mark.filterwarnings("ignore")
def test_a_head_compiles_without_graph_breaks(name):
    head = make(name).eval()
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = head(maps_for(head), queries_for(head))
        assert torch.allclose(compiled(maps_for(head), queries_for(head)), expected, atol=1e-4)


def test_a_missing_library_is_an_error_with_the_extra_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.decoders.dpt.decoder", None)
    with pytest.raises(rein.MissingExtraError, match=r"pip install 'rein-adapter\[heads\]'"):
        heads.DecoderHead([12] * 4, 5, "dpt")
    monkeypatch.setitem(sys.modules, "transformers.models.mask2former.modeling_mask2former", None)
    with pytest.raises(rein.MissingExtraError, match=r"pip install 'rein-adapter\[mask2former\]'"):
        heads.Mask2FormerHead([12] * 4, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "nosuch"}, "decoder is 'nosuch'; expected one of dpt, upernet, segformer, fpn"),
        ({"in_channels": [12] * 3}, "expects four maps"),
        ({"options": {"colour": 3}}, "cannot be built with options"),
        ({"decoder": "fpn", "options": {"merge_policy": "foo"}}, "cannot be built with options"),
        (
            {"options": {"encoder_output_strides": [4, 8, 16, 32], "readout": "cat"}},
            "encoder_output_strides, readout .* are set from",
        ),
        ({"dropout": 2}, "dropout is 2"),
    ],
)
def test_invalid_decoder_settings_are_an_error(settings, message):
    with pytest.raises(InputError, match=message):
        heads.DecoderHead(**{"in_channels": [12] * 4, "num_classes": 5, **settings})


@every_head
def test_a_head_trains_on_a_single_small_image(name):
    head = make(name).train()
    loss = head.loss([m[:1] for m in maps_for(head, ((1, 1),) * 4)], torch.zeros(1, 8, 8, dtype=torch.uint8), queries_for(head))
    loss.backward()
    assert torch.isfinite(loss)
    assert not [module for module in head.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]


@every_head
def test_a_head_in_double_precision_gives_double_precision(name):
    head = make(name).double()
    maps, queries = [m.double() for m in maps_for(head)], queries_for(head)
    queries = queries if queries is None else queries.double()
    assert head.predict(maps, (20, 30), queries).dtype == torch.float64
    assert torch.isfinite(head.loss(maps, torch.zeros(2, 32, 48, dtype=torch.long), queries))
