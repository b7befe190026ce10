"""Tests that every method of tuning must pass, the published parameter counts, and a reference of each peer's equations."""

import copy
import pickle
import re
import sys
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import rein
from models import STAGED, build, get_blocks, images
from rein import backbones, heads
from rein.dgss import methods
from rein.dgss.methods import METHODS, find_unused_parameters, tuned_names, tuned_parameters
from rein.errors import InputError, MissingExtraError, UnsupportedBackboneError, WrapError

SMALL = {name: {"num_tokens": 6, "query_dim": 8} for name in ("rein-link", "rein-share")}
SMALL |= {name: {"num_tokens": 6, "query_dim": 8, "rank": 2} for name in ("rein", "rein-lowrank")}
SMALL |= {"rein-core": {"num_tokens": 6}, "lora": {"rank": 2}, "vpt": {"num_tokens": 5}, "adaptformer": {"bottleneck": 4}}
SMALL |= {"soma": {"rank": 2}}
PEERS = ["lora", "vpt", "adaptformer", "soma"]
ZERO_START = ["full", "freeze", "lora", "adaptformer", "soma"]
MERGED = [name for name, method in METHODS.items() if method.merge is not None]
every_name = pytest.mark.parametrize("method", METHODS)
every_method = pytest.mark.parametrize("method", [method for method in METHODS if method != "rein-lowrank"])  # the same as rein
every_rein = pytest.mark.parametrize("method", ["rein", "rein-core", "rein-link", "rein-share"])
every_peer = pytest.mark.parametrize("method", PEERS)


def applied(method, family="vit with registers", **settings):
    return copy.deepcopy(_applied(method, family, **settings))


@cache
def _applied(method, family, **settings):
    backbone = build(family, **({"init_values": 0.3} if family in ("vit with registers", "dinov3") else {}))
    return methods.apply(method, backbone, **{**SMALL.get(method, {}), **settings})


