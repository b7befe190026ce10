"""`Mask2FormerHead`: queries, loss, inference from masks, and training."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

import rein
from models import build, images
from rein import heads
from rein.dgss.scenes import render
from rein.errors import InputError
from rein.heads.masks import instance_inference, panoptic_inference, semantic_inference
from test_heads import SMALL, maps_for, queries_for


def make(num_classes=5, **settings):
    torch.manual_seed(0)
    return heads.Mask2FormerHead([12] * 4, num_classes, **{**SMALL, **settings})


def test_the_defaults_are_those_of_the_paper():
    head = heads.Mask2FormerHead([1024] * 4, 19)
    assert len(head.pixel_decoder.encoder.layers) == 6
    assert len(head.decoder.layers) == 9
    assert head.decoder.layers[0].fc1.out_features == 2048
    assert head.class_predictor.out_features == 20
    criterion = head.criterion
    assert (criterion.num_points, criterion.oversample_ratio, criterion.importance_sample_ratio) == (12544, 3.0, 0.75)
    assert criterion.empty_weight.tolist() == [1.0] * 19 + [pytest.approx(0.1)]
    matcher = criterion.matcher
    assert (matcher.cost_class, matcher.cost_mask, matcher.cost_dice) == (2.0, 5.0, 5.0)
    assert head.settings["weights"] == [2.0, 5.0, 5.0]
    assert not [module for module in head.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]


def test_adapter_queries_are_the_positions_and_a_linear_layer_gives_the_features():
    head, queries = make(), torch.randn(6, 64)
    positions, features = head._query_embeddings(queries)
    assert torch.equal(positions, queries)
    assert torch.equal(features, F.linear(queries, head.query_features.weight, head.query_features.bias))
    assert not any("query_positions" in name for name, _ in head.named_parameters())
    learned = make(num_queries=7)
    assert {name for name, _ in learned.named_parameters() if "query" in name} == {
        "query_features.weight",
        "query_positions.weight",
    }


def test_gradients_reach_the_tokens_through_the_queries():
    model = rein.wrap(build("vit"), rein.ReinConfig(num_tokens=6, query_dim=64))
    head = heads.Mask2FormerHead([32] * 4, 3, **SMALL)
    segmenter = rein.Segmenter(model, head)
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    segmenter(images(), labels).backward()
    assert (model.rein.query_merge.weight.grad.abs() > 0).any()
    assert all(p.grad is not None for p in segmenter.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["frozen", "without queries"])
def test_the_head_learns_queries_if_the_backbone_has_none(method, tmp_path):
    backbone = build("vit")
    if method == "without queries":
        rein.wrap(backbone, rein.ReinConfig(num_tokens=6, query_dim=None))
    else:
        backbone.requires_grad_(False)
    segmenter = rein.Segmenter(backbone, heads.Mask2FormerHead([32] * 4, 3, **SMALL))
    assert segmenter.head.settings["num_queries"] == 100
    segmenter(images(), torch.zeros(2, 32, 32, dtype=torch.long)).backward()
    assert all(p.grad is not None for p in segmenter.parameters() if p.requires_grad)
    segmenter.eval().save(tmp_path / "s.safetensors")
    again = rein.Segmenter.load(tmp_path / "s.safetensors", build("vit").requires_grad_(False)).eval()
    assert torch.equal(again(images()), segmenter(images()))


def test_queries_that_do_not_fit_are_an_error():
    head = make()
    with pytest.raises(InputError, match="requires an adapter's queries, got None; pass queries, or .* num_queries=100"):
        head(maps_for(head))
    with pytest.raises(InputError, match=r"queries have shape \(6, 16\), expected \(m, 64\).*query_dim=64.*channels=16"):
        head(maps_for(head), torch.randn(6, 16))
    with pytest.raises(InputError, match="four maps"):
        heads.Mask2FormerHead([12] * 3, 5)
    with pytest.raises(InputError, match="expects queries of width 64, the adapter's have width 256"):
        rein.Segmenter(rein.wrap(build("vit")), heads.Mask2FormerHead([32] * 4, 5, **SMALL))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 40}, "channels is 40; it must be at least 64 and a multiple of 32"),
        ({"channels": 32}, "at least 64"),
        ({"num_points": 0}, "num_points is 0; it must be an integer from 1 to 1,000,000"),
        ({"attention_heads": 0}, "attention_heads is 0"),
        ({"decoder_layers": -1}, "decoder_layers is -1"),
        ({"oversample": 0.5}, "oversample 0.5 must be at least 1"),
        ({"importance": 2.0}, "importance 2.0 between 0 and 1"),
        ({"weights": "abc"}, "three weights"),
        ({"num_queries": 0}, "num_queries is 0"),
    ],
)
def test_invalid_settings_are_an_error(settings, message):
    with pytest.raises(InputError, match=message):
        make(**settings)


def test_the_loss_includes_every_decoder_layer():
    head = make()
    predictions = list(head._decode(maps_for(head), queries_for(head)))
    assert len(predictions) == 1 + SMALL["decoder_layers"]
    loss = head.loss(maps_for(head), torch.zeros(2, 32, 48, dtype=torch.long), queries_for(head))
    one = heads.Mask2FormerHead([12] * 4, 5, **{**SMALL, "decoder_layers": 1})
    assert loss.item() > one.loss(maps_for(one), torch.zeros(2, 32, 48, dtype=torch.long), queries_for(one)).item()


def test_the_loss_of_one_prediction_agrees_with_the_paper(monkeypatch):
    """The reference follows the paper's equations and averages over 40,000 points instead of the head's 4,000."""
    head = make(num_points=4000)
    labels = torch.zeros(1, 32, 48, dtype=torch.long)
    labels[:, :, 20:] = 3
    labels[:, :8] = 255
    classes, masks = torch.randn(1, 6, 6), 3 * torch.randn(1, 6, 8, 12)
    monkeypatch.setattr(type(head), "_decode", lambda self, maps, queries: iter([(classes, masks)]))
    grid = torch.rand(40_000, 2)
    targets = torch.stack([(labels[0] == c).float() for c in (0, 3)])

    def sample(maps):
        points = (2 * grid - 1)[None, None].expand(len(maps), -1, -1, -1)
        return F.grid_sample(maps[:, None], points, align_corners=False)[:, 0, 0]

    p, t = sample(masks[0]), sample(targets)
    bce = (F.softplus(p)[:, None] - p[:, None] * t).mean(-1)
    s = p.sigmoid()[:, None]
    dice = 1 - (2 * (s * t).sum(-1) + 1) / (s.sum(-1) + t.sum(-1) + 1)
    cost = -2 * classes[0].softmax(-1)[:, [0, 3]] + 5 * bce + 5 * dice
    rows, columns = linear_sum_assignment(cost.numpy())
    matched = torch.full((6,), 5)
    matched[rows] = torch.tensor([0, 3])[columns]
    weight = torch.ones(6)
    weight[5] = 0.1
    classification = 2 * F.cross_entropy(classes[0], matched, weight=weight)
    # sample all points uniformly, as the reference does, and none by uncertainty
    head.criterion.importance_sample_ratio = 0.0
    expected = classification + 5 * bce[rows, columns].mean() + 5 * dice[rows, columns].mean()
    assert head.loss([], labels).item() == pytest.approx(expected.item(), rel=0.02)  # the error of 4,000 random points


@pytest.mark.parametrize("project", [False, True])
def test_a_batch_without_labels_trains_its_queries_towards_no_object(project):
    head = make(project_levels=project)
    labels = torch.full((2, 32, 48), 255)
    loss = head.loss(maps_for(head), labels, queries_for(head))
    loss.backward()
    classes = [classes for classes, _ in head._decode(maps_for(head), queries_for(head))]
    expected = sum(-2 * each.log_softmax(-1)[..., -1].mean() for each in classes)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(parameter.grad is not None for parameter in head.parameters())  # data-parallel training expects one for each


def test_semantic_scores_sum_class_times_mask_probabilities_at_any_size():
    classes, masks = torch.randn(2, 37, 4), torch.randn(2, 37, 8, 12)
    big = F.interpolate(masks, (16, 20), mode="bilinear", align_corners=False).sigmoid()
    expected = torch.einsum("bmk,bmhw->bkhw", classes.softmax(-1)[..., :3], big)
    assert torch.allclose(semantic_inference(classes, masks, (16, 20)), expected, atol=1e-5)


def halves():
    """Logits of three queries: left half of class 0, right half of class 1, and "no object"."""
    classes = torch.full((1, 3, 3), -6.0)
    for query, label in enumerate((0, 1, 2)):
        classes[0, query, label] = 6
    masks = torch.full((1, 3, 4, 8), -8.0)
    masks[0, 0, :, :4], masks[0, 1, :, 4:], masks[0, 2] = 8.0, 8.0, 8.0
    return classes, masks


def test_instances_and_segments_of_two_masks():
    (instances,) = instance_inference(*halves(), (4, 8), limit=2)
    assert instances.labels.tolist() == [0, 1] or instances.labels.tolist() == [1, 0]
    assert (instances.scores > 0.95).all()
    left = instances.masks[instances.labels.tolist().index(0)]
    assert left[:, :4].all()
    assert not left[:, 4:].any()
    (panoptic,) = panoptic_inference(*halves(), (4, 8))
    assert panoptic.labels.tolist() == [0, 1]
    assert panoptic.segments[:, :4].unique().tolist() == [1]
    assert panoptic.segments[:, 4:].unique().tolist() == [2]
    assert panoptic_inference(halves()[0] * 0, halves()[1], (4, 8))[0].segments.unique().tolist() == [0]


def test_segments_of_stuff_are_merged_and_those_of_things_stay_separate():
    classes, masks = halves()
    classes = classes[:, [0, 0, 2]]
    assert panoptic_inference(classes, masks, (4, 8))[0].labels.tolist() == [0, 0]
    assert panoptic_inference(classes, masks, (4, 8), things=[0])[0].labels.tolist() == [0, 0]
    merged = panoptic_inference(classes, masks, (4, 8), things=[1])[0]
    assert merged.labels.tolist() == [0]
    assert merged.segments.unique().tolist() == [1]


def test_a_segmenter_predicts_instances_and_segments_at_the_size_of_the_images():
    segmenter = rein.Segmenter(build("vit").requires_grad_(False), heads.Mask2FormerHead([32] * 4, 3, num_queries=9, **SMALL))
    instances = segmenter.instances(images(2, 20, 30), limit=4)
    assert [each.masks.shape for each in instances] == [(4, 20, 30)] * 2
    assert segmenter.panoptic(images(1, 20, 30), score_threshold=0.0)[0].segments.shape == (20, 30)
    with pytest.raises(InputError, match="FPNHead has no method 'instances'; use heads.Mask2FormerHead"):
        rein.Segmenter(build("vit"), heads.FPNHead([32] * 4, 3)).instances(images())


@pytest.mark.sweep
def test_the_head_overfits_two_street_scenes():
    torch.manual_seed(0)
    scenes = [render(seed, "day", (64, 64)) for seed in range(2)]
    pixels = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) / 127.5 - 1 for scene in scenes])
    labels = torch.stack([torch.from_numpy(scene.label).long() for scene in scenes])
    vit = rein.wrap(build("vit", img_size=64), rein.ReinConfig(num_tokens=20, query_dim=64, zero_init=True))
    head = heads.Mask2FormerHead(
        [32] * 4,
        19,
        channels=64,
        encoder_layers=2,
        decoder_layers=3,
        num_points=1024,
        encoder_feedforward=128,
        decoder_feedforward=128,
    )
    model = rein.Segmenter(vit, head).train()
    optimizer = torch.optim.AdamW(rein.param_groups(model, lr=2e-3))
    for _ in range(300):
        optimizer.zero_grad()
        model(pixels, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    labelled = labels != 255
    accuracy = (model.predict(pixels, None).argmax(1) == labels)[labelled].float().mean().item()
    assert math.isfinite(accuracy)
    assert accuracy > 0.95
