"""The folded form equals the equations, in every mode, and computes and stores no more than necessary."""

import copy
import pickle

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import rein
from models import amplify_adapter
from reference import randomize
from rein.refinement import PassCache

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
def test_outputs_and_gradients_equal_the_equations_as_the_paper_writes_them(config, layers, shape, seed):
    folded = randomize(rein.ReinAdapter(8, layers, config).double(), seed)
    plain = copy.deepcopy(folded)
    x = torch.randn(*shape, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for layer in range(layers):
        refined, expected = folded(inputs[0], layer), plain.reference_forward(inputs[1], layer)
        torch.testing.assert_close(refined, expected, rtol=1e-12, atol=1e-12)
        refined.square().sum().backward()
        expected.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-11, atol=1e-11)
    for (name, parameter), (_, other) in zip(folded.named_parameters(), plain.named_parameters(), strict=True):
        got, expected = (torch.zeros_like(each) if each.grad is None else each.grad for each in (parameter, other))
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_second_derivatives_are_correct():
    adapter = randomize(rein.ReinAdapter(4, 1, rein.ReinConfig(num_tokens=3, rank=2, query_dim=None)).double())
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradgradcheck(lambda y: adapter(y, 0), (x,))


def test_the_backward_pass_stores_no_wide_tensor_but_the_features_and_no_full_tokens():
    adapter = rein.ReinAdapter(64, 1, rein.ReinConfig(num_tokens=20, rank=4))
    x = torch.randn(500, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter(x, 0)
    wide = {t.untyped_storage().data_ptr() for t in saved if t.numel() >= 500 * 64}
    assert len(wide) == 1  # the features
    assert not any(tuple(t.shape) in {(20, 64), (64, 20)} for t in saved)


@pytest.mark.parametrize("config", [rein.ReinConfig(), rein.ReinConfig(rank=None), rein.ReinConfig(use_softmax=False)])
def test_a_layer_stores_at_most_1_3_times_its_features_for_the_backward_pass(config):
    """The equations as the paper writes them store 3.55 N C floats per layer."""
    tokens, width = 1024, 768
    adapter = rein.ReinAdapter(width, 1, config)
    x = torch.randn(1, tokens + 1, width, requires_grad=True)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t):
        adapter(x, 0, 1)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in adapter.parameters()}
    floats = sum(t.untyped_storage().nbytes() // 4 for pointer, t in saved.items() if pointer not in parameters)
    # full tokens are folded through matrices (m, C), the raw similarity through one more (C, C)
    assert floats <= (2.3 if not config.use_softmax else 1.3 if config.rank else 1.5) * tokens * width


@pytest.mark.parametrize("config", [rein.ReinConfig(), rein.ReinConfig(rank=None), rein.ReinConfig(use_softmax=False)])
@pytest.mark.parametrize("grad", [False, True])
def test_prefix_tokens_pass_through_bit_for_bit_and_have_no_influence(config, grad):
    adapter = randomize(rein.ReinAdapter(16, 2, config))
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    whole, sliced = x.clone().requires_grad_(grad), x.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        refined = adapter(whole, 1, 3)
        expected = torch.cat((sliced[:, :3], adapter(sliced[:, 3:], 1)), 1)
    assert torch.equal(refined[:, :3], x[:, :3])
    assert torch.allclose(refined, expected, atol=1e-6)
    if not grad:
        return
    gradients = []
    for output, inputs in ((refined, whole), (expected, sliced)):
        adapter.zero_grad()
        output.square().sum().backward()
        gradients.append([inputs.grad, *(p.grad.clone() for p in adapter.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 4
    for got, reference in zip(*gradients, strict=True):
        assert torch.allclose(got, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 2])
def test_second_derivatives_of_inputs_and_parameters_are_correct_with_and_without_prefix_tokens(prefix):
    adapter = randomize(rein.ReinAdapter(4, 1, rein.ReinConfig(num_tokens=3, rank=2, query_dim=None)).double())
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
def test_gradients_with_create_graph_and_their_own_gradients_equal_those_of_the_equations(config, prefix):
    """Over two layers, because matrices and features of the second depend on the same parameters."""
    config = rein.ReinConfig(**{"num_tokens": 3, "rank": 2, "query_dim": None, **config})
    adapter = randomize(rein.ReinAdapter(4, 2, config).double())
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    inputs = [x, *adapter.parameters()]

    def folded(features, layer):
        return adapter(features, layer, prefix)

    def plain(features, layer):
        refined = adapter.reference_forward(features[:, prefix:], layer)
        return torch.cat((features[:, :prefix], refined), 1)

    def gradients(refine, create_graph):
        loss = refine(refine(x, 0), 1).square().sum()
        return torch.autograd.grad(loss, inputs, create_graph=create_graph)

    first, expected = gradients(folded, True), gradients(plain, True)
    for got, explicit, each in zip(first, gradients(folded, False), expected, strict=True):
        assert torch.allclose(got, explicit, atol=1e-10)
        assert torch.allclose(got, each, atol=1e-10)
    second, expected = (torch.autograd.grad(sum(g.square().sum() for g in each), inputs) for each in (first, expected))
    for got, each in zip(second, expected, strict=True):
        assert torch.allclose(got, each, rtol=1e-8, atol=1e-8)


CONFIGS = {
    "default": rein.ReinConfig(),
    "full tokens": rein.ReinConfig(rank=None),
    "raw similarity": rein.ReinConfig(use_softmax=False),
    "not shared": rein.ReinConfig(share=False),
    "one token": rein.ReinConfig(num_tokens=1),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch.func.jvp scripts its decompositions
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("prefix", [0, 1])
def test_function_transforms_run_the_equations_and_give_the_same_numbers(config, prefix, dtype, relative, monkeypatch):
    adapter = randomize(rein.ReinAdapter(8, 1, config).to(dtype))
    generator = torch.Generator().manual_seed(0)
    x, tangent = torch.randn(2, 2, 5, 8, dtype=dtype, generator=generator).unbind()
    x.requires_grad_()
    refined = adapter(x, 0, prefix)
    refined.square().sum().backward()
    calls = []
    equations = adapter.reference_forward
    monkeypatch.setattr(adapter, "reference_forward", lambda *args: calls.append(args) or equations(*args), raising=False)

    def refine(features):
        return adapter(features, 0, prefix, PassCache())

    def assert_close(got, expected):
        assert (got - expected).abs().max() <= relative * expected.abs().max()

    products = x.grad * tangent
    with torch.no_grad():
        assert_close(torch.func.vmap(refine)(x), refined)
        assert_close(torch.func.vmap(refine, in_dims=1, out_dims=1)(x) if not prefix else refined, refined)
        assert_close(torch.func.grad(lambda features: refine(features).square().sum())(x), x.grad)
        value, slope = torch.func.jvp(refine, (x,), (tangent,))
        assert_close(value, refined)
        assert ((slope * 2 * refined).sum() - products.sum()).abs() <= relative * products.abs().sum()
    assert len(calls) == (4 if not prefix else 3)
    assert torch.equal(adapter(x, 0, prefix), refined)
    assert len(calls) == (4 if not prefix else 3)  # without a transform the folded form runs


def test_function_transforms_differentiate_and_map_over_parameters():
    adapter = randomize(rein.ReinAdapter(8, 1, rein.ReinConfig(num_tokens=3, rank=2, query_dim=None)).double())
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = {name: parameter.detach() for name, parameter in adapter.named_parameters()}

    def loss(parameters, features):
        return torch.func.functional_call(adapter, parameters, (features, 0, 1)).square().sum()

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for image in range(2):
        adapter.zero_grad()
        adapter(x[image], 0, 1).square().sum().backward()
        for name, parameter in adapter.named_parameters():
            torch.testing.assert_close(per_image[name][image], parameter.grad, rtol=1e-11, atol=1e-11)
    stacked = {name: torch.stack((parameter, 2 * parameter)) for name, parameter in parameters.items()}
    both = torch.func.vmap(loss, in_dims=(0, None))(stacked, x)
    torch.testing.assert_close(both[1], loss({name: 2 * each for name, each in parameters.items()}, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_precision_of_the_residual(dtype):
    adapter = randomize(rein.ReinAdapter(32, 1, rein.ReinConfig(num_tokens=8, rank=4, query_dim=8)))
    with torch.no_grad():
        adapter.scale.fill_(1e-3)
    x = 100 + torch.randn(4, 10, 32)
    expected = adapter(x, 0)
    with torch.autocast("cpu", dtype):
        refined = adapter(x, 0)
        half = adapter(x.to(dtype), 0)
        transformed = torch.func.vmap(lambda each: adapter(each, 0))(x)
        half_transformed = torch.func.vmap(lambda each: adapter(each, 0))(x.to(dtype))
    assert refined.dtype == transformed.dtype == torch.float32
    assert half.dtype == half_transformed.dtype == dtype
    # s D is about 0.1 here and may be rounded; f, about 100, may not (bfloat16 would round it by 0.25)
    assert torch.allclose(refined, expected, atol=5e-3)
    assert torch.allclose(transformed, expected, atol=5e-3)


class WideCopies(TorchDispatchMode):
    """Counts the copies of tensors with at least `numel` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        copies = {torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.cat}
        self.count += function.overloadpacket in copies and out.numel() >= self.numel
        return out


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("layout", "copies"), [("sequence", 0), ("NHWC", 0), ("channels_last", 0), ("NCHW", 1)])
def test_only_a_map_with_the_channels_first_is_copied(layout, copies, grad):
    """Prefix tokens are not sliced and concatenated. Only NCHW memory is brought into another order, once."""
    adapter = rein.ReinAdapter(64, 1, rein.ReinConfig(num_tokens=4, rank=2))
    x = torch.randn(2, 65, 64) if layout == "sequence" else torch.randn(2, 64, 64, 64)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x = x.requires_grad_(grad)
    with torch.set_grad_enabled(grad), WideCopies(2 * 64 * 64) as wide:
        adapter(x.permute(0, 2, 3, 1) if layout in ("NCHW", "channels_last") else x, 0, 1 if layout == "sequence" else 0)
    assert wide.count == copies


def vit(config=None, name="test_vit"):
    torch.manual_seed(0)
    model = rein.wrap(timm.create_model(name, num_classes=0, img_size=32), config)
    amplify_adapter(model)
    return model.eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def fold_each_layer(model, images=IMAGES):
    """The features with the matrices of each layer folded separately, as with gradients."""
    with torch.enable_grad():
        return model.forward_features(images).detach()


@torch.no_grad()
def features(model, images=IMAGES):
    return model.forward_features(images)


class Products(TorchDispatchMode):
    """Counts matrix products: all, and those of two matrices that are at least `width` wide and high."""

    def __init__(self, width):
        super().__init__()
        self.width, self.wide, self.all = width, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_}:
            matrices = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 2]
            self.all += 1
            self.wide += min(min(matrix.shape) for matrix in matrices[-2:]) >= self.width
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "swin_tiny_patch4_window7_224"])
def test_matrices_from_the_cache_give_the_features_of_folding_layer_by_layer(config, name):
    if name.startswith("swin"):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0, img_size=64, window_size=2, embed_dim=8, depths=(1, 2, 1, 1))
        model = rein.wrap(model, config).eval()
        amplify_adapter(model)
        images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    else:
        model, images = vit(config, name), IMAGES
    assert torch.allclose(features(model, images), fold_each_layer(model, images), rtol=1e-4, atol=1e-4)


def test_a_pass_without_gradients_folds_once_for_all_layers():
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=6, num_heads=2, num_classes=0)
    rein.wrap(model).eval()
    bare, counts = Products(64), []
    with bare, rein.disabled(model), torch.no_grad():
        model(IMAGES)
    for grad in (False, True):
        with Products(64) as refined, torch.set_grad_enabled(grad):
            model(IMAGES)
        counts.append(refined.all - bare.all)
    per_layer = 5  # f B^T, A^T, mix, the values, and W_f
    assert counts == [6 * per_layer + 2, 6 * (per_layer + 2)]  # folding takes two products, once or in every layer


def scaled(parameter):
    with torch.no_grad():
        parameter.mul_(2)


def scaled_without_new_version(parameter):
    parameter.data.mul_(2)  # torch does not count this change


def scaled_through_numpy(parameter):
    array = parameter.detach().numpy()
    array *= 2


def replaced(parameter):
    parameter.data = parameter.data * 2


CHANGES = [scaled, scaled_without_new_version, scaled_through_numpy, replaced]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["tokens_a", "tokens_b", "token_mlp.weight", "token_mlp.bias", "delta_mlp.weight", "scale"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_change_of_a_parameter_is_seen_by_the_next_pass(change, name, mode):
    model = vit()
    with mode():
        before = model.forward_features(IMAGES)
    change(model.rein.get_parameter(name))
    with mode():
        after = model.forward_features(IMAGES)
    assert not torch.equal(before, after)
    assert torch.allclose(after, fold_each_layer(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_a_pass_that_stopped_early_is_seen(change):
    model = vit()
    with torch.no_grad():
        model.forward_intermediates(IMAGES, indices=[1], intermediates_only=True, stop_early=True)
        change(model.rein.scale)
        after = model.forward_features(IMAGES)
    assert torch.allclose(after, fold_each_layer(model), rtol=1e-4, atol=1e-4)


def test_a_change_that_torch_counts_is_seen_by_the_next_block():
    model = vit()
    with torch.no_grad():
        tokens = model.blocks[0](torch.randn(1, 5, model.embed_dim))
        scaled(model.rein.delta_mlp.weight)
        after = model.blocks[1](tokens)
    expected = model.blocks[1](tokens).detach()
    assert torch.allclose(after, expected, rtol=1e-4, atol=1e-4)


def test_no_matrices_survive_an_optimizer_step_a_load_or_a_change_of_dtype(tmp_path):
    model, other = vit(), vit()
    scaled(other.rein.delta_mlp.weight)
    rein.save(other, tmp_path / "other.safetensors")
    optimizer = torch.optim.AdamW(rein.param_groups(model), lr=0.1)

    def step():
        model.train()
        model(IMAGES).square().mean().backward()
        optimizer.step()
        model.eval()

    found = [features(model)]
    for change in (step, lambda: rein.load(model, tmp_path / "other.safetensors"), model.double, model.float):
        change()
        images = IMAGES.to(next(model.parameters()).dtype)
        found.append(features(model, images).float())
        assert torch.allclose(found[-1], fold_each_layer(model, images).float(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = model.forward_features(IMAGES)
    assert torch.equal(features(model), found[-1])
    assert not torch.equal(rough.float(), found[-1])


def test_two_models_with_alternating_blocks_use_their_own_matrices():
    one, two = vit(), vit(rein.ReinConfig(num_tokens=7))
    start = torch.randn(1, 5, one.embed_dim, generator=torch.Generator().manual_seed(0))
    found = [start, start]
    with torch.no_grad():
        for first, second in zip(one.blocks, two.blocks, strict=True):
            found = [first(found[0]), second(found[1])]
    for model, got in zip((one, two), found, strict=True):
        assert torch.allclose(got, model.blocks(start).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="this torch cannot measure a CrossViT on meta tensors")
def test_stages_with_alternating_layers_use_their_own_matrices():
    torch.manual_seed(0)
    model = rein.wrap(timm.create_model("crossvit_9_240", num_classes=0)).eval()  # two branches of two widths
    amplify_adapter(model)
    images = torch.randn(1, 3, 240, 240, generator=torch.Generator().manual_seed(1))
    assert len({id(hook.pass_cache) for hook in model.rein_injection.hooks}) == 2
    with torch.enable_grad():
        expected = model.forward_features(images)[0].detach()
    assert torch.allclose(features(model, images)[0], expected, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_have_an_empty_cache():
    model = vit()
    with torch.no_grad():
        model.blocks[0](torch.randn(1, 5, model.embed_dim))  # a pass that stops after the first block
    hook = model.rein_injection.hooks[0]
    assert hook.pass_cache._entry is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        hooks = twin.rein_injection.hooks
        assert hooks[0].pass_cache is hooks[1].pass_cache is not hook.pass_cache
        assert hooks[0].pass_cache._entry is None
        assert torch.allclose(features(twin), features(model), atol=1e-5)


def test_after_the_last_layer_the_cache_is_empty():
    model = vit()
    features(model)
    assert model.rein_injection.hooks[0].pass_cache._entry is None


def test_an_adapter_uses_a_cache_only_if_one_is_passed():
    adapter = rein.ReinAdapter(8, 3, rein.ReinConfig(num_tokens=4, rank=2))
    x, cache = torch.randn(1, 5, 8), PassCache()
    with torch.no_grad():
        for layer in range(3):
            adapter.delta_mlp.weight.data.mul_(3)  # a change that torch does not count, between two layers
            assert torch.allclose(adapter(x, layer), adapter(x, layer, 0, PassCache()), atol=1e-6)
        assert torch.allclose(adapter(x, 1, 0, cache), adapter(x, 1), atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_matrices_of_an_adapter_are_those_that_the_cache_folds(config):
    adapter, cache = rein.ReinAdapter(8, 2, config), PassCache()
    for layer, (weight, *factors) in enumerate(adapter.matrices(torch.float64)):
        folded = cache.get(adapter, layer, torch.float64, torch.device("cpu"))
        for got, expected in zip((weight, *factors), (folded.weight, *folded.factors), strict=True):
            assert got.dtype == torch.float64
            assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # strict: the cache
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_give_the_same_features(strict):
    model = vit()
    with torch.no_grad():
        program = torch.export.export(model, (IMAGES,), strict=strict)
        assert torch.allclose(program.module()(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop_early", [False, True])
def test_a_compiled_pass_folds_once_and_reads_the_current_parameters(stop_early):
    torch._dynamo.reset()
    model, products = vit(), []

    def backend(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes]
        products.append(sum(any(product in name for product in ("linear", "matmul", "addmm")) for name in names))
        return graph

    def run(images):
        if stop_early:
            return model.forward_intermediates(images, indices=[1], intermediates_only=True, stop_early=True)[0]
        return model.forward_features(images)

    with torch.no_grad():
        before, compiled = run(IMAGES), torch.compile(run, backend=backend, fullgraph=True)
        assert torch.allclose(compiled(IMAGES), before, rtol=1e-4, atol=1e-4)
        with rein.disabled(model):
            compiled(IMAGES)
        layers = 2 if stop_early else len(model.blocks)
        assert products[0] - products[1] == 5 * layers + 2
        for change in CHANGES:
            change(model.rein.delta_mlp.weight)
            assert torch.allclose(compiled(IMAGES), run(IMAGES), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(run(IMAGES), before, atol=1e-3)
        model(IMAGES)
        assert torch.allclose(features(model), fold_each_layer(model), rtol=1e-3, atol=1e-3)
    assert len(products) == 2  # no recompilation