def perturbed(model):
    """Add noise to the tuned parameters, so that those that start at zero change the output."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def loss_of(model, x):
    """A scalar that depends on every token of the last block, on the pooled output, and on the queries if there are any."""
    features = model.forward_features(x)
    loss = (
        model.forward_head(features).square().sum()
        + (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(3))).sum()
    )
    queries = model.rein.queries() if hasattr(model, "rein") and model.rein.config.query_dim else None
    return loss if queries is None else loss + (queries * torch.linspace(-1, 1, queries.numel()).view_as(queries)).sum()


def trained(model, steps=2):
    optimizer = torch.optim.Adam(tuned_parameters(model).values(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, images()).backward()
        optimizer.step()
    return model


PUBLISHED = {
    "full": 303_301_632,
    "freeze": 0,
    "rein": 2_990_081,
    "rein-core": 52_838_400,
    "rein-link": 59_332_864,
    "rein-share": 5_016_065,
    "rein-lowrank": 2_990_081,
    "lora": 786_432,
    "vpt": 3_686_400,
    "adaptformer": 3_171_840,
    "soma": 4_718_592,
}


@every_name
def test_a_vit_large_trains_the_published_number_of_parameters(method):
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", num_classes=0)
        methods.apply(method, model)
    assert sum(p.numel() for p in tuned_parameters(model).values()) == PUBLISHED[method]


@every_peer
@pytest.mark.parametrize(
    "name",
    [
        "vit_large_patch14_dinov2",
        "vit_large_patch16_dinov3",
        "eva02_large_patch14_224",
        "vit_large_patch14_clip_224",
        "samvit_large_patch16",
    ],
)
def test_the_peers_support_the_backbones_of_the_paper(method, name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, depth=3)
        if method == "vpt" and name.startswith("samvit"):
            with pytest.raises(UnsupportedBackboneError, match="global attention"):
                methods.apply(method, model)
            return
        methods.apply(method, model)
    expected = PUBLISHED[method] * 3 // 24
    if method == "soma" and name.startswith("eva02"):  # 2 blocks; its MLP has three layers of 2,730 hidden units
        expected = 2 * 16 * (4 * (1024 + 1024) + 3 * (1024 + 2730))
    assert sum(p.numel() for p in tuned_parameters(model).values()) == expected


@every_method
@pytest.mark.parametrize("family", ["vit", "vit with registers", "eva02", "dinov3"])
def test_a_method_changes_a_backbone_in_place_and_trains_only_its_parameters(method, family):
    bare = build(family)
    model, x = copy.deepcopy(bare), images()
    original = list(model.parameters())  # a reference, so that no new parameter gets the id of a deleted one
    original_ids = {id(parameter) for parameter in original}
    assert methods.apply(method, model, **SMALL.get(method, {})) is model
    assert type(model) is type(bare)
    tuned = tuned_parameters(model)
    if method == "full":
        assert set(tuned) == {name for name, _ in bare.named_parameters()}
    else:
        assert not original_ids & {id(parameter) for parameter in tuned.values()}
        assert all(("lora_" if method == "lora" else method.partition("-")[0] + ".") in name for name in tuned)
        assert bool(tuned) == (method != "freeze")
    with torch.no_grad():
        maps, plain = (backbones.feature_maps(each, x, [1, 3]) for each in (model, bare))
    for got, expected in zip(maps, plain, strict=True):
        assert torch.allclose(got, expected, atol=1e-6) == (method in ZERO_START)
        if method in ZERO_START and method not in ("lora", "soma"):  # their products sum in another order
            assert torch.equal(got, expected)
    assert backbones.find_blocks(model) == backbones.find_blocks(bare)


@every_method
@pytest.mark.parametrize("family", ["vit with registers", "dinov3"])
def test_training_changes_every_tuned_parameter_and_nothing_else(method, family):
    model = applied(method, family).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if method != "freeze":
        trained(model)
        loss_of(model, images()).backward()
    tuned = tuned_parameters(model)
    assert [name for name, parameter in tuned.items() if not parameter.grad.any()] == []
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(tuned)
    constants = {name for name in before if name.endswith(("soma.a_start", "soma.b_start"))}
    assert set(tuned_names(model)) == changed | constants
    assert bool(constants) == (method == "soma")


@every_method
@pytest.mark.parametrize("family", ["vit with drop path", "eva with dropout"])
def test_the_frozen_modules_are_deterministic_in_training(method, family):
    model = build(family)
    modules = [module for module in model.modules() if module is not model]
    perturbed(methods.apply(method, model, **SMALL.get(method, {})))
    assert not any(module.training for module in modules)
    x = images()
    model.train()
    with torch.no_grad():
        first, second = model.forward_features(x), model.forward_features(x)
    assert torch.equal(first, second) == (method != "full")
    assert {module.training for module in modules} == {method == "full"}


@pytest.mark.parametrize("method", [method for method in PEERS if "dropout" in METHODS[method].settings])
def test_the_dropout_of_a_method_is_active_only_in_training(method):
    model, x = perturbed(applied(method, dropout=0.5)), images()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_batch_norm_statistics_stay_fixed_with_freeze_and_are_tuned_with_full():
    frozen, full = (methods.apply(method, STAGED["ResNet"]()).train() for method in ("freeze", "full"))
    assert tuned_names(frozen) == []
    before = copy.deepcopy(frozen.state_dict())
    for model in (frozen, full):
        model(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())
    assert tuned_names(full) == list(full.state_dict())


def test_statistics_of_a_batch_norm_that_trains_are_in_the_state_of_a_partly_frozen_backbone():
    model = STAGED["ResNet"]().requires_grad_(False)
    model.layer4.requires_grad_(True)
    assert tuned_names(model) == [name for name in model.state_dict() if name.startswith("layer4.")]


class _Statistics(nn.Module):
    """A backbone with buffers in a module without parameters, in a module with parameters, and in the root."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)).requires_grad_(False)
        self.trained = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.register_buffer("steps", torch.zeros(()))


def test_buffers_of_a_module_without_parameters_are_tuned_if_the_module_that_contains_it_trains():
    model = _Statistics()
    assert tuned_names(model) == [name for name in model.state_dict() if name.startswith("trained.")]
    assert len(tuned_names(model)) == 2 + 3
    assert tuned_names(model.requires_grad_(False)) == []
    assert tuned_names(model.requires_grad_(True)) == list(model.state_dict())


def test_parameters_and_buffers_of_a_shared_module_are_tuned_under_each_of_its_names():
    model = nn.ModuleDict({"frozen": nn.Linear(2, 2).requires_grad_(False), "norm": nn.BatchNorm1d(2)})
    model["again"] = model["norm"]
    assert tuned_names(model) == [name for name in model.state_dict() if not name.startswith("frozen.")]


