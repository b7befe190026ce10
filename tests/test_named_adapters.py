"""Several adapters with names on one backbone: adding, switching, saving, listing and removing them."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import rein
from interrupts import interrupt, lines_of
from models import STAGED, build, images
from rein import checkpoint
from rein.errors import CheckpointError, InputError, WrapError
from rein.testing import tiny_vit
from snapshots import assert_unchanged, snapshot

SMALL = rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)


def make_distinct(model):
    """Give every adapter a scale of 0.5, so that it changes the features measurably."""
    with torch.no_grad():
        for name, parameter in model.rein.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.5)
    return model


def named(*names, config=SMALL, model=None):
    """A wrapped model with an adapter of each name; each has other values."""
    torch.manual_seed(3)
    model = build("vit") if model is None else model
    for name in names:
        rein.wrap(model, config, name=name)
    return make_distinct(model)


def single(model, name):
    """The same backbone with the adapter `name` alone, without a name."""
    other = rein.wrap(copy.deepcopy(model_without_adapters(model)), model.rein[name].config)
    other.rein.load_state_dict(model.rein[name].state_dict())
    return other


def model_without_adapters(model):
    return rein.unwrap(copy.deepcopy(model))


def assert_same_file(path, other):
    """Equal headers and tensors; safetensors writes the metadata in any order."""
    (tensors, header), (other_tensors, other_header) = checkpoint.read(path), checkpoint.read(other)
    assert header == other_header
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(value, other_tensors[key]) for key, value in tensors.items())


@pytest.fixture
def files(tmp_path):
    """Files of two adapters, and for each the features that it gives alone."""
    model, found = named("day", "night"), {}
    for name in model.rein:
        path = tmp_path / f"{name}.safetensors"
        rein.save(model, path, name=name)
        found[name] = path, single(model, name)(images())
    return found


def test_adapters_are_loaded_by_name_and_switched(files):
    model = build("vit")
    for name, (path, _) in files.items():
        assert rein.load(model, path, name=name) is model
    assert model.rein.names == ("day", "night")
    assert model.rein.active_name == "day"  # the first one; a later one is not active until `activate`
    assert torch.equal(model(images()), files["day"][1])
    model.rein.activate("night")
    assert torch.equal(model(images()), files["night"][1])
    with model.rein.active("day"):
        assert torch.equal(model(images()), files["day"][1])
        with model.rein.active("night"):
            assert torch.equal(model(images()), files["night"][1])
    assert model.rein.active_name == "night"


def test_an_adapter_without_a_name_becomes_the_default_and_keeps_its_parameters(files):
    model = make_distinct(rein.wrap(build("vit"), SMALL))
    before, adapter, parameters = model(images()), model.rein, list(model.parameters())
    rein.load(model, files["night"][0], name="night")
    assert model.rein.names == ("default", "night")
    assert model.rein["default"] is adapter
    assert {id(p) for p in parameters} < {id(p) for p in model.parameters()}
    assert torch.equal(model(images()), before)
    assert model.rein.config == SMALL
    assert torch.equal(model.rein.queries(), adapter.queries())
    model.rein.activate("night")
    assert torch.equal(model(images()), files["night"][1])


def test_a_single_adapter_without_a_name_is_as_before():
    model = rein.wrap(build("vit"), SMALL)
    assert type(model.rein) is rein.ReinAdapter
    assert "rein.tokens_a" in model.state_dict()
    assert rein.summary(model).adapters == {}
    assert "\nadapters" not in str(rein.summary(model))


def test_files_do_not_hold_the_name(files, tmp_path):
    model = build("vit")
    rein.load(model, files["night"][0])
    rein.save(model, tmp_path / "unnamed.safetensors")
    rein.save(model, tmp_path / "default.safetensors", name="default")
    for path in (tmp_path / "unnamed.safetensors", tmp_path / "default.safetensors"):
        assert_same_file(path, files["night"][0])


def test_save_and_load_without_a_name_use_the_active_adapter(files, tmp_path):
    model = named("one", "two")
    untouched = copy.deepcopy(model.rein["two"].state_dict())
    rein.load(model, files["night"][0])
    assert torch.equal(model(images()), files["night"][1])
    assert all(torch.equal(value, untouched[key]) for key, value in model.rein["two"].state_dict().items())
    rein.save(model, tmp_path / "active.safetensors")
    assert_same_file(tmp_path / "active.safetensors", files["night"][0])


def test_loading_an_existing_name_changes_its_values_in_place(files):
    model = named("day", "night")
    adapter = model.rein["night"]
    rein.load(model, files["day"][0], name="night")
    assert model.rein["night"] is adapter
    model.rein.activate("night")
    assert torch.equal(model(images()), files["day"][1])


def test_keys_of_the_state_dict_have_the_names():
    model = named("day", "night")
    keys = [key for key in model.state_dict() if key.startswith("rein.")]
    assert keys == [f"rein.{name}.{key}" for name in ("day", "night") for key in model.rein[name].state_dict()]
    other = named("day", "night", config=SMALL)
    other.rein.load_state_dict(model.rein.state_dict())
    assert torch.equal(other(images()), model(images()))


def test_adapters_may_have_other_configurations(tmp_path):
    model = named("small")
    rein.wrap(model, rein.ReinConfig(num_tokens=3, rank=None, query_dim=None, use_softmax=False), name="full")
    make_distinct(model)
    for name in model.rein:
        with model.rein.active(name):
            assert torch.equal(model(images()), single(model, name)(images()))
    model.rein.activate("full")
    assert model.rein.config.rank is None
    with pytest.raises(InputError, match="has no queries"):
        model.rein.queries()


def test_backbones_with_stages_have_named_adapters():
    model = named("day", "night", model=STAGED["SwinTransformer"]().eval())
    x = images(height=64, width=128)
    for name in model.rein:
        with model.rein.active(name):
            assert torch.equal(model(x), single(model, name)(x))


def test_unwrap_removes_all_adapters_and_restores_the_model():
    model = build("vit")
    before = snapshot(model)
    named("day", "night", model=model).rein.activate("night")
    assert_unchanged(rein.unwrap(model), before)


def test_disabled_gives_the_bare_outputs_whichever_adapter_is_active():
    bare, model = build("vit"), named("day", "night")
    with rein.disabled(model):
        model.rein.activate("night")
        assert torch.equal(model(images()), bare(images()))
    assert torch.equal(model(images()), single(model, "night")(images()))


def test_deleting_removes_the_parameters():
    model = named("day", "night")
    model.rein.delete("night")
    assert model.rein.names == ("day",)
    assert not [key for key in model.state_dict() if key.startswith("rein.night")]
    with pytest.raises(InputError, match="no adapter is named 'night'; this model has 'day'"):
        model.rein.activate("night")
    with pytest.raises(InputError, match="'day' is active and cannot be deleted"):
        model.rein.delete("day")
    with model.rein.active("day"):
        rein.wrap(model, SMALL, name="night")
        model.rein.activate("night")
        model.rein.delete("day")
    assert model.rein.active_name == "night"  # the one before was deleted


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_adapters_and_the_same_active_one(make_copy):
    model = named("day", "night")
    model.rein.activate("night")
    with rein.routed(model, ["day", "night"]):
        twin = make_copy(model)
    expected = model(images())
    assert torch.equal(twin(images()), expected)
    with torch.no_grad():
        for parameter in twin.rein["night"].parameters():
            parameter.zero_()
    assert not torch.allclose(twin(images()), expected)
    assert torch.equal(model(images()), expected)
    twin.rein.activate("day")
    assert model.rein.active_name == "night"


def test_a_model_unpickled_in_a_new_process_switches(tmp_path):
    model = named("day", "night", model=tiny_vit())
    expected = {}
    for name in model.rein:
        with model.rein.active(name):
            expected[name] = model(images())
    torch.save((model, images(), expected), tmp_path / "model.pt")
    program = """
