"""The contract of every method of tuning, asked of all; the published counts; and a witness of each peer's mathematics."""

import copy
import pickle
import sys
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import rein
from models import STAGED, blocks_of, build, images
from rein import backbones, heads
from rein.dgss import methods
from rein.dgss.methods import METHODS, load_tuned, tuned_parameters, tuned_state
from rein.errors import CheckpointError, InputError, MissingExtraError, UnsupportedBackboneError, WrapError

SMALL = {name: {"num_tokens": 6, "query_dim": 8} for name in ("rein-link", "rein-share")}
SMALL |= {name: {"num_tokens": 6, "query_dim": 8, "rank": 2} for name in ("rein", "rein-lowrank")}
SMALL |= {"rein-core": {"num_tokens": 6}, "lora": {"rank": 2}, "vpt": {"num_tokens": 5}, "adaptformer": {"bottleneck": 4}}
PEERS = ["lora", "vpt", "adaptformer"]
ZERO_START = ["full", "freeze", "lora", "adaptformer"]
every_name = pytest.mark.parametrize("method", METHODS)
every_method = pytest.mark.parametrize("method", [method for method in METHODS if method != "rein-lowrank"])  # which is rein
every_peer = pytest.mark.parametrize("method", PEERS)


def applied(method, family="vit with registers", **settings):
    return copy.deepcopy(_applied(method, family, **settings))


@cache
def _applied(method, family, **settings):
    backbone = build(family, **({"init_values": 0.3} if family in ("vit with registers", "dinov3") else {}))
    return methods.apply(method, backbone, **{**SMALL.get(method, {}), **settings})


def perturbed(model):
    """Make what is zero at the start visible."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def loss_of(model, x):
    """A number that depends on every row of the last block's output, on what is pooled, and on queries where there are some."""
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
}


@every_name
def test_a_vit_large_trains_as_many_parameters_as_published(method):
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
def test_the_peers_fit_the_backbones_of_the_paper(method, name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, depth=3)
        if method == "vpt" and name.startswith("samvit"):
            with pytest.raises(UnsupportedBackboneError, match="global attention"):
                methods.apply(method, model)
            return
        methods.apply(method, model)
    assert sum(p.numel() for p in tuned_parameters(model).values()) == PUBLISHED[method] * 3 // 24


@every_method
@pytest.mark.parametrize("family", ["vit", "vit with registers", "eva02", "dinov3"])
def test_a_method_changes_a_backbone_in_place_and_trains_its_own_parameters_alone(method, family):
    bare = build(family)
    model, x = copy.deepcopy(bare), images()
    found = list(model.parameters())  # held, so that no new parameter gets the number of one that is gone
    own = {id(parameter) for parameter in found}
    assert methods.apply(method, model, **SMALL.get(method, {})) is model
    assert type(model) is type(bare)
    tuned = tuned_parameters(model)
    if method == "full":
        assert set(tuned) == {name for name, _ in bare.named_parameters()}
    else:
        assert not own & {id(parameter) for parameter in tuned.values()}
        assert all(("lora_" if method == "lora" else method.partition("-")[0] + ".") in name for name in tuned)
        assert bool(tuned) == (method != "freeze")
    with torch.no_grad():
        maps, plain = (backbones.feature_maps(each, x, [1, 3]) for each in (model, bare))
    for got, wanted in zip(maps, plain, strict=True):
        assert torch.allclose(got, wanted, atol=1e-6) == (method in ZERO_START)
        if method in ZERO_START and method != "lora":  # whose three products may sum in another order than one
            assert torch.equal(got, wanted)
    assert backbones.find_sites(model) == backbones.find_sites(bare)


@every_method
@pytest.mark.parametrize("family", ["vit with registers", "dinov3"])
def test_training_moves_every_tuned_parameter_and_nothing_else(method, family):
    model = applied(method, family).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if method != "freeze":
        trained(model)
        loss_of(model, images()).backward()
    tuned = tuned_parameters(model)
    assert [name for name, parameter in tuned.items() if not parameter.grad.any()] == []
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(tuned) == set(tuned_state(model))