@pytest.mark.parametrize(("family", "unused"), [("vit", ["norm.weight", "norm.bias"]), ("beit", [])])
def test_parameters_after_the_feature_maps_are_unused(family, unused):
    model = build(family)
    assert [name for name in find_unused_parameters(model, [1, 3]) if not name.startswith("fc_norm.")] == unused
    assert all(parameter.grad is None and not parameter.is_meta for parameter in model.parameters())
    assert {name for name in find_unused_parameters(model, [1]) if name.startswith("blocks.")} == {
        name for name, _ in model.named_parameters() if name.startswith(("blocks.2.", "blocks.3."))
    }


@every_method
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_tuned_backbone_is_independent(method, duplicate):
    model, x = perturbed(applied(method)), images()
    with torch.no_grad():
        before = model(x)
        twin = duplicate(model).train()
        assert torch.equal(twin.eval()(x), before)
        perturbed(twin)
        assert torch.equal(model(x), before)
        assert torch.equal(twin(x), before) == (method == "freeze")
    twin.train()
    assert not get_blocks(model)[0].attn.training
    assert method == "full" or not get_blocks(twin)[0].attn.training


@pytest.mark.parametrize("method", ["full", "rein", "rein-core", *PEERS])
@pytest.mark.parametrize("family", ["vit", "dinov3"])
def test_gradient_checkpointing_gives_the_same_gradients(method, family):
    def gradients(checkpointing):
        model = perturbed(applied(method, family)).train()
        model.set_grad_checkpointing(checkpointing)
        loss_of(model, images()).backward()
        return {name: parameter.grad for name, parameter in tuned_parameters(model).items()}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


@every_method
def test_the_tuned_names_of_its_state_restore_a_trained_backbone(method):
    model, other, x = perturbed(applied(method)), applied(method), images()
    state = model.state_dict()
    other.load_state_dict({name: state[name] for name in tuned_names(model)}, strict=False)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    assert set(tuned_parameters(other)) == set(tuned_parameters(model))


