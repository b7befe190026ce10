"""`Mask2FormerHead` and a second implementation against numbers from the authors' head (see `conformance/README.md`).

Tolerances are relative to the largest entry of each reference tensor. They allow another order of float32 sums only.
"""

import pytest
import torch
from safetensors.torch import load_file

import official_reference
from rein import heads
from rein.official.names import HEAD_PREFIX
from rein.official.state_dict import convert, to_official_state
from test_conformance import CASES, FOLDER, assert_close, with_prefix

FILE = "mask2former_head.safetensors"
SETTINGS = {name: value for name, value in CASES[FILE]["settings"].items() if name != "queries"}
PREDICTIONS = 1 + SETTINGS["decoder_layers"]
OUTPUT, LOSS, GRADIENT = 5e-6, 2e-6, 1e-5
TERMS = {"loss_cls": "loss_cross_entropy", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}
KEY_BIASES = ("self_attn.attn.in_proj_bias", "cross_attn.attn.in_proj_bias")


@pytest.fixture(scope="module")
def tensors():
    return load_file(FOLDER / FILE)


@pytest.fixture
def head(tensors):
    head = heads.Mask2FormerHead(**SETTINGS)
    head.load_state_dict(convert({HEAD_PREFIX + key: t for key, t in with_prefix(tensors, HEAD_PREFIX).items()}).head_tensors)
    return head.eval()


def inputs(tensors):
    return [tensors[f"in.map.{level}"].clone() for level in range(4)], tensors["in.queries"].clone()


@pytest.fixture
def stored_points(monkeypatch):
    """Replace every draw of point coordinates by the fixed sequence with which the stored losses were computed."""

    draw = torch.rand

    def points(*shape, device=None):
        if shape == ([],):  # older versions of the library draw for its layer dropout, which is off
            return draw(*shape)
        i = torch.arange(shape[-2], dtype=torch.float64)
        sequence = torch.stack(((0.754877666 * i + 0.13) % 1, (0.569840291 * i + 0.37) % 1), -1)
        return sequence.float().expand(*shape).clone()

    monkeypatch.setattr(torch, "rand", points)


def test_every_prediction_of_the_head_agrees_with_the_authors(head, tensors):
    maps, queries = inputs(tensors)
    with torch.no_grad():
        predictions = list(head._decode(maps, queries))
        semantic = head.predict(maps, (64, 96), queries)
    assert len(predictions) == PREDICTIONS
    for number, (classes, masks) in enumerate(predictions):
        assert_close(classes, tensors[f"out.class.{number}"], OUTPUT, f"classes {number}")
        assert_close(masks, tensors[f"out.mask.{number}"], OUTPUT, f"masks {number}")
    assert_close(semantic, tensors["out.semantic"], OUTPUT, "semantic scores")


def test_the_second_implementation_agrees_with_the_authors(tensors):
    state, (maps, queries) = with_prefix(tensors, HEAD_PREFIX), inputs(tensors)
    for image in range(2):
        each = [level[image] for level in maps]
        classes, masks = official_reference.mask2former(state, each, queries, SETTINGS["attention_heads"])
        assert_close(classes, tensors[f"out.class.{PREDICTIONS - 1}"][image], OUTPUT, "classes")
        assert_close(masks, tensors[f"out.mask.{PREDICTIONS - 1}"][image], OUTPUT, "masks")


def test_every_term_of_the_loss_agrees_with_the_authors(head, tensors, stored_points):
    maps, queries = inputs(tensors)
    terms = head._loss_terms(maps, tensors["in.labels"].long(), queries)
    expected = with_prefix(tensors, "loss.")
    for number in range(PREDICTIONS):
        last = number == PREDICTIONS - 1
        for theirs, ours in TERMS.items():
            name = theirs if last else f"d{number}.{theirs}"
            assert_close(terms.pop(ours if last else f"{ours}_{number}"), expected[name], LOSS, name)
    assert not terms


def test_loss_and_gradients_agree_with_the_authors(head, tensors, stored_points):
    maps, queries = inputs(tensors)
    for each in (*maps, queries):
        each.requires_grad_()
    loss = head.loss(maps, tensors["in.labels"].long(), queries)
    assert_close(loss, tensors["loss.total"], LOSS, "loss")
    loss.backward()
    expected = with_prefix(tensors, "grad.")
    for level in range(4):
        assert_close(maps[level].grad, expected.pop(f"map.{level}"), GRADIENT, f"gradient of map {level}")
    assert_close(queries.grad, expected.pop("queries"), GRADIENT, "gradient of the queries")
    gradients = to_official_state({}, {name: p.grad for name, p in head.named_parameters()}, head.arguments)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        if name.endswith(KEY_BIASES):  # adding a constant to all scores of a query changes nothing: zero but for rounding
            assert gradient.chunk(3)[1].abs().max() < GRADIENT * gradient.abs().max()
            assert expected[name].chunk(3)[1].abs().max() < GRADIENT * gradient.abs().max()
        assert_close(gradient, expected[name], GRADIENT, f"gradient of {name}")


def test_the_queries_of_an_image_without_labels_count_as_no_object(head, tensors, stored_points):
    maps, queries = inputs(tensors)
    labels = tensors["in.labels"].long()
    labels[1] = 255
    assert_close(head.loss(maps, labels, queries), tensors["loss.total_second_image_unlabelled"], LOSS, "loss")