@every_method
@pytest.mark.parametrize("family", ["vit with drop path", "eva with dropout"])
def test_what_is_frozen_is_deterministic_while_training(method, family):
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


@every_peer
def test_a_methods_own_dropout_is_on_while_training_alone(method):
    model, x = perturbed(applied(method, dropout=0.5)), images()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_batch_norm_of_a_frozen_backbone_is_left_alone_and_that_of_a_full_one_is_in_its_state():
    frozen, full = (methods.apply(method, STAGED["ResNet"]()).train() for method in ("freeze", "full"))
    assert tuned_state(frozen) == {}
    before = copy.deepcopy(frozen.state_dict())
    for model in (frozen, full):
        model(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())
    assert set(tuned_state(full)) == set(full.state_dict())


def test_statistics_of_a_batch_norm_that_trains_are_in_the_state_of_a_partly_frozen_backbone():
    model = STAGED["ResNet"]().requires_grad_(False)
    model.layer4.requires_grad_(True)
    assert set(tuned_state(model)) == {name for name in model.state_dict() if name.startswith("layer4.")}


@every_method
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_independent(method, duplicate):
    model, x = perturbed(applied(method)), images()
    with torch.no_grad():
        before = model(x)
        twin = duplicate(model).train()
        assert torch.equal(twin.eval()(x), before)
        perturbed(twin)
        assert torch.equal(model(x), before)
        assert torch.equal(twin(x), before) == (method == "freeze")
    twin.train()
    assert not blocks_of(model)[0].attn.training
    assert method == "full" or not blocks_of(twin)[0].attn.training


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
def test_a_tuned_state_restores_what_was_trained(method):
    model, other, x = perturbed(applied(method)), applied(method), images()
    state = {name: tensor.clone() for name, tensor in tuned_state(model).items()}
    load_tuned(other, state)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    assert all(torch.equal(tensor, state[name]) for name, tensor in tuned_state(other).items())
    assert set(tuned_parameters(other)) == set(tuned_parameters(model))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"adaptformer.0.up.bias": None}, "VisionTransformer: missing: adaptformer.0.up.bias. Apply"),
        ({"strange": torch.zeros(1)}, "VisionTransformer: unexpected: strange. Apply"),
        ({"adaptformer.1.up.bias": torch.zeros(3)}, r"wrong shape: adaptformer.1.up.bias is \(3,\), wanted \(32,\). Apply"),
        ({"adaptformer.0.up.bias": None, "strange": torch.zeros(1)}, "missing: adaptformer.0.up.bias; unexpected: strange"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(spoil, message):
    model = applied("adaptformer")
    state = {name: tensor + 1 for name, tensor in tuned_state(model).items()} | spoil
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_tuned(model, {name: tensor for name, tensor in state.items() if tensor is not None})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@every_name
def test_every_method_trains_and_predicts_through_a_segmenter(method):
    backbone = applied(method)
    segmenter = rein.Segmenter(backbone, heads.LinearHead([32], 3)).train()
    groups = rein.param_groups(segmenter)
    in_groups = {id(parameter) for group in groups for parameter in group["params"]}
    wanted = [*tuned_parameters(backbone).values(), *segmenter.head.parameters()]
    assert in_groups == {id(parameter) for parameter in wanted}
    labels = torch.zeros(2, 40, 32, dtype=torch.long)
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(3):
        losses.append(segmenter.loss(images(2, 40, 32), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert segmenter.predict(images(1, 48, 40), window=32).shape == (1, 3, 48, 40)
    assert method == "full" or not blocks_of(backbone)[0].training


@every_peer
def test_images_of_other_sizes_and_batches_are_taken(method):
    model = perturbed(applied(method, "dinov3"))
    with torch.no_grad():
        both, first = model.forward_features(images(3, 48, 64)), model.forward_features(images(3, 48, 64)[:1])
    assert both.shape == (3, 5 + 6 * 8, 32)
    torch.testing.assert_close(both[:1], first, rtol=1e-5, atol=1e-5)


@every_peer
def test_what_trains_is_float32_beside_a_half_precision_backbone(method):
    model = methods.apply(method, build("dinov3").bfloat16(), **SMALL[method])
    assert {parameter.dtype for parameter in tuned_parameters(model).values()} == {torch.float32}
    features = perturbed(model).train().forward_features(images().bfloat16())
    assert features.dtype == torch.bfloat16
    features.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in tuned_parameters(model).values())


# mathematics


@pytest.mark.parametrize("family", ["vit", "eva02", "dinov3", "beit", "sam", "vit with parallel blocks"])
def test_lora_adds_alpha_over_r_times_b_a_to_q_and_v_and_leaves_k(family):
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
        where, _, part = path.rpartition(".")
        with torch.no_grad():
            if part in ("q", "v"):  # a third of `qkv`
                weight = by_hand.get_submodule(where).weight
                third = slice(0, len(weight) // 3) if part == "q" else slice(len(weight) // 3 * 2, None)
                weight[third] += delta
            else:
                assert part in ("q_proj", "v_proj")
                by_hand.get_submodule(path).weight += delta
        updated += 1
    assert updated == 2 * sum(hasattr(module, "proj_drop") for module in bare.modules())
    with torch.no_grad():
        # summed in another order
        torch.testing.assert_close(model.forward_features(x), by_hand.forward_features(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model.forward_features(x), bare.forward_features(x), atol=1e-2)


def test_lora_tunes_the_targets_that_are_asked_for():
    model = applied("lora", targets=("k",))
    names = set(tuned_parameters(model))
    assert len(names) == 8
    assert all(".attn.qkv.k.lora_" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_is_lora_whose_updated_rows_have_lengths_of_their_own(dtype):
    bare, x = build("dinov3").to(dtype), images().to(dtype)
    model = methods.apply("lora", copy.deepcopy(bare), rank=2, alpha=6, dora=True)
    with torch.no_grad():  # at the start the lengths are those of the frozen rows, to rounding
        torch.testing.assert_close(model(x), bare(x), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    tuned, by_hand = tuned_parameters(perturbed(model)), copy.deepcopy(bare)
    assert {parameter.dtype for parameter in tuned.values()} == {torch.float32}
    assert sum(parameter.numel() for parameter in tuned.values()) == 4 * 2 * (
        2 * 2 * 32 + 32
    )  # blocks, q and v, A and B, lengths
    with torch.no_grad():
        for path, layer in model.named_modules():
            if hasattr(layer, "lora_A"):
                where, _, part = path.rpartition(".")
                weight = by_hand.get_submodule(where).weight
                third = slice(0, len(weight) // 3) if part == "q" else slice(len(weight) // 3 * 2, None)
                rows = weight[third] + 6 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                weight[third] = layer.lora_magnitude_vector["default"].weight[:, None] * F.normalize(rows, dim=1)
        got, wanted = model.forward_features(x).float(), by_hand.forward_features(x).float()
        # summed in another order
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    model.train().forward_features(x).float().square().sum().backward()
    assert all(parameter.grad.any() for parameter in tuned.values())


@pytest.mark.parametrize("family", ["vit", "vit with registers", "eva02", "dinov3"])
def test_vpt_is_the_loop_that_puts_prompts_before_the_patches_and_drops_what_comes_out_there(family):
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
                block.attn.num_prefix_tokens = prefix + count  # which are not rotated
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
def test_adaptformer_is_the_block_with_a_bottleneck_that_its_layer_scale_does_not_touch(family, forward):
    bare = build(family, **({"init_values": 0.01} if family in ("vit with registers", "dinov3") else {}))
    model = perturbed(methods.apply("adaptformer", copy.deepcopy(bare), bottleneck=4, scale=0.3))
    x, rope = torch.randn(2, 21 if family == "dinov3" else 17, 32), None
    if family in ("eva02", "dinov3"):
        _, rope = bare._pos_embed(bare.patch_embed(images()))
    with torch.no_grad():
        for block, adapted, branch in zip(bare.blocks, model.blocks, model.adaptformer, strict=True):
            plain, normed = forward(block, x, rope)
            hidden = F.relu(normed @ branch.down.weight.T + branch.down.bias)
            wanted = plain + 0.3 * (hidden @ branch.up.weight.T + branch.up.bias)
            got = adapted(x) if rope is None else adapted(x, rope=rope)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(wanted, plain, atol=1e-2)


# refusals


def test_unknown_names_and_settings_say_what_there_is():
    with pytest.raises(InputError, match="no method is named 'prompt'; there are full, freeze, rein, .*adaptformer"):
        methods.apply("prompt", build("vit"))
    with pytest.raises(InputError, match=r"vpt has no settings \['tokens'\]; there are: num_tokens=150, dropout=0.0"):
        methods.apply("vpt", build("vit"), tokens=3)
    with pytest.raises(InputError, match=r"full has no settings \['rank'\]; there are: none"):
        methods.apply("full", build("vit"), rank=3)
    with pytest.raises(InputError, match=r"rein has no settings \['m'\]; there are: num_tokens=100, rank=16"):
        methods.apply("rein", build("vit"), m=3)
    with pytest.raises(InputError, match=r"torch.nn.Module; got str"):
        methods.apply("full", "vit")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"rank": 0}, "lora: rank is 0; it must be a whole number"),
        ("lora", {"alpha": -1}, "alpha is -1"),
        ("lora", {"targets": "qv"}, "targets is 'qv'"),
        ("lora", {"targets": ["o"]}, "one or more of q, k, v"),
        ("lora", {"dora": 1}, "lora: dora is 1; it must be true or false"),
        ("vpt", {"num_tokens": 1.5}, "num_tokens is 1.5"),
        ("vpt", {"dropout": 1}, "from 0 to under 1"),
        ("adaptformer", {"bottleneck": True}, "bottleneck is True"),
        ("adaptformer", {"scale": "big"}, "scale is 'big'"),
        ("rein", {"rank": 0}, "ReinConfig.rank is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(method, settings, message):
    with pytest.raises(InputError, match=message):
        methods.apply(method, build("vit"), **settings)


REFUSED = [
    ("vpt", "sam", "global attention over tokens"),
    ("vpt", "SwinTransformer", "global attention over tokens"),
    ("vpt", "beit with shared position bias", "it is given shared_rel_pos_bias"),
    ("vpt", "relative positions", "does not take more tokens"),
    ("vpt", "tnt", "several tensors"),
    ("adaptformer", "vit with parallel blocks", "has no norm2 and no mlp"),
    ("adaptformer", "xcit", "has gamma1, gamma3, gamma2 beside"),
    ("adaptformer", "SwinTransformerV2", "does not give its mlp what its norm2 gives"),
    ("lora", "MlpMixer", "block 'blocks.0' of MlpMixer has none"),
    ("lora", "GlobalContextVit", "they are no three equal parts"),
]


@pytest.mark.parametrize(("method", "family", "message"), REFUSED)
def test_a_backbone_that_a_method_does_not_fit_is_refused_and_left_as_it_was(method, family, message):
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
def test_a_backbone_has_one_method(first):
    model = applied(first)
    with pytest.raises(WrapError, match="has a method already; apply vpt to a bare backbone"):
        methods.apply("vpt", model)


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"needs peft, .* pip install 'rein-adapter\[peers\]'"):
        methods.apply("lora", build("vit"))


def test_the_learning_rate_of_the_backbone_is_a_tenth_where_all_of_it_trains():
    assert {name for name, row in METHODS.items() if row.backbone_factor != 1} == {"full"}
    assert METHODS["full"].backbone_factor == 0.1
    assert all("arXiv" in row.source and row.name == name for name, row in METHODS.items())
