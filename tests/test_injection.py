"""The contract of `rein.wrap`, on families with different outputs or blocks; `test_families` covers every family."""

import copy
import linecache
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

import rein
from interrupts import PACKAGE, interrupt, lines_of
from models import PREFIX_TOKENS, amplify_adapter, build, get_blocks, images
from rein import backbones
from rein.errors import WrapError
from rein.testing import tiny_vit
from snapshots import assert_unchanged, snapshot

every_family = pytest.mark.parametrize("family", ["vit", "vit with registers", "eva02", "sam", "tnt", "xcit", "naflex"])
SMALL = rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)


def wrapped(family, config=SMALL, **settings):
    return amplify_adapter(rein.wrap(build(family, **settings), config))


def block_outputs(model, x):
    """The output of every block, after all hooks."""
    outputs = []
    handles = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in get_blocks(model)]
    try:
        model.forward_features(x)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


@every_family
def test_wrap_returns_the_same_object_and_adds_only_rein_keys(family):
    model = build(family)
    before, cls = list(model.state_dict()), type(model)
    assert rein.wrap(model, SMALL) is model
    assert type(model) is cls
    added = [key for key in model.state_dict() if key not in before]
    assert added == [f"rein.{key}" for key in model.rein.state_dict()]
    assert [key for key in model.state_dict() if not key.startswith("rein.")] == before


@every_family
def test_every_feature_path_is_refined(family):
    bare, model, x = build(family), wrapped(family), images()
    assert not torch.allclose(model(x), bare(x))
    assert not torch.allclose(model.forward_features(x), bare.forward_features(x))
    for refined, plain in zip(
        model.forward_intermediates(x, intermediates_only=True),
        bare.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        assert not torch.allclose(refined, plain)
    if hasattr(model, "get_intermediate_layers"):
        assert not torch.allclose(model.get_intermediate_layers(x, 1)[0], bare.get_intermediate_layers(x, 1)[0])


@every_family
def test_the_adapter_refines_patch_tokens_and_prefix_tokens_stay_bit_identical(family):
    bare, model, x = build(family).requires_grad_(False), wrapped(family), images()
    plain, refined = block_outputs(bare, x)[0], block_outputs(model, x)[0]
    if isinstance(plain, tuple):  # TNT: (pixel tokens, patch tokens); pixel tokens pass through
        assert torch.equal(plain[0], refined[0])
        plain, refined = plain[1], refined[1]
    prefix = PREFIX_TOKENS[family][0]
    assert torch.equal(refined[:, :prefix], plain[:, :prefix])
    assert torch.equal(refined[:, prefix:], model.rein(plain[:, prefix:], 0))
    assert not torch.equal(refined[:, prefix:], plain[:, prefix:])


def test_prefix_tokens_are_measured_and_not_read_from_the_model():
    model = build("vit")
    model.num_prefix_tokens = 7  # wrong on purpose
    rein.wrap(model, SMALL)
    assert {block.num_prefix_tokens for block in model.rein_injection.blocks} == {1}


@every_family
def test_gradients_reach_every_layer_and_nothing_frozen(family):
    model, x = wrapped(family), images()
    model.train()
    maps = model.forward_intermediates(x, intermediates_only=True)
    loss = sum(feature_map.square().mean() for feature_map in maps) + model.rein.queries().square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("rein."), name
    for tokens in (model.rein.tokens_a, model.rein.tokens_b):
        assert (tokens.grad.flatten(1).abs().amax(1) > 0).all()


@every_family
def test_training_mode_leaves_the_frozen_part_deterministic(family):
    model, x = wrapped(family), images()
    expected = model(x)
    model.train()
    assert model.training
    assert model.rein.training
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


def test_batch_norm_statistics_of_the_frozen_part_do_not_change():
    model = build("vit")
    model.blocks[1].norm1 = nn.Sequential(norm := _TokenBatchNorm(32))
    rein.wrap(model, SMALL).train()
    before = norm.bn.running_mean.clone()
    model(images())
    assert torch.equal(norm.bn.running_mean, before)


class _TokenBatchNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)

    def forward(self, x):
        return self.bn(x.mT).mT