import sys, torch, rein
model, images, expected = torch.load(sys.argv[1], weights_only=False)
for name, value in expected.items():
    model.rein.activate(name)
    assert torch.allclose(model(images), value, atol=1e-6), name
rein.unwrap(model)
assert not hasattr(model, "rein")
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], check=True)


@pytest.mark.parametrize("training", [False, True])
def test_switching_does_not_recompile(training):
    names = [f"adapter{number}" for number in range(10)]  # more than torch's limit of recompilations
    model, x = named(*names, model=tiny_vit()), images()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(training):
        for name in names:
            model.rein.activate(name)
            assert torch.allclose(compiled(x), single(model, name)(x), atol=1e-5)
    assert counter.frame_count == 1


def test_an_adapter_added_to_a_compiled_model_is_used():
    model, x = rein.wrap(tiny_vit(), SMALL), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x)
    make_distinct(rein.wrap(compiled, SMALL, name="night"))
    compiled.rein.activate("night")
    assert torch.allclose(compiled(x), single(model, "night")(x), atol=1e-5)


def test_only_the_active_adapter_gets_gradients_and_the_optimizer_leaves_the_others():
    model = named("day", "night")
    optimizer = torch.optim.AdamW(rein.param_groups(model, lr=0.1, weight_decay=0.5))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.rein.parameters()))
    before = copy.deepcopy(model.rein["night"].state_dict())
    segmenter = rein.Segmenter(model, rein.heads.LinearHead([32], num_classes=2), indices=[3])
    segmenter(images(), torch.zeros(2, 32, 32, dtype=torch.long)).backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in model.rein["day"].parameters())
    assert all(parameter.grad is None for parameter in model.rein["night"].parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.rein["night"].state_dict().items())


