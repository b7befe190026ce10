"""Dtypes, layouts, sizes, values that are not finite, and modes of torch with which a wrapped model gives right numbers."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import rein
from models import FAMILIES, STAGED, amplify_adapter, build, images
from reference import randomize
from rein.refinement import PassCache

SMALL = rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)
CONFIGS = {
    "default": rein.ReinConfig(num_tokens=4, rank=2, query_dim=None),
    "full tokens": rein.ReinConfig(num_tokens=4, rank=None, query_dim=None),
    "raw similarity": rein.ReinConfig(num_tokens=4, rank=2, query_dim=None, use_softmax=False),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def adapter_of(config, dtype=torch.float32, dim=8):
    return randomize(rein.ReinAdapter(dim, 1, config)).to(dtype)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def step(model, x):
    """The gradients of the adapter for one loss over the features."""
    model.zero_grad()
    loss_of(model.forward_features(x)).backward()
    return gradients(model.rein)


def loss_of(features):
    """A loss that depends on every feature, also after a final layer norm."""
    return (features.float() * noise(*features.shape)).mean()


def assert_close(found, expected, tolerance):
    """Every tensor within `tolerance` of the largest absolute value of the expected one."""
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        assert (found[name].float() - value.float()).abs().max() <= tolerance * value.float().abs().max(), name


MODES = ["eager", "create_graph", "autocast", "bfloat16", "compiled"]


@every_config
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_a_prefix_row_that_is_not_finite_does_not_reach_the_gradients_of_the_adapter(mode, value, config):
    """Neither its features nor its gradient, which is not finite either after a layer norm."""
    adapter = adapter_of(config)
    x, weight = noise(2, 6, 8), noise(2, 6, 8, seed=1)
    refine = adapter
    if mode == "compiled":
        torch._dynamo.reset()
        refine = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    found = []
    for prefix in (x[:, :1], torch.full((2, 1, 8), value)):
        adapter.zero_grad()
        features = torch.cat((prefix, x[:, 1:]), 1).to(torch.bfloat16 if mode == "bfloat16" else torch.float32).requires_grad_()
        upstream = torch.cat((prefix, weight[:, 1:]), 1).to(features.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            refined = refine(features, 0, 1)
        assert torch.equal(refined[:, :1].nan_to_num(), features[:, :1].nan_to_num())
        inputs = [features, *adapter.parameters()]
        found.append(torch.autograd.grad(refined, inputs, upstream, create_graph=mode == "create_graph"))
    (of_features, *of_parameters), (of_features_without, *of_parameters_without) = found[1], found[0]
    assert torch.allclose(of_features[:, 1:], of_features_without[:, 1:], atol=1e-6)
    for got, expected in zip(of_parameters, of_parameters_without, strict=True):
        assert got.isfinite().all()
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch scripts the decompositions of forward mode
@every_config
@pytest.mark.parametrize("prefix", [0, 2])
def test_forward_mode_differentiation_gives_the_derivatives_of_backward_mode(prefix, config):
    adapter = adapter_of(config, torch.float64)
    x = noise(1, 5, 8, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in adapter.named_parameters()]

    def refined(features, *parameters):
        return torch.func.functional_call(adapter, dict(zip(names, parameters, strict=True)), (features, 0, prefix))

    inputs = (x, *(parameter.detach().requires_grad_() for parameter in adapter.parameters()))
    assert torch.autograd.gradcheck(refined, inputs, check_forward_ad=True, check_backward_ad=True)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_differentiation_of_a_wrapped_model(grad):
    model = amplify_adapter(rein.wrap(build("vit"), SMALL)).double()
    for block in model.blocks:
        block.attn.fused_attn = False  # torch's fused attention has no forward-mode derivative
    x, tangent, small = images(1).double(), images(1, seed=2).double(), 1e-6
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        value, slope = forward_ad.unpack_dual(model.forward_features(forward_ad.make_dual(x, tangent)))
    with torch.no_grad():
        upper, lower = (model.forward_features(x + sign * small * tangent) for sign in (1, -1))
    assert torch.allclose(value, model.forward_features(x), atol=1e-10)
    assert torch.allclose(slope, (upper - lower) / (2 * small), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["backbone in half precision", "autocast"])
def test_a_step_in_half_precision_has_the_gradients_of_float32(way, dtype):
    model = amplify_adapter(rein.wrap(build("vit"), SMALL)).train()
    expected, x = step(model, images()), images()
    if way == "autocast":
        with torch.autocast("cpu", dtype):
            found = step(model, x)
    else:
        found = step(model.to(dtype), x.to(dtype))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert_close(found, expected, 0.1)  # bfloat16 has 8 bits


def test_a_gradient_scaler_scales_the_gradients_and_skips_a_step_that_overflows():
    model = amplify_adapter(rein.wrap(build("vit"), SMALL)).train()
    expected = step(model, images())
    optimizer = torch.optim.SGD(model.rein.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(model.forward_features(images()))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_close(gradients(model.rein), expected, 0.1)
    before = copy.deepcopy(model.rein.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert not torch.equal(model.rein.scale, before["scale"])
    before = copy.deepcopy(model.rein.state_dict())
    scaler.scale(model.forward_features(images()).square().mean() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(value, before[name]) for name, value in model.rein.state_dict().items())


@pytest.mark.filterwarnings("ignore:Overwriting:UserWarning")  # timm, at its first import of some models
@pytest.mark.parametrize("family", ["ConvNeXt", "ResNet", "vit"])
def test_channels_last_training_gives_the_same_gradients(family):
    torch.manual_seed(0)
    model = amplify_adapter(rein.wrap(build("vit") if family == "vit" else STAGED[family](), SMALL)).train()
    x = images(1) if family == "vit" else images(1, 64, 96)
    expected = step(model, x)
    model.to(memory_format=torch.channels_last)
    assert_close(step(model, x.contiguous(memory_format=torch.channels_last)), expected, 1e-3)


def test_an_empty_batch_passes_where_the_bare_model_takes_one():
    passed = set()
    for family in [*FAMILIES, "ConvNeXt", "ResNet"]:
        model = STAGED[family]() if family in STAGED else build(family)
        x = torch.zeros(0, 3, 64, 96) if family in STAGED else torch.zeros(0, 3, 32, 32)
        with suppress(RuntimeError):
            expected = model.forward_features(x)
            passed.add(family)
        if family in passed:
            features = rein.wrap(model, SMALL).train().forward_features(x)
            features.sum().backward()
            assert features.shape == expected.shape
            assert all(not gradient.any() for gradient in gradients(model.rein).values())
            with torch.no_grad():
                assert model.forward_features(x).shape == expected.shape
    assert {"vit", "ConvNeXt", "ResNet"} <= passed


@pytest.mark.parametrize("family", ["vit with registers", "ConvNeXt"])
def test_an_image_of_one_patch_is_refined(family):
    torch.manual_seed(0)
    bare, size = (STAGED[family]().eval(), 32) if family in STAGED else (build(family), 8)
    model, x = amplify_adapter(rein.wrap(copy.deepcopy(bare), SMALL)), images(2, size, size)
    refined, plain = model.forward_features(x), bare.forward_features(x)
    assert refined.shape == plain.shape
    assert refined.isfinite().all()
    assert not torch.allclose(refined, plain)
    found = step(model, x)
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("prefix", [0, 1])
def test_65536_patches_are_refined_as_the_equations_say(prefix):
    adapter, patches = adapter_of(CONFIGS["default"]), 65_536
    x = noise(1, patches + prefix, 8)
    refined = adapter(x, 0, prefix)
    refined.square().mean().backward()
    plain = copy.deepcopy(adapter).double()
    plain.zero_grad()
    expected = plain.reference_forward(x[:, prefix:].double(), 0)
    (expected.square().sum() / refined.numel()).backward()
    assert torch.allclose(refined[:, prefix:].double(), expected, rtol=1e-4, atol=1e-5)
    assert_close(gradients(adapter), gradients(plain), 1e-4)
    with torch.no_grad():
        assert torch.allclose(adapter(x, 0, prefix, PassCache()), refined, rtol=1e-5, atol=1e-5)


@pytest.fixture
def deterministic():
    """Deterministic algorithms, with NaN in memory that is allocated and not written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("family", ["vit", "sam", "ConvNeXt"])
