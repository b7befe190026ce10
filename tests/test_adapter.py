"""The adapter's parameter counts, initial values, queries, input checks and per-layer parameters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
import rein
from reference import randomize
from rein.errors import InputError


def count_parameters(config, dim=1024, layers=24):
    with torch.device("meta"):
        return sum(p.numel() for p in rein.ReinAdapter(dim, layers, config).parameters())


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (rein.ReinConfig.preset("core"), 52_838_400),
        (rein.ReinConfig.preset("link"), 59_332_864),
        (rein.ReinConfig.preset("share"), 5_016_065),
        (rein.ReinConfig.preset("lowrank"), 2_990_081),
        (rein.ReinConfig(), 2_990_081),
        (rein.ReinConfig(query_dim=None), 2_530_817),
        *((rein.ReinConfig(rank=r), n) for r, n in {4: 2_666_369, 8: 2_774_273, 32: 3_421_697, 64: 4_284_929}.items()),
        *(
            (rein.ReinConfig(num_tokens=m), n)
            for m, n in {50: 2_970_881, 75: 2_980_481, 125: 2_999_681, 150: 3_009_281, 200: 3_028_481}.items()
        ),
    ],
)
def test_parameter_counts_on_a_vit_large_are_the_published_ones(config, count):
    assert count_parameters(config) == count


@pytest.mark.parametrize(
    ("dim", "layers", "count"), [(384, 12, 684_033), (768, 12, 1_741_569), (1280, 32, 4_510_721), (1536, 40, 6_359_041)]
)
def test_parameter_counts_of_the_other_sizes_are_the_published_ones(dim, layers, count):
    assert count_parameters(rein.ReinConfig(), dim, layers) == count


def test_initial_values_have_the_published_ranges():
    torch.manual_seed(0)
    dim, patch, rank, q = 96, 14, 8, 32
    low, full = (
        rein.ReinAdapter(dim, 12, rein.ReinConfig(num_tokens=50, rank=r, query_dim=q), patch_size=patch) for r in (rank, None)
    )
    ranges = [
        (full.tokens, math.sqrt(6 / (3 * patch**2 + dim))),
        (low.tokens_a, math.sqrt(6 / (3 * patch**2 + math.sqrt(dim * rank)))),
        (low.tokens_b, math.sqrt(6 / (3 * patch**2 + math.sqrt(dim * rank)))),
        (low.token_mlp.weight, 1 / math.sqrt(dim)),
        (low.delta_mlp.weight, 1 / math.sqrt(dim)),
        (low.delta_mlp.bias, 1 / math.sqrt(dim)),
        (low.query_proj.weight, 1 / math.sqrt(dim)),
        (low.query_merge.weight, 1 / math.sqrt(3 * q)),
    ]
    for tensor, bound in ranges:
        assert tensor.abs().max() <= bound
        assert tensor.abs().max() > 0.9 * bound
        if tensor.ndim > 1:
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert low.scale.shape == ()
    assert low.scale.item() == pytest.approx(1e-3)


def test_zero_init_starts_as_the_identity_and_has_no_scale():
    adapter = rein.ReinAdapter(16, 2, rein.ReinConfig(zero_init=True))
    x = torch.randn(2, 5, 16)
    assert torch.equal(adapter(x, 1), x)
    assert adapter.scale is None
    assert "scale" not in adapter.state_dict()


def test_unshared_layers_start_as_small_as_shared_ones_without_a_scale():
    adapter = rein.ReinAdapter(16, 2, rein.ReinConfig(share=False))
    x = torch.randn(2, 5, 16)
    change = (adapter(x, 0) - x).abs().max()
    assert 0 < change < 0.05
    assert not torch.equal(adapter(x, 0), adapter(x, 1))
    assert "scale" not in adapter.state_dict()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("rank", [2, None])
def test_a_layer_equals_an_adapter_of_this_layer_alone(rank, share):
    config = rein.ReinConfig(num_tokens=4, rank=rank, query_dim=None, share=share)
    adapter = randomize(rein.ReinAdapter(8, 3, config))
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for layer in range(3):
        alone = rein.ReinAdapter(8, 1, config)
        state = {name: value for name, value in adapter.state_dict().items() if not name.startswith("tokens")}
        if not share:
            state = {name.replace(f".{layer}.", ".0."): value for name, value in state.items() if f".{layer}." in name}
        tokens = {name: value[layer : layer + 1] for name, value in adapter.state_dict().items() if name.startswith("tokens")}
        alone.load_state_dict(state | tokens)
        assert torch.equal(adapter(x, layer), alone(x, 0))
        assert torch.equal(adapter.reference_forward(x, layer), alone.reference_forward(x, 0))


@pytest.mark.parametrize("use_softmax", [True, False])
def test_the_first_token_takes_part_in_the_softmax_only(use_softmax):
    config = rein.ReinConfig(num_tokens=3, rank=None, query_dim=None, use_softmax=use_softmax)
    adapter = randomize(rein.ReinAdapter(8, 1, config))
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    before = adapter.reference_forward(x, 0)
    with torch.no_grad():
        adapter.tokens[0, 0].mul_(3)
    assert torch.equal(adapter.reference_forward(x, 0), before) is not use_softmax


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 3),
    num_tokens=st.integers(1, 7),
    rank=st.one_of(st.none(), st.integers(1, 5)),
    query_dim=st.integers(1, 6),
    share=st.booleans(),
)
def test_queries_and_their_gradients_equal_an_independent_transcription(layers, num_tokens, rank, query_dim, share):
    config = rein.ReinConfig(num_tokens=num_tokens, rank=rank, query_dim=query_dim, share=share)
    adapter = randomize(rein.ReinAdapter(8, layers, config).double())
    state = {name: parameter.detach().clone().requires_grad_() for name, parameter in adapter.named_parameters()}
    queries, expected = adapter.queries(), reference.queries(state)
    torch.testing.assert_close(queries, expected, rtol=1e-12, atol=1e-12)
    queries.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-11, atol=1e-11)


def test_invalid_input_is_refused():
    adapter = rein.ReinAdapter(8, 2, rein.ReinConfig(query_dim=None))
    with pytest.raises(InputError, match=r"x has shape \(2, 3, 9\); expected \(..., N, 8\). Build the adapter with dim=9"):
        adapter(torch.zeros(2, 3, 9), 0)
    for layer in (-1, 2):
        with pytest.raises(InputError, match=f"layer is {layer}; this adapter has layers 0 to 1"):
            adapter(torch.zeros(1, 3, 8), layer)
    with pytest.raises(InputError, match="num_prefix_tokens is -1; it must be at least 0"):
        adapter(torch.zeros(1, 3, 8), 0, -1)
    with pytest.raises(InputError, match=r"no queries \(query_dim=None\). Build it with ReinConfig\(query_dim=256\)"):
        adapter.queries()
    with pytest.raises(InputError, match="num_layers is 0; it must be at least 1"):
        rein.ReinAdapter(8, 0)


def test_without_a_layer_the_input_is_returned_unchanged():
    x = torch.zeros(2, 3, 5)
    assert rein.ReinAdapter(8, 2)(x) is x
