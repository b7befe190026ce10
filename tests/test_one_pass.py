"""Without gradients a wrapped model prepares its adapter's matrices once per pass, and never uses old ones."""

import copy
import pickle

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rein
from models import strong
from rein.adapter import OnePass


def vit(config=None, name="test_vit"):
    torch.manual_seed(0)
    model = rein.wrap(timm.create_model(name, num_classes=0, img_size=32), config)
    strong(model)
    return model.eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def witness(model, images=IMAGES):
    """The features with matrices folded for each layer by itself, as it is done with gradients."""
    with torch.enable_grad():
        return model.forward_features(images).detach()


@torch.no_grad()
def features(model, images=IMAGES):
    return model.forward_features(images)


class Products(TorchDispatchMode):
    """Counts products whose smaller side is as wide as the model."""

    def __init__(self, width):
        super().__init__()
        self.width, self.wide, self.all = width, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_}:
            matrices = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 2]
            self.all += 1
            self.wide += min(min(matrix.shape) for matrix in matrices[-2:]) >= self.width
        return function(*args, **(kwargs or {}))


CONFIGS = {
    "default": rein.ReinConfig(),
    "full tokens": rein.ReinConfig(rank=None),
    "raw similarity": rein.ReinConfig(use_softmax=False),
    "not shared": rein.ReinConfig(share=False),
    "one token": rein.ReinConfig(num_tokens=1),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "swin_tiny_patch4_window7_224"])
def test_prepared_matrices_give_the_features_of_folding_layer_by_layer(config, name):
    if name.startswith("swin"):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0, img_size=64, window_size=2, embed_dim=8, depths=(1, 2, 1, 1))
        model = rein.wrap(model, config).eval()
        strong(model)
        images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    else:
        model, images = vit(config, name), IMAGES
    assert torch.allclose(features(model, images), witness(model, images), rtol=1e-4, atol=1e-4)


def test_one_pass_folds_once_for_all_layers():
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
    assert counts == [6 * per_layer + 2, 6 * (per_layer + 2)]  # folding takes two products: once, or in every layer


def scaled(parameter):
    with torch.no_grad():
        parameter.mul_(2)


def scaled_unseen(parameter):
    parameter.data.mul_(2)  # torch does not count this


def scaled_through_numpy(parameter):
    array = parameter.detach().numpy()
    array *= 2


def replaced(parameter):
    parameter.data = parameter.data * 2


CHANGES = [scaled, scaled_unseen, scaled_through_numpy, replaced]


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
    assert torch.allclose(after, witness(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_a_pass_that_stopped_early_is_seen(change):
    model = vit()
    with torch.no_grad():
        model.forward_intermediates(IMAGES, indices=[1], intermediates_only=True, stop_early=True)
        change(model.rein.scale)
        after = model.forward_features(IMAGES)
    assert torch.allclose(after, witness(model), rtol=1e-4, atol=1e-4)


def test_a_counted_change_between_two_blocks_is_seen_at_once():
    model = vit()
    with torch.no_grad():
        tokens = model.blocks[0](torch.randn(1, 5, model.embed_dim))
        scaled(model.rein.delta_mlp.weight)
        after = model.blocks[1](tokens)
    wanted = model.blocks[1](tokens).detach()
    assert torch.allclose(after, wanted, rtol=1e-4, atol=1e-4)


def test_steps_loads_modes_and_dtypes_leave_nothing_old(tmp_path):
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
        assert torch.allclose(found[-1], witness(model, images).float(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = model.forward_features(IMAGES)
    assert torch.equal(features(model), found[-1])
    assert not torch.equal(rough.float(), found[-1])


def test_two_models_whose_passes_run_side_by_side_keep_theirs_apart():
    one, two = vit(), vit(rein.ReinConfig(num_tokens=7))
    start = torch.randn(1, 5, one.embed_dim, generator=torch.Generator().manual_seed(0))
    found = [start, start]
    with torch.no_grad():
        for first, second in zip(one.blocks, two.blocks, strict=True):
            found = [first(found[0]), second(found[1])]
    for model, got in zip((one, two), found, strict=True):
        assert torch.allclose(got, model.blocks(start).detach(), rtol=1e-4, atol=1e-4)


def test_stages_whose_layers_take_turns_keep_theirs_apart():
    torch.manual_seed(0)
    model = rein.wrap(timm.create_model("crossvit_9_240", num_classes=0)).eval()  # two branches of two widths
    strong_stages(model)
    images = torch.randn(1, 3, 240, 240, generator=torch.Generator().manual_seed(1))
    assert len({id(hook.one_pass) for hook in model.rein_injection.hooks}) == 2
    assert torch.allclose(features(model, images)[0], witness_of(model, images), rtol=1e-4, atol=1e-4)


def strong_stages(model):
    with torch.no_grad():
        for name, parameter in model.rein.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.5)


def witness_of(model, images):
    with torch.enable_grad():
        return model.forward_features(images)[0].detach()


def test_copies_and_pickles_hold_nothing_that_was_prepared():
    model = vit()
    with torch.no_grad():
        model.blocks[0](torch.randn(1, 5, model.embed_dim))  # the rest of this pass never comes
    hook = model.rein_injection.hooks[0]
    assert hook.one_pass._prepared is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        hooks = twin.rein_injection.hooks
        assert hooks[0].one_pass is hooks[1].one_pass is not hook.one_pass
        assert hooks[0].one_pass._prepared is None
        assert torch.allclose(features(twin), features(model), atol=1e-5)


def test_after_the_last_layer_nothing_is_held():
    model = vit()
    features(model)
    assert model.rein_injection.hooks[0].one_pass._prepared is None


def test_a_lone_adapter_prepares_only_when_it_is_told_to():
    adapter = rein.ReinAdapter(8, 3, rein.ReinConfig(num_tokens=4, rank=2))
    x, one_pass = torch.randn(1, 5, 8), OnePass()
    with torch.no_grad():
        for layer in range(3):
            adapter.delta_mlp.weight.data.mul_(3)  # between two layers of one pass torch alone can't tell
            assert torch.allclose(adapter(x, layer), adapter(x, layer, 0, OnePass()), atol=1e-6)
        kept = adapter(x, 1, 0, one_pass)
        assert torch.allclose(kept, adapter(x, 1), atol=1e-6)


@pytest.mark.parametrize("partly", [False, True])
def test_a_compiled_pass_folds_once_too_and_reads_the_parameters_anew(partly):
    torch._dynamo.reset()
    model, products = vit(), []

    def backend(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes]
        products.append(sum(any(product in name for product in ("linear", "matmul", "addmm")) for name in names))
        return graph

    def run(images):
        if partly:
            return model.forward_intermediates(images, indices=[1], intermediates_only=True, stop_early=True)[0]
        return model.forward_features(images)

    with torch.no_grad():
        wanted, compiled = run(IMAGES), torch.compile(run, backend=backend, fullgraph=True)
        assert torch.allclose(compiled(IMAGES), wanted, rtol=1e-4, atol=1e-4)
        with rein.disabled(model):
            compiled(IMAGES)
        layers = 2 if partly else len(model.blocks)
        assert products[0] - products[1] == 5 * layers + 2
        for change in CHANGES:
            change(model.rein.delta_mlp.weight)
            assert torch.allclose(compiled(IMAGES), run(IMAGES), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(run(IMAGES), wanted, atol=1e-3)
        model(IMAGES)
        assert torch.allclose(features(model), witness(model), rtol=1e-3, atol=1e-3)
    assert len(products) == 2  # nothing was compiled again