def test_an_attached_head_and_unfrozen_layers_train():
    model = rein.wrap(build("vit"), SMALL)
    model.reset_classifier(5)
    model.attached = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 2))
    model.blocks[2].requires_grad_(True)
    model.train()
    assert all(module.training for module in [model.head, *model.attached, *model.blocks[2].mlp.children()][:3])
    assert not model.blocks[1].training
    assert model.blocks[2].training
    model.attached(model(images())).sum().backward()
    assert model.head.weight.grad is not None
    assert model.blocks[2].mlp.fc1.weight.grad is not None
    assert model.blocks[1].mlp.fc1.weight.grad is None


@every_family
def test_outputs_in_disabled_and_after_unwrap_are_bit_identical_to_the_bare_ones(family):
    bare, model, x = build(family), wrapped(family), images()
    # torch uses other kernels for weights that require a gradient, so compare a frozen model with a frozen one
    expected_frozen, expected, refined = build(family).requires_grad_(False)(x), bare(x), model(x)
    with rein.disabled(model):
        assert torch.equal(model(x), expected_frozen)
        with rein.disabled(model):
            assert torch.equal(model(x), expected_frozen)
        assert torch.equal(model(x), expected_frozen)
    assert torch.equal(model(x), refined)
    rein.unwrap(model)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == list(bare.state_dict())
    assert not hasattr(model, "rein")
    rein.wrap(model, SMALL)


def test_disabled_ends_after_an_error():
    model, x = wrapped("vit"), images()
    refined = model(x)
    with pytest.raises(RuntimeError, match="on purpose"), rein.disabled(model):
        raise RuntimeError("on purpose")
    assert torch.equal(model(x), refined)


@pytest.mark.parametrize("leave", ["unwrap", "disabled"])
def test_requires_grad_and_modes_are_restored(leave):
    model = build("vit with drop path").train()
    model.blocks[1].eval()
    model.blocks[0].mlp.requires_grad_(False)

    def state():
        modes = {name: module.training for name, module in model.named_modules() if not name.startswith("rein")}
        return modes, {name: p.requires_grad for name, p in model.named_parameters() if not name.startswith("rein")}

    if leave == "unwrap":
        found = state()
        rein.wrap(model, SMALL)
        assert state() != found
        rein.unwrap(model)
    else:
        rein.wrap(model, SMALL)
        found = state()
        with rein.disabled(model):
            model.eval().requires_grad_(True)
            assert state() != found
    assert state() == found


def test_wrap_draws_only_the_adapter_from_the_random_state():
    torch.manual_seed(3)
    adapter = rein.ReinAdapter(32, 4, SMALL, patch_size=8)
    after = torch.get_rng_state()
    model = build("vit")
    torch.manual_seed(3)
    rein.wrap(model, SMALL)
    assert torch.equal(torch.get_rng_state(), after)
    for injected, standalone in zip(model.rein.parameters(), adapter.parameters(), strict=True):
        assert torch.equal(injected, standalone)


@every_family
def test_a_deep_copy_uses_its_own_adapter(family):
    model, x = wrapped(family), images()
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.rein.scale.zero_()
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)
    assert not any(p.requires_grad for name, p in twin.named_parameters() if not name.startswith("rein."))
    rein.unwrap(twin)
    assert torch.equal(model(x), expected)


def test_timm_ema_changes_only_the_adapter():
    from timm.utils import ModelEmaV3

    model, x = wrapped("vit"), images()
    ema = ModelEmaV3(model, decay=0.5)
    before = ema.module(x)
    with torch.no_grad():
        model.rein.scale.add_(1)
    ema.update(model)
    assert ema.module.rein.scale.item() == pytest.approx(model.rein.scale.item() - 0.5)
    assert not torch.allclose(ema.module(x), before)


def test_a_copy_of_the_adapter_does_not_contain_the_backbone():
    model = wrapped("vit")
    assert len(pickle.dumps(copy.deepcopy(model.rein))) < 2 * sum(p.nbytes for p in model.rein.parameters()) + 20_000


