"""Adapters of peft beside the adapter of rein in one backbone, in both orders."""

import warnings

import pytest
import torch
from torch import nn

import rein
from models import amplify_adapter, build, images
from rein.errors import WrapError
from snapshots import assert_unchanged, snapshot

peft = pytest.importorskip("peft")
SMALL = rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)
ORDERS = ["peft first", "rein first"]


def inject(model, **settings):
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["qkv"], **settings), model)


def lora_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapt(order, seed=0):
    """A backbone with LoRA and with Rein, both of which train."""
    model = build("vit")
    torch.manual_seed(seed)
    if order == "peft first":
        rein.wrap(inject(model), SMALL)
    else:
        inject(rein.wrap(model, SMALL))
        model.rein.requires_grad_(True)
    return amplify_adapter(model)


@pytest.mark.parametrize("order", ORDERS)
def test_both_adapters_train_and_nothing_else(order):
    model = adapt(order).train()
    both = {f"rein.{name}" for name, _ in model.rein.named_parameters()} | lora_parameters(model).keys()
    assert trainable(model) == both
    assert {id(p) for group in rein.param_groups(model) for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    (model.forward_features(images()).square().mean() + model.rein.queries().square().mean()).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == both
    assert set(rein.summary(model).trains) == {"rein", "blocks.N.attn.qkv.lora_A", "blocks.N.attn.qkv.lora_B"}
    assert "blocks.N.attn.qkv.base_layer" in rein.summary(model).frozen


@pytest.mark.parametrize("loads", ORDERS)
@pytest.mark.parametrize("order", ORDERS)
def test_both_adapters_are_saved_and_loaded_in_either_order(order, loads, tmp_path):
    model, x = adapt(order).train(), images()
    optimizer = torch.optim.AdamW(rein.param_groups(model, lr=0.05))
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    rein.save(model, tmp_path / "rein.safetensors")
    torch.save(peft.get_peft_model_state_dict(model), tmp_path / "lora.pt")

    def load_lora(other):
        inject(other)
        peft.set_peft_model_state_dict(other, torch.load(tmp_path / "lora.pt"))

    other = build("vit")
    if loads == "peft first":
        load_lora(other)
        rein.load(other, tmp_path / "rein.safetensors")
    else:
        rein.load(other, tmp_path / "rein.safetensors")
        load_lora(other)
    for name, parameter in {**lora_parameters(model), **dict(model.rein.named_parameters(prefix="rein"))}.items():
        assert torch.equal(other.get_parameter(name), parameter), name
    assert torch.equal(other(x), model.eval()(x))
    assert not torch.allclose(other(x), build("vit")(x), atol=1e-3)


@pytest.mark.filterwarnings("ignore:parameters of the adapter:UserWarning")
@pytest.mark.parametrize("order", ORDERS)
def test_dropout_of_lora_is_active_in_training_and_the_backbone_is_deterministic(order):
    model, x = build("vit with drop path").train(), images()
    for step in ORDERS if order == "peft first" else reversed(ORDERS):
        if step == "peft first":
            inject(model, lora_dropout=0.5, init_lora_weights=False)
        else:
            rein.wrap(model, SMALL)
    model.train()
    assert {name.rpartition(".")[0] for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.training} == {
        f"blocks.{block}.attn.qkv.lora_dropout" for block in range(4)
    }
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_what_peft_trains_besides_its_matrices_stays_trainable():
    model = build("vit", num_classes=3)
    inject(model, bias="all", modules_to_save=["head"])
    before, modes = trainable(model), model.head.modules_to_save.training
    rein.wrap(model, SMALL)
    assert before < trainable(model)
    assert {name for name in trainable(model) - before if not name.startswith("rein.")} == set()
    model.train()
    assert model.head.modules_to_save.training is modes is True


def test_a_backbone_with_peft_in_one_block_is_frozen_elsewhere():
    model = build("vit")
    inject(model.blocks[1])
    before = trainable(model.blocks[1])
    rein.wrap(model, SMALL)
    assert trainable(model.blocks[1]) == before
    assert trainable(model) == {f"blocks.1.{name}" for name in before} | {
        f"rein.{name}" for name, _ in model.rein.named_parameters()
    }


@pytest.mark.parametrize("wraps", ["the backbone", "the whole model"])
def test_peft_injected_into_a_larger_model_stays_as_it_was(wraps):
    model = nn.ModuleDict({"encoder": build("vit"), "decoder": nn.Linear(32, 2)})
    inject(model)
    before = trainable(model)
    assert before == lora_parameters(model).keys()
    rein.wrap(model["encoder"] if wraps == "the backbone" else model, SMALL)
    assert {name for name in trainable(model) if "rein." not in name} == before


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_warning_says_that_peft_froze_the_adapter_and_what_to_do(bias):
    model = rein.wrap(build("vit"), SMALL).train()
    inject(model, bias=bias)
    assert "rein.tokens_a" not in trainable(model)
    for use in (lambda: model(images()), lambda: rein.param_groups(model), lambda: rein.param_groups(nn.ModuleList([model]))):
        with pytest.warns(UserWarning, match=r"peft freezes every other parameter.*call model.rein.requires_grad_\(True\)"):
            use()
    if bias == "none":
        assert "rein" in rein.summary(model).frozen
    model.rein.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())
        rein.param_groups(model)