@every_name
def test_every_method_trains_and_predicts_through_a_segmenter(method):
    backbone = applied(method)
    segmenter = rein.Segmenter(backbone, heads.LinearHead([32], 3)).train()
    groups = rein.param_groups(segmenter)
    in_groups = {id(parameter) for group in groups for parameter in group["params"]}
    expected = [*tuned_parameters(backbone).values(), *segmenter.head.parameters()]
    assert in_groups == {id(parameter) for parameter in expected}
    labels = torch.zeros(2, 40, 32, dtype=torch.long)
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(3):
        losses.append(segmenter(images(2, 40, 32), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert segmenter.predict(images(1, 48, 40), window=32).shape == (1, 3, 48, 40)
    assert method == "full" or not get_blocks(backbone)[0].training


@every_peer
def test_the_peers_accept_other_image_and_batch_sizes(method):
    model = perturbed(applied(method, "dinov3"))
    with torch.no_grad():
        both, first = model.forward_features(images(3, 48, 64)), model.forward_features(images(3, 48, 64)[:1])
    assert both.shape == (3, 5 + 6 * 8, 32)
    torch.testing.assert_close(both[:1], first, rtol=1e-5, atol=1e-5)


@every_peer
def test_tuned_parameters_are_float32_in_a_half_precision_backbone(method):
    model = methods.apply(method, build("dinov3").bfloat16(), **SMALL[method])
    assert {parameter.dtype for parameter in tuned_parameters(model).values()} == {torch.float32}
    features = perturbed(model).train().forward_features(images().bfloat16())
    assert features.dtype == torch.bfloat16
    features.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in tuned_parameters(model).values())


# equations of the papers


@pytest.mark.parametrize("family", ["vit", "eva02", "dinov3", "beit", "sam", "vit with parallel blocks"])
def test_lora_adds_alpha_over_r_times_b_a_to_q_and_v_and_not_to_k(family):
    bare = build(family)
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            if name.endswith(("q_bias", "v_bias", "qkv.bias", "proj.bias")):
                parameter.uniform_(-1, 1)
    model, x = methods.apply("lora", copy.deepcopy(bare), rank=2, alpha=6), images()
    perturbed(model)
    by_hand = copy.deepcopy(bare)
    updated = 0
    for path, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        delta = 6 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        parent, _, part = path.rpartition(".")
        with torch.no_grad():
            if part in ("q", "v"):  # in the backbone, a third of `qkv`
                weight = by_hand.get_submodule(parent).weight
                third = slice(0, len(weight) // 3) if part == "q" else slice(len(weight) // 3 * 2, None)
                weight[third] += delta
            else:
                assert part in ("q_proj", "v_proj")
                by_hand.get_submodule(path).weight += delta
        updated += 1
    assert updated == 2 * sum(hasattr(module, "proj_drop") for module in bare.modules())
    with torch.no_grad():
        # the sums have another order
        torch.testing.assert_close(model.forward_features(x), by_hand.forward_features(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model.forward_features(x), bare.forward_features(x), atol=1e-2)


def test_lora_tunes_only_the_given_targets():
    model = applied("lora", targets=("k",))
    names = set(tuned_parameters(model))
    assert len(names) == 8
    assert all(".attn.qkv.k.lora_" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_is_lora_with_learnable_norms_of_the_updated_rows(dtype):
    bare, x = build("dinov3").to(dtype), images().to(dtype)
    model = methods.apply("lora", copy.deepcopy(bare), rank=2, alpha=6, dora=True)
    with torch.no_grad():  # initially the norms are those of the frozen rows, up to rounding
        torch.testing.assert_close(model(x), bare(x), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    tuned, by_hand = tuned_parameters(perturbed(model)), copy.deepcopy(bare)
    assert {parameter.dtype for parameter in tuned.values()} == {torch.float32}
    count = 4 * 2 * (2 * 2 * 32 + 32)  # blocks, q and v, A and B, norms
    assert sum(parameter.numel() for parameter in tuned.values()) == count
    with torch.no_grad():
        for path, layer in model.named_modules():
            if hasattr(layer, "lora_A"):
                parent, _, part = path.rpartition(".")
                weight = by_hand.get_submodule(parent).weight
                third = slice(0, len(weight) // 3) if part == "q" else slice(len(weight) // 3 * 2, None)
                rows = weight[third] + 6 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                weight[third] = layer.lora_magnitude_vector["default"].weight[:, None] * F.normalize(rows, dim=1)
        got, expected = model.forward_features(x).float(), by_hand.forward_features(x).float()
        # the sums have another order
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    model.train().forward_features(x).float().square().sum().backward()
    assert all(parameter.grad.any() for parameter in tuned.values())


@pytest.mark.parametrize("family", ["vit", "eva02", "dinov3", "beit", "sam", "vit with parallel blocks"])
def test_soma_trains_the_smallest_singular_components_of_every_matrix(family):
    bare = build(family).double()
    model, x = methods.apply("soma", copy.deepcopy(bare), rank=3, blocks=[1, 3]), images().double()
    start = {path: layer for path, layer in copy.deepcopy(model).named_modules() if hasattr(layer, "soma")}
    perturbed(model)
    by_hand = copy.deepcopy(bare)
    with torch.no_grad():
        for path, layer in start.items():
            base = by_hand.get_submodule(path)
            parts = base.weight.chunk(3) if path.endswith(".qkv") else [base.weight]
            new = []
            trained = model.get_submodule(path).soma
            for part, weight in enumerate(parts):
                u, s, v = torch.linalg.svd(weight)
                order = s.argsort()[:3]
                minor = u[:, order] @ torch.diag(s[order]) @ v[order]
                a, b = layer.soma.a[part], layer.soma.b[part]
                torch.testing.assert_close(b @ a, minor)
                # both factors have the square roots of the singular values
                torch.testing.assert_close(a.norm(dim=1).square().sort().values, s[order].sort().values)
                torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))
                new.append(weight - minor + trained.b[part] @ trained.a[part])
            base.weight.copy_(torch.cat(new))
        torch.testing.assert_close(model.forward_features(x), by_hand.forward_features(x), rtol=1e-10, atol=1e-10)
        assert not torch.allclose(model.forward_features(x), bare.forward_features(x), atol=1e-2)
    adapted = {path.rpartition(".")[2] for path in start}
    separate = {"q_proj", "k_proj", "v_proj", "proj", "fc1_g", "fc1_x", "fc2"}
    assert adapted == (separate if family == "eva02" else {"qkv", "proj", "fc1", "fc2"})
    assert {re.search(r"blocks\.(\d+)", path)[1] for path in start} == {"1", "3"}


def test_soma_adapts_the_last_two_thirds_of_the_blocks():
    with torch.device("meta"):
        model = methods.apply("soma", timm.create_model("vit_large_patch14_dinov2", num_classes=0))
    assert {int(name.split(".")[1]) for name in tuned_parameters(model)} == set(range(8, 24))
    assert sum(p.numel() for p in model.blocks[8].parameters() if p.requires_grad) == 294_912


def test_soma_restores_a_state_on_a_machine_whose_svd_gives_other_factors(monkeypatch):
    bare, x = build("vit"), images()
    model = perturbed(methods.apply("soma", copy.deepcopy(bare), rank=2))
    svd = torch.linalg.svd

    def other_svd(matrix, full_matrices):
        u, s, v = svd(matrix, full_matrices=full_matrices)
        return -u, s * 1.001, -v

    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    other, state = methods.apply("soma", copy.deepcopy(bare), rank=2), model.state_dict()
    frozen = [name for name in state if name not in tuned_names(model)]
    assert all(torch.equal(other.state_dict()[name], state[name]) for name in frozen)
    other.load_state_dict({name: state[name] for name in tuned_names(model)}, strict=False)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_soma_refuses_a_rank_above_the_number_of_components():
    with pytest.raises(InputError, match=r"rank is 33, but blocks\.1\.attn\.qkv has 32 singular components; expected at most"):
        methods.apply("soma", build("vit"), rank=33)
    with pytest.raises(InputError, match=r"soma: blocks is \[4\]; expected distinct block indices from 0 to 3"):
        methods.apply("soma", build("vit"), blocks=[4])


@pytest.mark.parametrize("family", ["vit with registers", "eva02", "dinov3", "beit", "sam"])
@pytest.mark.parametrize(("method", "settings"), [("soma", {}), ("lora", {}), ("lora", {"dora": True})], ids=str)
def test_a_merged_backbone_is_the_bare_model_with_the_outputs_of_the_tuned_one(method, settings, family):
    bare, x = build(family), images()
    model = methods.apply(method, copy.deepcopy(bare), **SMALL[method], **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned_parameters(model).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        before = model.eval().forward_features(x)
        assert not torch.allclose(before, bare.eval().forward_features(x), atol=1e-3)
        assert methods.merge(model) is model
        torch.testing.assert_close(model.forward_features(x), before, rtol=0, atol=1e-6 * before.abs().max().item())
    kinds = {name: type(module) for name, module in bare.named_modules()}
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in bare.state_dict().items()
    }
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in bare.named_parameters()]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    bare.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(bare.forward_features(x), model.forward_features(x))
    methods.apply("rein", model)  # it counts as a bare backbone


@pytest.mark.parametrize("method", [method for method in METHODS if method not in MERGED])
def test_merging_another_method_is_an_error_that_names_those_that_can_be_merged(method):
    with pytest.raises(InputError, match="this VisionTransformer has nothing to merge; .* by lora or soma. Use it as it is"):
        methods.merge(applied(method))


@pytest.mark.parametrize("family", ["vit", "vit with registers", "eva02", "dinov3"])
def test_vpt_inserts_prompts_before_the_patches_and_drops_their_outputs_in_every_block(family):
    bare = build(family).eval()
    model, x, count, prefix = methods.apply("vpt", copy.deepcopy(bare), num_tokens=5), images(), 5, bare.num_prefix_tokens
    nn.init.normal_(model.vpt.prompts)
    with torch.no_grad():
        tokens, rope = bare.patch_embed(x), {}
        if hasattr(bare, "rope"):
            tokens, embedding = bare._pos_embed(tokens)
            rope = {"rope": embedding}
        else:
            tokens = bare.norm_pre(bare.patch_drop(bare._pos_embed(tokens)))
        for block, prompts in zip(bare.blocks, model.vpt.prompts, strict=True):
            if rope:
                block.attn.num_prefix_tokens = prefix + count  # prefix tokens are not rotated
            tokens = torch.cat((tokens[:, :prefix], prompts.expand(len(x), -1, -1), tokens[:, prefix:]), 1)
            tokens = block(tokens, **rope)
            tokens = torch.cat((tokens[:, :prefix], tokens[:, prefix + count :]), 1)
        torch.testing.assert_close(model.forward_features(x), bare.norm(tokens), rtol=1e-6, atol=1e-6)
        maps = backbones.feature_maps(model, x, [3])
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), tokens[:, prefix:], rtol=1e-6, atol=1e-6)


def test_prompts_start_within_the_bound_of_the_paper():
    prompts = methods.apply("vpt", build("vit"), num_tokens=50).vpt.prompts.detach()
    bound = (6 / (3 * 8**2 + 32)) ** 0.5
    assert 0.95 * bound < prompts.abs().max() <= bound
    assert prompts.mean().abs() < 0.02 * bound


def _vit(block, x, rope):
    x = x + block.ls1(block.attn(block.norm1(x)))
    normed = block.norm2(x)
    return x + block.ls2(block.mlp(normed)), normed


def _eva(block, x, rope):
    attended = block.attn(block.norm1(x), rope=rope)
    x = x + (attended if block.gamma_1 is None else block.gamma_1 * attended)
    normed = block.norm2(x)
    fed = block.mlp(normed)
    return x + (fed if block.gamma_2 is None else block.gamma_2 * fed), normed


def _cait(block, x, rope):
    x = x + block.gamma_1 * block.attn(block.norm1(x))
    normed = block.norm2(x)
    return x + block.gamma_2 * block.mlp(normed), normed


@pytest.mark.parametrize(
    ("family", "forward"), [("vit with registers", _vit), ("eva02", _eva), ("dinov3", _eva), ("cait", _cait)]
)
def test_adaptformer_adds_a_bottleneck_that_layer_scale_does_not_scale(family, forward):
    bare = build(family, **({"init_values": 0.01} if family in ("vit with registers", "dinov3") else {}))
    model = perturbed(methods.apply("adaptformer", copy.deepcopy(bare), bottleneck=4, scale=0.3))
    x, rope = torch.randn(2, 21 if family == "dinov3" else 17, 32), None
    if family in ("eva02", "dinov3"):
        _, rope = bare._pos_embed(bare.patch_embed(images()))
    with torch.no_grad():
        for block, adapted, branch in zip(bare.blocks, model.blocks, model.adaptformer, strict=True):
            plain, normed = forward(block, x, rope)
            hidden = F.relu(normed @ branch.down.weight.T + branch.down.bias)
            expected = plain + 0.3 * (hidden @ branch.up.weight.T + branch.up.bias)
            got = adapted(x) if rope is None else adapted(x, rope=rope)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(expected, plain, atol=1e-2)


# Rein in some of the blocks


@every_rein
@pytest.mark.parametrize("blocks", [[1, 2], (3,), range(4)], ids=str)
def test_rein_adapts_only_the_given_blocks(method, blocks):
    bare, x = build("vit with registers"), images()
    model = perturbed(methods.apply(method, copy.deepcopy(bare), **SMALL[method], blocks=blocks))
    adapted = [index for index, block in enumerate(get_blocks(model)) if block._forward_hooks]
    assert adapted == list(blocks)
    with torch.no_grad():
        maps, plain = (backbones.feature_maps(each, x, range(4)) for each in (model, bare))
    equal = [torch.equal(got, expected) for got, expected in zip(maps, plain, strict=True)]
    assert equal == [index < blocks[0] for index in range(4)]


def test_rein_with_the_indices_of_all_blocks_in_any_order_is_rein_without_the_setting():
    bare = build("vit with registers")
    models = []
    for setting in ({}, {"blocks": [2, 0, 3, 1]}):
        torch.manual_seed(3)
        models.append(perturbed(methods.apply("rein", copy.deepcopy(bare), **SMALL["rein"], **setting)))
    default, model = models
    assert model.rein_injection.blocks == default.rein_injection.blocks
    with torch.no_grad():
        assert torch.equal(model(images()), default(images()))


def test_rein_in_some_blocks_of_a_staged_backbone_saves_and_restores_its_state():
    model, other = (methods.apply("rein", STAGED["ConvNeXt"](), **SMALL["rein"], blocks=[0, 5]) for _ in range(2))
    assert {name.partition(".")[0] for name in tuned_names(model)} == {"rein"}
    other.load_state_dict(model.state_dict())  # the same frozen weights
    state = perturbed(model).state_dict()
    other.load_state_dict({name: state[name] for name in tuned_names(model)}, strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_only_rein_and_soma_have_the_setting_blocks():
    assert {n for n, method in METHODS.items() if "blocks" in method.settings} == {n for n in METHODS if "rein" in n} | {"soma"}
    assert METHODS["rein"].settings["blocks"] is None


@pytest.mark.parametrize("blocks", [[], [4], [-1], [0, 0], [True], [1.0], "01", 2, {0: 1}], ids=str)
def test_invalid_block_indices_are_rejected_and_change_nothing(blocks):
    model = build("vit")
    message = f"blocks is {blocks!r}; expected distinct block indices from 0 to 3, since VisionTransformer has 4 blocks."
    with pytest.raises(InputError, match=re.escape(message)):
        methods.apply("rein", model, blocks=blocks)
    assert not hasattr(model, "rein")
    assert all(parameter.requires_grad for parameter in model.parameters())


# errors


def test_errors_for_unknown_names_and_settings_list_the_valid_ones():
    with pytest.raises(InputError, match="method is 'prompt'; expected one of full, freeze, rein, .*adaptformer. Correct"):
        methods.apply("prompt", build("vit"))
    with pytest.raises(
        InputError, match=r"vpt has no settings \['tokens'\]; expected some of: num_tokens=150, dropout=0.0. Remove"
    ):
        methods.apply("vpt", build("vit"), tokens=3)
    with pytest.raises(InputError, match=r"full has no settings \['rank'\]; expected none. Remove"):
        methods.apply("full", build("vit"), rank=3)
    with pytest.raises(InputError, match=r"rein has no settings \['m'\]; expected some of: num_tokens=100, rank=16"):
        methods.apply("rein", build("vit"), m=3)
    with pytest.raises(InputError, match="backbone is a str; expected a torch.nn.Module"):
        methods.apply("full", "vit")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"rank": 0}, "lora: rank is 0; expected a whole number of at least 1. Change it"),
        ("lora", {"alpha": -1}, "alpha is -1"),
        ("lora", {"targets": "qv"}, "targets is 'qv'"),
        ("lora", {"targets": ["o"]}, "one or more of q, k, v"),
        ("lora", {"dora": 1}, "lora: dora is 1; expected true or false"),
        ("vpt", {"num_tokens": 1.5}, "num_tokens is 1.5"),
        ("vpt", {"dropout": 1}, "dropout is 1; expected a number of at least 0 and below 1. Change it"),
        ("adaptformer", {"bottleneck": True}, "bottleneck is True"),
        ("adaptformer", {"scale": "big"}, "scale is 'big'"),
        ("rein", {"rank": 0}, "ReinConfig.rank is 0"),
    ],
)
def test_invalid_settings_are_rejected(method, settings, message):
    with pytest.raises(InputError, match=message):
        methods.apply(method, build("vit"), **settings)