def test_param_groups_of_one_adapter_and_the_weight_decay_of_tokens():
    model = named("day", "night")
    decay, none = rein.param_groups(model.rein["night"])
    assert {id(p) for p in decay["params"] + none["params"]} == {id(p) for p in model.rein["night"].parameters()}
    names = {f"rein.{name}.{key}" for name in model.rein for key in ("tokens_a", "tokens_b", "scale")}
    assert names <= model.no_weight_decay()


def test_summary_lists_every_adapter():
    model = named("day", "night")
    model.rein.activate("night")
    model.rein["day"].requires_grad_(False)
    found = rein.summary(model)
    count = sum(parameter.numel() for parameter in model.rein["day"].parameters())
    assert (found.adapters, found.active) == ({"day": count, "night": count}, "night")
    assert found.adapter_parameters == 2 * count
    assert found.trainable_parameters == count
    assert f"adapters  day {count:,}, night (active) {count:,}" in str(found)
    assert "rein.day" in found.frozen
    assert "rein.night" in found.trains
    hash(found)


def test_a_segmenter_file_has_the_active_adapter(tmp_path):
    model = named("day", "night")
    model.rein.activate("night")
    segmenter = rein.Segmenter(model, rein.heads.LinearHead([32], num_classes=2), indices=[3])
    segmenter.save(tmp_path / "segmenter.safetensors")
    loaded = rein.Segmenter.load(tmp_path / "segmenter.safetensors", build("vit"))
    assert type(loaded.backbone.rein) is rein.ReinAdapter
    assert torch.equal(loaded(images()), segmenter(images()))


@pytest.mark.parametrize(
    "name", ["", "a.b", "_night", "training", "forward", "config", "activate", 3, None, ["night"], "new\nline", "a\udc80"]
)
def test_names_that_a_state_dict_cannot_have_are_refused(name, files):
    model = named("day")
    before = snapshot(model)
    calls = [lambda: model.rein.activate(name), lambda: model.rein.delete(name)]
    if name is not None:
        calls += [lambda: rein.wrap(model, SMALL, name=name), lambda: rein.load(model, files["night"][0], name=name)]
        calls += [lambda: rein.wrap(build("vit"), SMALL, name=name), lambda: rein.save(model, "file", name=name)]
    for call in calls:
        with pytest.raises(InputError, match="name"):
            call()
    assert_unchanged(model, before)


def test_names_with_spaces_and_signs_work(tmp_path):
    model = named("night rain", "bdd-100k", "Zürich")
    for name in model.rein:
        rein.save(model, tmp_path / "a.safetensors", name=name)
        model.rein.activate(name)
        assert torch.equal(rein.load(build("vit"), tmp_path / "a.safetensors")(images()), model(images()))


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(WrapError, match="already has an adapter named 'day'"):
        rein.wrap(named("day"), SMALL, name="day")
    with pytest.raises(WrapError, match="already has an adapter named 'default'"):
        rein.wrap(rein.wrap(build("vit"), SMALL), SMALL, name="default")
    with pytest.raises(WrapError, match="adds another"):
        rein.wrap(named("day"), SMALL)