@pytest.mark.parametrize("reason", ["frozen by the user", "no gradients", "eval mode", "peft frozen too"])
def test_an_adapter_that_is_frozen_on_purpose_gives_no_warning(reason):
    model = build("vit")
    if reason != "frozen by the user":
        inject(model)
    rein.wrap(model, SMALL).train(reason != "eval mode").rein.requires_grad_(False)
    if reason == "peft frozen too":
        model.requires_grad_(False)
    with torch.set_grad_enabled(reason != "no gradients"):
        model(images())


def test_peft_is_refused_if_it_replaced_the_adapter_by_a_copy(tmp_path):
    model = rein.wrap(build("vit"), SMALL)
    inject(model, modules_to_save=["rein"])
    for use in (rein.summary, rein.param_groups, rein.unwrap, lambda model: rein.save(model, tmp_path / "a.safetensors")):
        with pytest.raises(
            WrapError, match=r"model.rein was replaced by a ModulesToSaveWrapper; expected .*without modules_to_save=\['rein'\]"
        ):
            use(model)
    assert not list(tmp_path.iterdir())


def test_unwrapping_leaves_the_earlier_injection_of_peft_as_it_was():
    model, x = inject(build("vit with drop path").train(), init_lora_weights=False, lora_dropout=0.1), images()
    model.blocks[0].eval()
    before = snapshot(model)
    rein.wrap(model, SMALL)
    with torch.no_grad():
        model.train()(x)
    rein.unwrap(model)
    assert_unchanged(model, before)


def test_unwrapping_keeps_what_peft_froze_later():
    model, x = rein.wrap(build("vit"), SMALL), images()
    inject(model, init_lora_weights=False)
    with rein.disabled(model):
        expected = model(x)
    rein.unwrap(model)
    assert trainable(model) == lora_parameters(model).keys()
    assert torch.equal(model(x), expected)


def test_a_merged_injection_of_peft_leaves_the_adapter_in_place():
    model, x = rein.wrap(build("vit"), SMALL), images()
    whole = peft.get_peft_model(amplify_adapter(model), peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
    expected = whole.eval()(x)
    assert whole.merge_and_unload() is model
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert rein.summary(rein.wrap(rein.unwrap(model), SMALL)).trains == ("rein",)


def test_a_peft_model_around_a_wrapped_model_can_be_saved_disabled_and_unwrapped(tmp_path):
    bare, model, x = build("vit"), rein.wrap(build("vit"), SMALL), images()
    whole = peft.get_peft_model(amplify_adapter(model), peft.LoraConfig(r=2, target_modules=["qkv"])).eval()
    rein.save(whole, tmp_path / "a.safetensors")
    assert not torch.allclose(whole(x), bare(x))
    with rein.disabled(whole):
        assert torch.allclose(whole(x), bare(x), atol=1e-6)
    with torch.no_grad():
        model.rein.scale.zero_()
    rein.load(whole, tmp_path / "a.safetensors")
    assert model.rein.scale == 0.5
    assert rein.unwrap(whole) is whole
    assert not hasattr(model, "rein")
    assert torch.allclose(whole(x), bare(x), atol=1e-6)
