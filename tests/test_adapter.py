"""The adapter against a plain transcription of the equations, its parameter counts, its initial values, its errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import reference
import rein
from rein.adapter import StagewiseAdapter
from rein.errors import InputError


def parameters_of(config, dim=1024, layers=24):
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
    assert parameters_of(config) == count


@pytest.mark.parametrize(
    ("dim", "layers", "count"), [(384, 12, 684_033), (768, 12, 1_741_569), (1280, 32, 4_510_721), (1536, 40, 6_359_041)]
)
def test_parameter_counts_of_the_other_sizes_are_the_published_ones(dim, layers, count):
    assert parameters_of(rein.ReinConfig(), dim, layers) == count


def perturbed(adapter, seed=0):
    """Every parameter away from its initial value, so that no term of the equations is negligible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.7)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / math.sqrt(adapter.dim))
    return adapter


configs = st.builds(
    rein.ReinConfig,
    num_tokens=st.integers(1, 7),
    rank=st.one_of(st.none(), st.integers(1, 5)),
    query_dim=st.integers(1, 6),
    use_softmax=st.booleans(),
    scale_init=st.floats(-2, 2),
    zero_init=st.booleans(),
    share=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    config=configs, layers=st.integers(1, 3), shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=st.integers(0, 99)
)
def test_outputs_gradients_and_queries_equal_the_plain_transcription(config, layers, shape, seed):
    adapter = perturbed(rein.ReinAdapter(8, layers, config).double(), seed)
    x = torch.randn(*shape, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    state = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}
    for layer in range(layers):
        refined, wanted = adapter(ours, layer), reference.refine(state, plain, layer, config.use_softmax)
        torch.testing.assert_close(refined, wanted, rtol=1e-12, atol=1e-12)
        refined.square().sum().backward()
        wanted.square().sum().backward()
    queries, wanted = adapter.queries(), reference.queries(state)
    torch.testing.assert_close(queries, wanted, rtol=1e-12, atol=1e-12)
    queries.pow(3).sum().backward()
    wanted.pow(3).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-11, atol=1e-11)
    for name, parameter in adapter.named_parameters():
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected = torch.zeros_like(parameter) if state[name].grad is None else state[name].grad
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_second_derivatives_are_right():
    adapter = perturbed(rein.ReinAdapter(4, 1, rein.ReinConfig(num_tokens=3, rank=2, query_dim=None)).double())
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradgradcheck(lambda y: adapter(y, 0), (x,))


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