def test_arguments_about_the_blocks_are_refused_for_a_second_adapter():
    with pytest.raises(InputError, match="all adapters of a model refine the same blocks"):
        rein.wrap(named("day"), SMALL, name="night", num_prefix_tokens=1)


def test_an_unknown_name_and_a_model_without_names_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match="no adapter is named 'dusk'; this model has 'day'"):
        rein.save(named("day"), tmp_path / "a.safetensors", name="dusk")
    with pytest.raises(InputError, match="one adapter without a name. Leave the name out"):
        rein.save(rein.wrap(build("vit"), SMALL), tmp_path / "a.safetensors", name="dusk")


def test_a_file_of_another_configuration_is_refused_for_an_existing_name(files):
    model = named("night", config=rein.ReinConfig(num_tokens=3, rank=2, query_dim=8))
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="load the file under another name"):
        rein.load(model, files["night"][0], name="night")
    assert_unchanged(model, before)


def test_a_file_of_another_backbone_adds_nothing(files):
    other = rein.wrap(build("vit without class token"), SMALL)
    before = snapshot(other)
    with pytest.raises(CheckpointError, match="does not fit"):
        rein.load(other, files["night"][0], name="night")
    assert_unchanged(other, before)


def test_adding_an_adapter_keeps_the_mode_the_device_and_the_precision(files):
    model = named("day").train()
    rein.load(model.half(), files["night"][0], name="night")
    assert model.rein["night"].training
    assert {parameter.dtype for parameter in model.rein.parameters()} == {torch.float32}
    model.eval()
    assert not any(module.training for module in model.rein.modules())


def test_loading_a_new_name_keeps_the_random_state(files):
    model = named("day")
    before = torch.get_rng_state()
    rein.load(model, files["night"][0], name="night")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("first", [None, "day"])
def test_an_interrupt_at_any_line_of_adding_an_adapter_leaves_the_model_unchanged_or_complete(first, files):
    path, expected = files["night"]

    model = rein.wrap(build("vit"), SMALL, name=first)
    before = snapshot(model)
    files = ["checkpoint.py", "injection.py", "named_adapters.py"]
    lines = lines_of(partial(rein.load, copy.deepcopy(model), path, name="night"), files)
    assert len(lines) > 40
    for line in lines:
        interrupt(partial(rein.load, model, path, name="night"), files, line)
        if isinstance(model.rein, rein.ReinAdapter) or "night" not in model.rein:
            assert_unchanged(model, before)
            continue
        with model.rein.active("night"):
            assert torch.equal(model(images()), expected)
        model = rein.wrap(build("vit"), SMALL, name=first)
        before = snapshot(model)


def test_hooks_of_the_model_stay_after_adding_an_adapter():
    model, seen = rein.wrap(build("vit"), SMALL), []
    hooks = model.rein_injection.hooks
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    rein.wrap(model, SMALL, name="night")
    model(images())
    assert model.rein_injection.hooks is hooks
    assert seen == [1]
    assert all(isinstance(child, nn.Module) for child in model.rein.children())


def test_a_segmenter_is_not_saved_with_an_adapter_that_lacks_its_queries(tmp_path):
    pytest.importorskip("transformers")
    model = tiny_vit()
    for name, width in (("q", 64), ("n", None), ("other", 32)):
        rein.wrap(model, rein.ReinConfig(num_tokens=4, rank=2, query_dim=width), name=name)
    small = {"channels": 64, "encoder_layers": 1, "decoder_layers": 2, "attention_heads": 2, "num_points": 50}
    segmenter = rein.Segmenter(model, rein.heads.Mask2FormerHead([32] * 4, 2, **small))
    segmenter.save(tmp_path / "s.safetensors")
    before = (tmp_path / "s.safetensors").read_bytes()
    for name, found in (("n", "query_dim=None"), ("other", "query_dim=32")):
        model.rein.activate(name)
        with pytest.raises(
            InputError, match=rf"uses queries of width 64 of an adapter, and the active one has {found}; expected"
        ):
            segmenter.save(tmp_path / "s.safetensors")
    assert (tmp_path / "s.safetensors").read_bytes() == before
