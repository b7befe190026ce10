"""The file: exact round trips, and every refusal, each of which must leave the model as it was."""

import json
import os

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import rein
from models import build, images, strong
from rein import checkpoint

SMALL = rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)


def wrapped(family="vit", config=SMALL, seed=0):
    return strong(rein.wrap(build(family, seed), config))


@pytest.fixture
def saved(tmp_path):
    model = wrapped()
    rein.save(model, tmp_path / "adapter.safetensors")
    return model, tmp_path / "adapter.safetensors"


def rewritten(path, tensors=None, drop=(), **metadata):
    """The file with other contents and a digest that fits them: what a careless or newer writer might have left."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    tensors = load_file(path) if tensors is None else tensors
    new = {k: v for k, v in {**old, **metadata}.items() if k not in ("sha256", *drop)}
    save_file(tensors, path, new | {"sha256": checkpoint._digest(tensors, new)})


@pytest.mark.parametrize("start", ["bare", "wrapped"])
def test_loading_gives_the_saved_outputs_bit_for_bit(saved, start):
    model, path = saved
    other, x = build("vit"), images()
    if start == "wrapped":
        rein.wrap(other, SMALL)
    assert rein.load(other, path) is other
    assert torch.equal(other(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(model.rein.parameters(), other.rein.parameters(), strict=True))


def test_the_file_holds_the_adapter_alone_under_its_own_names(saved):
    model, path = saved
    tensors = load_file(path)
    assert tensors.keys() == model.rein.state_dict().keys()
    assert path.stat().st_size < 4 * sum(p.numel() for p in model.rein.parameters()) + 5_000


def test_a_vit_large_adapter_takes_twelve_megabytes(tmp_path):
    large = nn.Sequential(nn.Conv2d(3, 1024, 16, 16), nn.Flatten(2), Transpose(), *(nn.Identity() for _ in range(24)))
    rein.wrap(large, blocks=list(large[3:]), num_prefix_tokens=0)
    rein.save(large, tmp_path / "a.safetensors")
    assert 11.9e6 < (tmp_path / "a.safetensors").stat().st_size < 12.1e6


class Transpose(nn.Module):
    def forward(self, x):
        return x.mT


@pytest.mark.parametrize(
    "config",
    [
        rein.ReinConfig(num_tokens=3, rank=None, query_dim=None, use_softmax=False),
        rein.ReinConfig(num_tokens=3, rank=2, query_dim=4, zero_init=True, scale_init=0.5),
        rein.ReinConfig(num_tokens=3, rank=2, query_dim=4, share=False),
    ],
)
def test_every_configuration_comes_back(tmp_path, config):
    model = rein.wrap(build("vit"), config)
    rein.save(model, tmp_path / "a.safetensors")
    other = rein.load(build("vit"), tmp_path / "a.safetensors")
    assert other.rein.config == config
    assert torch.equal(other(images()), model(images()))


def test_loading_into_a_wrapped_model_keeps_parameters_hooks_and_compiled_code(saved):
    model, path = saved
    other = rein.wrap(build("vit"), SMALL)
    parameters, hooks = list(other.rein.parameters()), other.rein_injection.hooks
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    compiled(images())
    with torch.compiler.set_stance("fail_on_recompile"):
        rein.load(other, path)
        assert torch.allclose(compiled(images()), model(images()), atol=1e-6)
    assert all(a is b for a, b in zip(parameters, other.rein.parameters(), strict=True))
    assert other.rein_injection.hooks is hooks


def test_loading_leaves_the_random_state_alone(saved):
    _, path = saved
    other = build("vit")
    before = torch.get_rng_state()
    rein.load(other, path)
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_that_were_chosen_are_chosen_again(tmp_path):
    model = strong(rein.wrap(build("vit"), SMALL, blocks=["blocks.1", "blocks.3"]))
    rein.save(model, tmp_path / "a.safetensors")
    other = rein.load(build("vit"), tmp_path / "a.safetensors")
    assert [site.path for site in other.rein_injection.sites] == ["blocks.1", "blocks.3"]
    assert torch.equal(other(images()), model(images()))


def test_prefix_rows_that_were_given_are_given_again(tmp_path):
    model = strong(rein.wrap(build("vit"), SMALL, num_prefix_tokens=3))
    rein.save(model, tmp_path / "a.safetensors")
    other = rein.load(build("vit"), tmp_path / "a.safetensors")
    assert {site.num_prefix_tokens for site in other.rein_injection.sites} == {3}
    assert torch.equal(other(images()), model(images()))


def test_saving_through_a_link_keeps_the_link(saved):
    model, path = saved
    link = path.with_name("link.safetensors")
    link.symlink_to(path)
    rein.save(model, link)
    assert link.is_symlink()
    rein.load(build("vit"), path)


def test_a_crash_while_writing_leaves_the_older_file_whole(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()
    with torch.no_grad():
        model.rein.scale.add_(1)

    def crash(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(rein.CheckpointError, match=r"cannot write .*adapter.safetensors: No space left on device"):
        rein.save(model, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(rein.CheckpointError, match=r"cannot write .*: No such file or directory"):
        rein.save(wrapped(), tmp_path / "nowhere" / "a.safetensors")


def test_a_saved_file_has_the_ordinary_permissions(saved):
    _, path = saved
    (path.parent / "ordinary").touch()
    assert path.stat().st_mode == (path.parent / "ordinary").stat().st_mode


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def retouch_the_header(path):
    content = path.read_bytes()
    assert content.count(b'\\"use_softmax\\": true') == 1
    path.write_bytes(content.replace(b'\\"use_softmax\\": true', b'\\"use_softmax\\": null'))


def config_json(**changes):
    return json.dumps({**SMALL.to_dict(), **changes})


def without_scale(path):
    rewritten(path, {k: v for k, v in load_file(path).items() if k != "scale"})


def with_more(path):
    rewritten(path, {**load_file(path), "bonus": torch.zeros(2)})


def with_other_shape(path):
    rewritten(path, {**load_file(path), "tokens_a": torch.zeros(4, 5, 2)})


DAMAGE = {
    "not safetensors": (lambda path: path.write_text("hello"), "not a complete safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "not a complete safetensors file"),
    "truncated": (truncate, "not a complete safetensors file"),
    "flipped bit": (flip_a_bit, "altered or damaged"),
    "retouched header": (retouch_the_header, "altered or damaged"),
    "missing": (lambda path: path.unlink(), "cannot read"),
    "another library's": (lambda path: save_file({"weight": torch.zeros(2)}, path), "not one that rein wrote"),
    "newer format": (lambda path: rewritten(path, rein_format="2"), "has format version 2, this rein reads version 1; upgrade"),
    "unknown kind": (lambda path: rewritten(path, kind='"garden"'), "header that this rein .* cannot read: its kind is 'garden'"),
    "unknown config key": (
        lambda path: rewritten(path, config=config_json(depth=3)),
        r"cannot read: unknown ReinConfig keys \['depth'\]",
    ),
    "bad config value": (lambda path: rewritten(path, config=config_json(rank=0)), "cannot read: ReinConfig.rank is 0"),
    "header without backbone": (lambda path: rewritten(path, drop=("backbone",)), "cannot read: it does not say which backbone"),
    "header without config": (lambda path: rewritten(path, drop=("config",)), "cannot read: it has no adapter configuration"),
    "header without widths": (
        lambda path: rewritten(path, backbone='{"architecture": "VisionTransformer", "widths": 1}'),
        "cannot read: its facts about the backbone's blocks are not one per block",
    ),
    "segmenter without head": (lambda path: rewritten(path, kind='"segmenter"', head="[]"), "does not say how to build its head"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot read .*: it is a folder"),
    "missing tensor": (without_scale, "does not match: missing: scale"),
    "extra tensor": (with_more, "does not match: unexpected: bonus"),
    "wrong shape": (with_other_shape, r"does not match: wrong shape: tokens_a is \(4, 5, 2\), wanted \(4, 6, 2\)"),
}


@pytest.mark.parametrize("start", ["bare", "wrapped"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_file_is_refused_before_anything_is_changed(saved, damage, start):
    _, path = saved
    spoil, message = DAMAGE[damage]
    spoil(path)
    model = build("vit") if start == "bare" else strong(rein.wrap(build("vit", seed=3), SMALL))
    before, x = {k: v.clone() for k, v in model.state_dict().items()}, images()
    expected, trains = model(x), [p.requires_grad for p in model.parameters()]
    with pytest.raises(rein.CheckpointError, match=message):
        rein.load(model, path)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model(x), expected)
    assert [p.requires_grad for p in model.parameters()] == trains


BACKBONES = {
    "another architecture": (
        lambda: timm.create_model("test_vit", num_classes=0),
        "was trained on VisionTransformer, the model is test_vit",
    ),
    "another width": (lambda: build("vit", embed_dim=64), r"its widths per block are \[32, 32, 32, 32\], the model's are \[64,"),
    "fewer blocks": (lambda: build("vit", depth=3), "'blocks.3', which is not in the model"),
    "other prefix rows": (lambda: build("vit without class token"), r"its num_prefix_tokens per block are \[1, 1, 1, 1\]"),
    "another family": (lambda: build("eva02"), "was trained on VisionTransformer, the model is Eva"),
    "another configuration": (lambda: rein.wrap(build("vit"), rein.ReinConfig(rank=3)), r"call rein.unwrap\(model\) first"),
    "other blocks of the same width": (
        lambda: rein.wrap(build("vit", depth=5), SMALL, blocks=[f"blocks.{i}" for i in (0, 1, 2, 4)]),
        r"its blocks per block are \['blocks.0', .*'blocks.3'\], the model's",
    ),
    "wrapped elsewhere": (lambda: rein.wrap(build("vit"), SMALL, blocks=["blocks.0"]), r"the model's are \[32\]"),
}


@pytest.mark.parametrize("case", BACKBONES)
def test_a_file_for_another_backbone_is_refused(saved, case):
    _, path = saved
    make, message = BACKBONES[case]
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(rein.CheckpointError, match=message):
        rein.load(model, path)
    assert list(model.state_dict()) == keys


def test_the_architecture_alone_can_be_overruled(saved):
    model, path = saved
    other = build("vit")
    other.pretrained_cfg = {"architecture": "the_same_under_another_name"}
    with pytest.raises(rein.CheckpointError, match="or strict=False"):
        rein.load(other, path)
    assert torch.equal(rein.load(other, path, strict=False)(images()), model(images()))