def test_an_unpickled_model_keeps_its_hooks_when_a_new_process_adds_others(tmp_path):
    for _ in range(3):  # low hook ids, which a new process assigns again
        model, x = wrapped("vit"), images()
    torch.save(model, tmp_path / "model.pt")
    torch.save((x, model(x)), tmp_path / "expected.pt")
    program = f"""
        import sys
        import torch
        sys.path.insert(0, {str(sys.path[0])!r})
        model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        x, expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=False)
        seen = []
        for _ in range(50):
            for block in model.blocks:
                block.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        assert torch.equal(model(x), expected), "the hooks of rein were overwritten"
        assert len(seen) == 50 * len(model.blocks)
        with torch.no_grad():
            model.rein.scale.zero_()
        assert not torch.equal(model(x), expected), "the hooks use another adapter"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


@every_family
def test_gradient_checkpointing_gives_equal_gradients(family):
    model, x = wrapped(family), images()
    model.train()

    def gradients():
        model.zero_grad()
        model.forward_features(x).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.rein.named_parameters() if p.grad is not None}

    plain = gradients()
    model.set_grad_checkpointing(True)
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    assert len(plain) == 7
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_a_model_with_gradient_checkpointing_can_be_wrapped():
    model = build("vit")
    model.set_grad_checkpointing(True)
    rein.wrap(model, SMALL)(images()).sum().backward()
    assert model.rein.tokens_a.grad is not None


@pytest.mark.parametrize(
    "family",
    [
        "vit",
        "vit with registers",
        "eva02",
        "sam",
        "naflex",
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ("tnt", "xcit")),
    ],
)
def test_a_compiled_full_graph_agrees_with_eager_mode_and_respects_disabled(family):
    model, x = wrapped(family), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    with rein.disabled(model):
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
    with torch.no_grad():  # changed weights, same graph
        model.rein.scale.add_(0.25)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_compiling_with_autocast_and_gradients_has_no_graph_breaks():
    model, x = wrapped("vit"), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x).float().square().mean().backward()
        compiled_gradient = model.rein.tokens_b.grad.clone()
        model.zero_grad()
        model(x).float().square().mean().backward()
    assert torch.allclose(compiled_gradient, model.rein.tokens_b.grad, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_adapter_stays_float32_beside_a_half_precision_backbone(dtype, order):
    torch.manual_seed(0)
    expected = wrapped("vit")(images())
    model = build("vit")
    if order == "before":
        torch.manual_seed(0)
        build("vit")
        model = amplify_adapter(rein.wrap(model.to(dtype), SMALL))
    else:
        torch.manual_seed(0)
        build("vit")
        model = amplify_adapter(rein.wrap(model, SMALL))
        exact = [p.clone() for p in model.rein.parameters()]
        model.to(dtype)
        assert all(torch.equal(a, b) for a, b in zip(exact, model.rein.parameters(), strict=True))
    assert {p.dtype for p in model.rein.parameters()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if not name.startswith("rein.")} == {dtype}
    out = model(images().to(dtype))
    assert out.dtype == dtype
    assert {o.dtype for o in block_outputs(model, images().to(dtype))} == {dtype}
    assert torch.allclose(out.float(), expected, atol=0.15)
    out.float().sum().backward()
    assert model.rein.tokens_b.grad.dtype == torch.float32


def test_a_float64_backbone_gets_a_float64_adapter():
    model = rein.wrap(build("vit").double(), SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(images().double()).dtype == torch.float64


def test_a_model_on_the_meta_device_can_be_wrapped_and_counted():
    model = rein.wrap(build("vit", embed_dim=384, depth=12, num_heads=6).to("meta"))
    assert rein.summary(model).adapter_parameters == 684_033
    assert all(p.is_meta for p in model.parameters())


def test_wrapping_twice_is_refused():
    model, x = wrapped("vit"), images()
    expected = model(x)
    with pytest.raises(WrapError, match="already wrapped; rein.load"):
        rein.wrap(model)
    outer = nn.Sequential(model)
    with pytest.raises(WrapError, match="already wrapped through another module"):
        rein.wrap(outer, blocks=list(model.blocks), num_prefix_tokens=1)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("compiled", ["with torch.compile", "in place", "one block"])
def test_a_compiled_model_is_refused(compiled):
    model = build("vit")
    target = model
    if compiled == "with torch.compile":
        target = torch.compile(model)
    elif compiled == "in place":
        model.compile()
    else:
        model.blocks[1] = torch.compile(model.blocks[1])
    with pytest.raises(WrapError, match="before torch.compile"):
        rein.wrap(target)
    assert all(p.requires_grad for p in model.parameters())


def test_an_attribute_called_rein_is_not_overwritten():
    model = build("vit")
    model.rein = "mine"
    with pytest.raises(WrapError, match="has an attribute 'rein'"):
        rein.wrap(model)
    assert model.rein == "mine"


@pytest.mark.parametrize("call", [rein.unwrap, rein.summary, lambda model: rein.save(model, "never.safetensors")])
def test_a_bare_model_is_refused_where_a_wrapped_one_is_expected(call):
    with pytest.raises(WrapError, match=r"not wrapped; call rein.wrap\(model\) first"):
        call(build("vit"))


def test_an_unknown_class_is_refused_unless_its_blocks_are_passed():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layers = nn.Conv2d(3, 16, 8, 8), nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            x = self.embed(x).flatten(2).mT
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Encoder(), images()
    with pytest.raises(rein.UnsupportedBackboneError, match=r"rein does not know the blocks of Encoder.*blocks=\[...\]"):
        rein.wrap(model)
    with pytest.raises(rein.UnsupportedBackboneError, match="'layers.7', which is not in the model"):
        rein.wrap(model, blocks=["layers.7"])
    with pytest.raises(rein.UnsupportedBackboneError, match="expected at least one block, and each block once"):
        rein.wrap(model, blocks=["layers.0", "layers.0"])
    with pytest.raises(rein.UnsupportedBackboneError, match="blocks is 'layers.0'; expected a list"):
        rein.wrap(model, blocks="layers.0")
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    expected = model(x)
    amplify_adapter(rein.wrap(model, blocks=["layers.0", model.layers[2]], num_prefix_tokens=0))
    assert model.rein.num_layers == 2
    assert not torch.allclose(model(x), expected)


def test_a_backbone_that_cannot_be_measured_is_refused_and_unchanged():
    model = build("vit").train()
    model.blocks[1].forward = lambda x: x.nonexistent
    with pytest.raises(rein.UnsupportedBackboneError, match="could not be measured.*nonexistent"):
        rein.wrap(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_patch_dropout_can_be_turned_on_again():
    model = wrapped("vit with patch dropout").train()
    model.patch_drop.training = True
    assert model.forward_features(images()).shape[1] == 1 + 8


def test_a_copy_made_inside_disabled_is_enabled():
    model, x = wrapped("vit"), images()
    with rein.disabled(model):
        twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))
    assert torch.equal(again(x), model(x))


def test_unwrapping_inside_disabled_is_refused():
    model = wrapped("vit")
    with rein.disabled(model), pytest.raises(WrapError, match="inside rein.disabled; leave that context first"):
        rein.unwrap(model)
    rein.unwrap(model)
    assert all(p.requires_grad for p in model.parameters())


def test_requires_grad_is_restored_on_parameters_that_were_replaced():
    model = wrapped("vit")
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    model.set_input_size((64, 32))
    rein.unwrap(model)
    assert all(p.requires_grad for p in model.parameters())


WRAP_FILES = ["injection.py", "modes.py", "other_adapters.py", "stagewise.py", "adapter.py"]
MEASURE_FILES = [f"backbones/{name}.py" for name in ("blocks", "families", "images", "measure")]


def small_bare_model():
    torch.manual_seed(0)
    model = tiny_vit(depth=2, drop_path_rate=0.1).train()
    model.blocks[0].eval()
    model.blocks[1].mlp.requires_grad_(False)
    model.blocks[1].register_forward_hook(lambda module, args, output: None)
    model.no_weight_decay = lambda: {"norm.weight"}
    return model


def test_an_interrupt_at_any_line_of_wrap_leaves_the_model_unchanged():
    files = WRAP_FILES + MEASURE_FILES
    model = small_bare_model()
    lines = lines_of(lambda: rein.wrap(model, SMALL), files)
    rein.unwrap(model)
    before = snapshot(model)
    assert len(lines) > 150
    for line in lines:
        assert interrupt(lambda: rein.wrap(model, SMALL), files, line), line
        assert_unchanged(model, before)
    rein.wrap(model, SMALL)


@pytest.mark.parametrize("wrapped_before", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_an_interrupt_at_any_line_of_load_leaves_the_model_unchanged(wrapped_before, tmp_path):
    files = ["checkpoint.py", *WRAP_FILES]
    rein.save(rein.wrap(small_bare_model(), SMALL), tmp_path / "a.safetensors")
    trial, model = (rein.wrap(small_bare_model(), SMALL) if wrapped_before else small_bare_model() for _ in range(2))

    def load(model):
        rein.load(model, tmp_path / "a.safetensors")
        return model

    lines = lines_of(lambda: load(trial), files)
    before = snapshot(model)
    for line in lines:
        if interrupt(lambda: load(model), files, line) and not _is_return(line):
            assert_unchanged(model, before)


def _is_return(line):
    """Whether the line only returns the model, after everything is done."""
    file, number = line
    return linecache.getline(str(PACKAGE / file), number).strip() == "return model"


STEPS = [
    "rein.injection.Injection.__init__",
    "rein.injection.Injection.apply_to",
    "rein.injection.Injection.freeze_modes",
    "rein.injection.NoWeightDecay.__init__",
    "rein.injection.build_adapter",
    "rein.injection.backbones.find_blocks",
    "rein.injection.backbones.enclosing_backbones",
    "rein.injection.other_adapters.parameters",
    "torch.nn.Module.register_forward_hook",
    "torch.nn.Module.__setattr__",
    "torch.nn.Module.get_submodule",
    "torch.nn.Module.to",
    "torch.nn.Module.load_state_dict",
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("call", [0, 1, 3])
def test_a_failing_step_of_load_leaves_a_bare_model_unchanged(step, call, monkeypatch, tmp_path):
    rein.save(rein.wrap(small_bare_model(), SMALL), tmp_path / "a.safetensors")
    model = small_bare_model()
    before, calls = snapshot(model), []
    original = resolve(step)

    def failing(*args, **settings):
        calls.append(args)
        if len(calls) == call + 1:
            raise MemoryError("on purpose")
        return original(*args, **settings)

    monkeypatch.setattr(step, failing)
    try:
        rein.load(model, tmp_path / "a.safetensors")
    except (MemoryError, rein.ReinError):
        monkeypatch.undo()
        assert_unchanged(model, before)
    else:
        assert len(calls) <= call


def resolve(path):
    """The object with a dotted name, as monkeypatch finds it."""
    value = sys.modules[path.partition(".")[0]]
    for name in path.split(".")[1:]:
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((build("vit"), {"rank": 4}), r"config is \{'rank': 4\}; expected a rein.ReinConfig"),
        (("vit",), "expects a torch.nn.Module, got str"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(arguments, message):
    with pytest.raises(rein.errors.InputError, match=message):
        rein.wrap(*arguments)


def test_blocks_out_of_order_and_a_count_of_the_wrong_type_are_refused():
    with pytest.raises(rein.UnsupportedBackboneError, match="but the blocks run in the order"):
        rein.wrap(build("vit"), blocks=["blocks.2", "blocks.0"])
    with pytest.raises(rein.UnsupportedBackboneError, match="num_prefix_tokens is '1'; expected an int"):
        rein.wrap(build("vit"), num_prefix_tokens="1")


def test_wrapping_in_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(WrapError, match="could not be trained"):
        rein.wrap(build("vit"))


def test_the_error_for_a_segmenter_points_to_its_backbone():
    model = rein.Segmenter(wrapped("vit"), rein.heads.LinearHead(32, 2))
    with pytest.raises(WrapError, match="but its backbone is; pass its .backbone"):
        rein.summary(model)


class Segmentation(nn.Module):
    """A backbone inside a model with other parts, as in segmentation and detection libraries."""

    def __init__(self, backbone):
        super().__init__()
        self.stem, self.encoder = nn.BatchNorm2d(3), backbone
        self.decoder = nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 2))
        self.decoder[2].bias.requires_grad_(False)

    def forward(self, x):
        return self.decoder(self.encoder(self.stem(x)))


OTHER_PARTS = {"stem.weight", "stem.bias", "decoder.0.weight", "decoder.0.bias", "decoder.2.weight"}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("blocks", [None, ["encoder.blocks.0", "encoder.blocks.2"]])
def test_only_the_backbone_that_was_found_is_frozen(blocks):
    model = Segmentation(build("vit with drop path")).train()
    before = snapshot(model)
    rein.wrap(model, SMALL, blocks=blocks, num_prefix_tokens=1)
    assert trainable(model) == OTHER_PARTS | {f"rein.{name}" for name, _ in model.rein.named_parameters()}
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    assert not any(training for name, training in modes.items() if name.startswith("encoder"))
    assert all(training for name, training in modes.items() if name.startswith(("stem", "decoder")))
    model(images()).sum().backward()
    assert {name for name in OTHER_PARTS if model.get_parameter(name).grad is None} == set()
    assert {name for name, p in model.encoder.named_parameters() if p.grad is not None} == set()
    others = {key: value for key, value in snapshot(model).items() if key[0].startswith(("stem", "decoder"))}
    rein.unwrap(model)
    assert_unchanged(model, before | others)  # the other parts have trained


def test_a_summary_names_what_trains_and_what_is_frozen():
    summary = rein.summary(rein.wrap(Segmentation(build("vit")), SMALL))
    assert summary.trains == ("stem", "decoder.N", "decoder.N.weight", "rein")
    assert summary.frozen == ("encoder", "decoder.N.bias")
    assert str(summary).splitlines()[-2:] == [
        "trains    stem, decoder.N, decoder.N.weight, rein",
        "frozen    encoder, decoder.N.bias",
    ]
    model = rein.wrap(build("vit"), SMALL)
    assert rein.summary(model).trains == ("rein",)
    assert set(rein.summary(model).frozen) == {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}
    model.blocks[1].requires_grad_(True)
    assert set(rein.summary(model).trains) == {"rein", "blocks.N"}
    model.requires_grad_(False)
    assert "trains    nothing" in str(rein.summary(model))


def test_a_unet_keeps_its_decoder_trainable():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-test_resnet", encoder_weights=None, encoder_depth=4, decoder_channels=(32, 16, 16, 8))
    others = {name for name in trainable(model) if not name.startswith("encoder.")}
    rein.wrap(model, SMALL).train()
    assert {name for name in trainable(model) if not name.startswith("rein.")} == others
    model(images(2, 64, 96)).square().mean().backward()
    assert all(model.get_parameter(name).grad is not None for name in others)
    assert rein.summary(model).trains == ("decoder", "segmentation_head", "rein")
    assert rein.summary(model).frozen == ("encoder",)


@pytest.mark.filterwarnings("ignore")  # transformers warns
def test_the_head_of_a_hugging_face_model_stays_trainable():
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.Dinov2Config(**settings, image_size=56, patch_size=14, num_labels=4)
    model = transformers.Dinov2ForImageClassification(config)
    layers = [name for name, module in model.named_modules() if type(module).__name__ == "Dinov2Layer"]
    rein.wrap(model, SMALL, blocks=layers)
    assert {name.partition(".")[0] for name in trainable(model)} == {"classifier", "rein"}


def test_blocks_of_two_backbones_freeze_both_and_blocks_of_an_unknown_model_freeze_all_of_it():
    pair = nn.ModuleDict({"left": build("vit"), "right": build("vit"), "head": nn.Linear(32, 2)})
    paths = ["left.blocks.0", "right.blocks.3"]
    assert backbones.enclosing_backbones(pair, paths) == ["left", "right"]
    assert backbones.enclosing_backbones(pair, paths[:1]) == ["left"]
    assert backbones.enclosing_backbones(pair, [*paths, "head"]) == [""]
    assert backbones.enclosing_backbones(build("vit"), ["blocks.0"]) == [""]


def test_torch_jit_script_is_refused_with_the_remedy():
    model = rein.Segmenter(wrapped("vit"), rein.heads.LinearHead(32, 2))
    before = snapshot(model)
    for scripted in (model, model.backbone):
        with pytest.raises(WrapError, match=r"TorchScript cannot compile the hooks.*expected a bare model. Use torch.export"):
            script(scripted)
    assert_unchanged(model, before)
    script(rein.unwrap(wrapped("vit")))


def script(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch deprecate it
        return torch.jit.script(model)


@pytest.mark.filterwarnings("ignore")  # newer versions of torch deprecate it
@pytest.mark.parametrize("grad", [False, True])
def test_a_traced_model_gives_the_same_features(grad):
    model, x = wrapped("vit"), images()
    with torch.set_grad_enabled(grad):
        assert torch.allclose(torch.jit.trace(model, x)(images(seed=5)), model(images(seed=5)), atol=1e-6)
    assert model.rein_injection.hooks[0].pass_cache._entry is None


def test_an_adapter_that_was_replaced_is_refused():
    model = wrapped("vit")
    model.rein = rein.ReinAdapter(32, 4, SMALL)
    with pytest.raises(
        WrapError, match=r"model.rein was replaced by a ReinAdapter; expected the adapter of rein.wrap.*use rein.load"
    ):
        rein.summary(model)


def test_the_error_names_the_part_that_is_wrapped():
    with pytest.raises(WrapError, match="this ModuleDict is not wrapped, but its inner.0 is; pass its .inner.0"):
        rein.summary(nn.ModuleDict({"inner": nn.Sequential(wrapped("vit"))}))


def test_a_compiled_model_can_be_unwrapped():
    model = wrapped("vit")
    compiled = torch.compile(model)
    assert rein.unwrap(compiled) is compiled
    assert not hasattr(model, "rein")
    assert not any(module._forward_hooks for module in model.modules())


def add_hooks(block, name, log, always=False):
    """Hooks of every kind on a block, which write their kind and `name`, and the mean of what they see."""

    def note(kind, *tensors):
        log.append(
            (kind, name, *(round(tensor.float().mean().item(), 5) for tensor in tensors if isinstance(tensor, torch.Tensor)))
        )

    return [
        block.register_forward_pre_hook(lambda module, args: note("pre", *args)),
        block.register_forward_pre_hook(lambda module, args, kwargs: note("pre kwargs", *args), with_kwargs=True),
        block.register_forward_hook(lambda module, args, output: note("forward", *args, output)),
        block.register_forward_hook(lambda module, args, kwargs, output: note("forward kwargs", output), with_kwargs=True),
        block.register_forward_hook(lambda module, args, output: note("forward always", output), always_call=True),
        block.register_full_backward_pre_hook(lambda module, grads: note("backward pre", *grads)),
        block.register_full_backward_hook(lambda module, grads_in, grads_out: note("backward", *grads_out)),
        block.register_state_dict_pre_hook(lambda module, prefix, keep: note("state dict pre")),
        block.register_state_dict_post_hook(lambda module, state, prefix, metadata: note("state dict")),
        block.register_load_state_dict_pre_hook(lambda module, *args: note("load pre")),
        block.register_load_state_dict_post_hook(lambda module, keys: note("load")),
    ]


def use(model, x):
    x = x.clone().requires_grad_()  # so that backward hooks run in a frozen model
    model(x).square().mean().backward()
    model.load_state_dict(model.state_dict())


def test_hooks_of_every_kind_keep_their_order_and_see_what_they_saw():
    model, x, log = build("vit"), images(), []
    block = model.blocks[1]
    add_hooks(block, "before", log)
    assert log == []
    use(model, x)
    seen_bare, kinds = log.copy(), {entry[0] for entry in log}
    assert len(kinds) == 11
    rein.wrap(model, SMALL)
    amplify_adapter(model)
    assert log == seen_bare, "rein.wrap ran the hooks of the user"
    later = add_hooks(block, "after", log)
    log.clear()
    use(model, x)
    for kind in kinds:
        assert [name for entry, name, *_ in log if entry == kind] == ["before", "after"], kind
        assert len({tuple(values) for entry, _, *values in log if entry == kind}) == 1  # both see the same: the refined output
    assert [entry for entry in log if entry[:2] == ("forward", "before")] != [e for e in seen_bare if e[0] == "forward"]
    for handle in later:
        handle.remove()
    with rein.disabled(model):
        log.clear()
        model.requires_grad_(True)  # as bare, so that all the same kernels run
        use(model, x)
        assert log == seen_bare
    rein.unwrap(model)
    log.clear()
    use(model, x)
    assert log == seen_bare


def test_hooks_that_are_prepended_after_wrap_see_the_bare_output():
    model, bare, x, seen = wrapped("vit"), build("vit").requires_grad_(False), images(), []
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output), prepend=True)
    bare.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(x), bare(x)
    assert torch.equal(*seen)