def test_low_rank_tokens_are_never_multiplied_out_and_no_wide_activation_is_kept():
    adapter = rein.ReinAdapter(64, 1, rein.ReinConfig(num_tokens=20, rank=4))
    x = torch.randn(500, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter(x, 0)
    wide = {t.untyped_storage().data_ptr() for t in saved if t.numel() >= 500 * 64}
    assert len(wide) == 1  # f itself
    assert not any(tuple(t.shape) in {(20, 64), (64, 20)} for t in saved)


@pytest.mark.parametrize("config", [rein.ReinConfig(), rein.ReinConfig(rank=None), rein.ReinConfig(use_softmax=False)])
def test_a_layer_keeps_at_most_1_3_times_its_tokens_for_the_backward_pass(config):
    """The published form keeps 3.55 N C floats per layer."""
    tokens, width = 1024, 768
    adapter = rein.ReinAdapter(width, 1, config)
    x = torch.randn(1, tokens + 1, width, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t):
        adapter(x, 0, 1)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in adapter.parameters()}
    floats = sum(t.untyped_storage().nbytes() // 4 for place, t in kept.items() if place not in parameters)
    # full tokens are folded through matrices (m, C), the raw similarity through one more (C, C)
    assert floats <= (2.3 if not config.use_softmax else 1.3 if config.rank else 1.5) * tokens * width


@pytest.mark.parametrize("config", [rein.ReinConfig(), rein.ReinConfig(rank=None), rein.ReinConfig(use_softmax=False)])
@pytest.mark.parametrize("grad", [False, True])
def test_prefix_rows_pass_through_bit_for_bit_and_take_no_part(config, grad):
    adapter = perturbed(rein.ReinAdapter(16, 2, config))
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    whole, apart = x.clone().requires_grad_(grad), x.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        refined = adapter(whole, 1, 3)
        wanted = torch.cat((apart[:, :3], adapter(apart[:, 3:], 1)), 1)
    assert torch.equal(refined[:, :3], x[:, :3])
    assert torch.allclose(refined, wanted, atol=1e-6)
    if not grad:
        return
    found = []
    for output, inputs in ((refined, whole), (wanted, apart)):
        adapter.zero_grad()
        output.square().sum().backward()
        found.append([inputs.grad, *(p.grad.clone() for p in adapter.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 4
    for got, expected in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 2])
def test_second_derivatives_with_prefix_rows_and_for_parameters_are_right(prefix):
    adapter = perturbed(rein.ReinAdapter(4, 1, rein.ReinConfig(num_tokens=3, rank=2, query_dim=None)).double())
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    names = [name for name, _ in adapter.named_parameters()]

    def refined(y, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(adapter, state, (y, 0, prefix))

    parameters = tuple(parameter.detach().requires_grad_() for parameter in adapter.parameters())
    assert torch.autograd.gradcheck(refined, (x, *parameters))
    assert torch.autograd.gradgradcheck(refined, (x, *parameters))


@pytest.mark.parametrize("config", [{}, {"rank": None}, {"use_softmax": False}, {"share": False}])
@pytest.mark.parametrize("prefix", [0, 2])
def test_gradients_that_are_differentiated_again_are_the_same_and_so_are_theirs(config, prefix):
    """Over two layers, where matrices and features depend on the same parameters."""
    shape = rein.ReinConfig(**{"num_tokens": 3, "rank": 2, "query_dim": None, **config})
    adapter = perturbed(rein.ReinAdapter(4, 2, shape).double())
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    wanted = [x, *adapter.parameters()]

    def gradients(create_graph, plain=False):
        def refine(features):
            for layer in (0, 1):
                features = adapter(features, layer, prefix)
            return features.square().sum()

        if plain:  # the equations as torch differentiates them
            names = [name for name, _ in adapter.named_parameters()]

            def function(features, *parameters):
                state = dict(zip(names, parameters, strict=True))
                for layer in (0, 1):
                    features = torch.func.functional_call(adapter, state, (features, layer, prefix))
                return features.square().sum()

            return torch.func.grad(function, tuple(range(len(wanted))))(*wanted)
        return torch.autograd.grad(refine(x), wanted, create_graph=create_graph)

    found, witness = gradients(True), gradients(False, plain=True)
    for got, once, expected in zip(found, gradients(False), witness, strict=True):
        assert torch.allclose(got, once, atol=1e-10)
        assert torch.allclose(got, expected, atol=1e-10)
    second = torch.autograd.grad(sum(each.square().sum() for each in found), wanted)
    expected = torch.autograd.grad(sum(each.square().sum() for each in witness), wanted)
    for got, each in zip(second, expected, strict=True):
        assert torch.allclose(got, each, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("layer", "prefix"), [(-1, 0), (2, 0), (0, -1)])
def test_layers_and_counts_that_cannot_be_are_refused(layer, prefix):
    with pytest.raises(InputError, match="this adapter has layers 0 to 1, and a count of rows is not negative"):
        rein.ReinAdapter(4, 2)(torch.zeros(1, 3, 4), layer, prefix)


def test_function_transforms_agree_with_the_backward_pass():
    adapter = perturbed(rein.ReinAdapter(8, 1, rein.ReinConfig(num_tokens=3, rank=2, query_dim=None)))
    x = torch.randn(2, 5, 8, requires_grad=True)
    adapter(x, 0, 1).square().sum().backward()
    transformed = torch.func.grad(lambda y: adapter(y, 0, 1).square().sum())(x.detach())
    assert torch.allclose(transformed, x.grad, atol=1e-5)
    mapped = torch.func.vmap(lambda y: adapter(y, 0, 1))(x.detach())
    assert torch.allclose(mapped, adapter(x, 0, 1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_residual_stream_in_its_own_precision(dtype):
    adapter = perturbed(rein.ReinAdapter(32, 1, rein.ReinConfig(num_tokens=8, rank=4, query_dim=8)))
    with torch.no_grad():
        adapter.scale.fill_(1e-3)
    x = 100 + torch.randn(4, 10, 32)
    expected = adapter(x, 0)
    with torch.autocast("cpu", dtype):
        refined = adapter(x, 0)
        half = adapter(x.to(dtype), 0)
    assert refined.dtype == torch.float32
    assert half.dtype == dtype
    # s D is about 0.1 here and may be rounded; f, about 100, may not (bfloat16 would round it by 0.25)
    assert torch.allclose(refined, expected, atol=5e-3)


def test_stages_are_adapters_of_their_own_and_their_queries_are_summed():
    torch.manual_seed(0)
    adapter = StagewiseAdapter([8, 8, 12, 16, 16], rein.ReinConfig(num_tokens=5, rank=2, query_dim=6))
    assert [stage.num_layers for stage in adapter.stages] == [2, 1, 2]
    assert adapter.num_layers == 5
    x = torch.randn(2, 3, 16)
    assert torch.equal(adapter(x, 4), adapter.stages[2](x, 1))
    assert torch.allclose(adapter.queries(), sum(stage.queries() for stage in adapter.stages))


def test_wrong_input_is_refused():
    adapter = rein.ReinAdapter(8, 2, rein.ReinConfig(query_dim=None))
    with pytest.raises(InputError, match=r"9 wide, shape \(2, 3, 9\); this adapter was built for 8"):
        adapter(torch.zeros(2, 3, 9), 0)
    with pytest.raises(InputError, match=r"no queries \(query_dim=None\)"):
        adapter.queries()
    with pytest.raises(InputError, match="num_layers is 0"):
        rein.ReinAdapter(8, 0)


class WideCopies(TorchDispatchMode):
    """Counts the copies of as many numbers as the tokens have."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        copies = {torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.cat}
        self.count += function.overloadpacket in copies and out.numel() >= self.numbers
        return out


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("layout", "copies"), [("sequence", 0), ("NHWC", 0), ("channels_last", 0), ("NCHW", 1)])
def test_no_layout_is_copied_without_need(layout, copies, grad):
    """Prefix rows are not cut out and put back; only maps that lie channel by channel are brought into another order, once."""
    adapter = rein.ReinAdapter(64, 1, rein.ReinConfig(num_tokens=4, rank=2))
    x = torch.randn(2, 65, 64) if layout == "sequence" else torch.randn(2, 64, 64, 64)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x = x.requires_grad_(grad)
    with torch.set_grad_enabled(grad), WideCopies(2 * 64 * 64) as wide:
        adapter(x.permute(0, 2, 3, 1) if layout in ("NCHW", "channels_last") else x, 0, 1 if layout == "sequence" else 0)
    assert wide.count == copies