def test_deterministic_algorithms_give_equal_gradients_and_read_no_uninitialised_memory(family):
    torch.manual_seed(0)
    model = amplify_adapter(rein.wrap(STAGED[family]() if family in STAGED else build(family), SMALL)).train()
    x = images(2, 64, 96) if family in STAGED else images()
    first, second = step(model, x), step(model, x)
    assert all(gradient.isfinite().all() for gradient in first.values())
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())
    with torch.no_grad():
        assert model.forward_features(x).isfinite().all()


CONSUMERS = {
    "mul_": lambda x: x.mul_(1.5),
    "+=": lambda x: x.add_(torch.ones_like(x)),
    "slice": lambda x: x[..., :1].zero_(),
    "relu": nn.ReLU(inplace=True),
}


@pytest.mark.parametrize("consumer", CONSUMERS.values(), ids=CONSUMERS)
@pytest.mark.parametrize("family", ["vit", "sam", "ConvNeXt"])  # NLC, NHWC, NCHW
def test_the_output_of_a_block_may_be_changed_in_place_in_training(family, consumer):
    torch.manual_seed(0)
    model = amplify_adapter(rein.wrap(STAGED[family]() if family in STAGED else build(family), SMALL)).train()
    twin, x = copy.deepcopy(model), images(1, 64, 96) if family in STAGED else images()
    for block in model.rein_injection.blocks:
        model.get_submodule(block.path).register_forward_hook(lambda module, args, output: (consumer(output), None)[1])
        twin.get_submodule(block.path).register_forward_hook(lambda module, args, output: _changed(output.clone(), consumer))
    assert_close(step(model, x), step(twin, x), 1e-5)


def _changed(tensor, consumer):
    consumer(tensor)
    return tensor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["vit", "sam", "ConvNeXt"])
def test_features_without_gradients_may_be_changed_in_place_later(family, mode):
    model = rein.wrap(STAGED[family]() if family in STAGED else build(family), SMALL)
    x, found = images(1, 64, 96) if family in STAGED else images(), []
    model.get_submodule(model.rein_injection.blocks[-1].path).register_forward_hook(lambda module, args, out: found.append(out))
    with mode():
        model.forward_features(x)
    weight = torch.ones((), requires_grad=True)
    if mode is torch.no_grad:
        found[0].mul_(weight)
        found[0].sum().backward()
        assert weight.grad is not None
    else:
        with mode():
            found[0].mul_(2)


@every_config
@pytest.mark.parametrize("mode", ["grad", "no_grad", "cache", "autocast"])
def test_the_result_is_no_view_and_shares_no_memory_with_the_input(mode, config):
    adapter, x = adapter_of(config), noise(2, 5, 8)
    with torch.set_grad_enabled(mode == "grad"), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        refined = adapter(x, 0, 1, PassCache() if mode == "cache" else None)
    assert not refined._is_view()
    assert refined.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert refined.untyped_storage().nbytes() == x.nbytes