UNSUPPORTED = [
    ("vpt", "sam", "global attention over tokens"),
    ("vpt", "SwinTransformer", "global attention over tokens"),
    ("vpt", "beit with shared position bias", "receives shared_rel_pos_bias"),
    ("vpt", "relative positions", "does not accept extra tokens"),
    ("vpt", "tnt", "several tensors"),
    ("adaptformer", "vit with parallel blocks", "has no norm2 and no mlp"),
    ("adaptformer", "xcit", "has gamma1, gamma3, gamma2, which may scale"),
    ("adaptformer", "SwinTransformerV2", "the input of mlp is not the output of norm2"),
    ("lora", "MlpMixer", "block 'blocks.0' of MlpMixer has no attention projection"),
    ("lora", "GlobalContextVit", "are not three equal parts"),
]


@pytest.mark.parametrize(("method", "family", "message"), UNSUPPORTED)
def test_an_unsupported_backbone_is_rejected_and_unchanged(method, family, message):
    model = STAGED[family]() if family in STAGED else build(family).train()
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedBackboneError, match=message):
        methods.apply(method, model)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("first", ["freeze", "rein", *PEERS])
def test_a_backbone_cannot_get_a_second_method(first):
    model = applied(first)
    with pytest.raises(WrapError, match="already has a method; expected a bare backbone. Apply vpt to a new one"):
        methods.apply("vpt", model)


def test_lora_without_peft_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"needs peft, .* pip install 'rein-adapter\[peers\]'"):
        methods.apply("lora", build("vit"))


def test_full_fine_tuning_has_a_tenth_of_the_learning_rate():
    assert {name for name, entry in METHODS.items() if entry.backbone_factor != 1} == {"full"}
    assert METHODS["full"].backbone_factor == 0.1
    assert all("arXiv" in entry.source and entry.name == name for name, entry in METHODS.items())
