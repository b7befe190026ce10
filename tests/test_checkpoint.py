"""Adapter files: exact round trips, and errors that leave the model unchanged."""

import json
import os

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import rein
from models import amplify_adapter, build, images
from rein import checkpoint

SMALL = rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)


def wrapped(family="vit", config=SMALL, seed=0):
    return amplify_adapter(rein.wrap(build(family, seed), config))


@pytest.fixture
def saved(tmp_path):
    model = wrapped()
    rein.save(model, tmp_path / "adapter.safetensors")
    return model, tmp_path / "adapter.safetensors"


def rewrite(path, tensors=None, drop=(), **metadata):
    """Change the content of the file and update its digest, as another writer could."""
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


def test_the_file_has_the_tensors_of_the_adapter_only(saved):
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
def test_every_configuration_is_restored(tmp_path, config):
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


def test_loading_keeps_the_random_state(saved):
    _, path = saved
    other = build("vit")
    before = torch.get_rng_state()
    rein.load(other, path)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_restores_chosen_blocks(tmp_path):
    model = amplify_adapter(rein.wrap(build("vit"), SMALL, blocks=["blocks.1", "blocks.3"]))
    rein.save(model, tmp_path / "a.safetensors")
    other = rein.load(build("vit"), tmp_path / "a.safetensors")
    assert [block.path for block in other.rein_injection.blocks] == ["blocks.1", "blocks.3"]
    assert torch.equal(other(images()), model(images()))


def test_loading_restores_a_given_number_of_prefix_tokens(tmp_path):
    model = amplify_adapter(rein.wrap(build("vit"), SMALL, num_prefix_tokens=3))
    rein.save(model, tmp_path / "a.safetensors")
    other = rein.load(build("vit"), tmp_path / "a.safetensors")
    assert {block.num_prefix_tokens for block in other.rein_injection.blocks} == {3}
    assert torch.equal(other(images()), model(images()))


def test_saving_through_a_link_keeps_the_link(saved):
    model, path = saved
    link = path.with_name("link.safetensors")
    link.symlink_to(path)
    rein.save(model, link)
    assert link.is_symlink()
    rein.load(build("vit"), path)


def test_an_error_while_writing_keeps_the_previous_file(saved, monkeypatch):
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


def test_saving_into_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(rein.CheckpointError, match=r"cannot write .*: .*nowhere does not exist"):
        rein.save(wrapped(), tmp_path / "nowhere" / "a.safetensors")


def test_a_saved_file_has_default_permissions(saved):
    _, path = saved
    (path.parent / "default").touch()
    assert path.stat().st_mode == (path.parent / "default").stat().st_mode


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def edit_the_header(path):
    content = path.read_bytes()
    assert content.count(b'\\"use_softmax\\": true') == 1
    path.write_bytes(content.replace(b'\\"use_softmax\\": true', b'\\"use_softmax\\": null'))


def config_json(**changes):
    return json.dumps({**SMALL.to_dict(), **changes})


def remove_scale(path):
    rewrite(path, {k: v for k, v in load_file(path).items() if k != "scale"})


def add_a_tensor(path):
    rewrite(path, {**load_file(path), "bonus": torch.zeros(2)})


def change_a_shape(path):
    rewrite(path, {**load_file(path), "tokens_a": torch.zeros(4, 5, 2)})


DAMAGE = {
    "not safetensors": (lambda path: path.write_text("hello"), "not a complete safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "not a complete safetensors file"),
    "truncated": (truncate, "not a complete safetensors file"),
    "flipped bit": (flip_a_bit, "altered or damaged"),
    "edited header": (edit_the_header, "altered or damaged"),
    "a PyTorch file": (
        lambda path: torch.save({"a": torch.zeros(2)}, path),
        "is a PyTorch file. Convert a checkpoint of the authors",
    ),
    "an old PyTorch file": (
        lambda path: torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False),
        "is a PyTorch file. Convert a checkpoint of the authors with rein convert; pass weights of a backbone",
    ),
    "a Lightning checkpoint": (
        lambda path: torch.save({"pytorch-lightning_version": "2.6.0"}, path),
        "is a Lightning checkpoint. Pass it to rein fit, test or predict with --ckpt_path",
    ),
    "a checkpoint of rein fit": (
        lambda path: torch.save({"pytorch-lightning_version": "2.6.0", "rein": {}}, path),
        "is a Lightning checkpoint of rein fit. Pass it .* the adapter and the head are in the run's segmenter.safetensors",
    ),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "cannot read .*: it is not a regular file"),
    "a long header": (
        lambda path: rewrite(path, config='"' + "x" * 3_000_000 + '"'),
        "is not a complete safetensors file: its header has 3,.* bytes, expected at most 2,097,152",
    ),
    "missing": (lambda path: path.unlink(), "cannot read"),
    "another library's": (lambda path: save_file({"weight": torch.zeros(2)}, path), "that rein did not write"),
    "newer format": (
        lambda path: rewrite(path, rein_format="3"),
        "has format version 3, rein .* reads versions 1, 2; upgrade rein-adapter",
    ),
    "unknown kind": (lambda path: rewrite(path, kind='"garden"'), "header that rein .* cannot read: kind is 'garden', expected"),
    "unknown config key": (
        lambda path: rewrite(path, config=config_json(depth=3)),
        r"cannot read: unknown ReinConfig keys \['depth'\]",
    ),
    "control characters": (
        lambda path: rewrite(path, backbone='{"architecture": "a\\u001b[31m"}'),
        "cannot read: a text has control characters",
    ),
    "nested values": (lambda path: rewrite(path, backbone="[" * 50 + "]" * 50), "cannot read: a value is nested too deeply"),
    "deeply nested values": (
        lambda path: rewrite(path, backbone="[" * 90_000 + "]" * 90_000),
        "cannot read: a value is nested too deeply",
    ),
    "infinite": (
        lambda path: rewrite(path, config=config_json(scale_init=float("inf"))),
        "cannot read: Infinity is not a finite",
    ),
    "terabytes of tokens": (
        lambda path: rewrite(path, config=config_json(num_tokens=10**12)),
        r"declares ReinConfig\(num_tokens=1000000000000, .*, which is larger than its tensors. Restore the file from a copy",
    ),
    "terabytes of rank": (lambda path: rewrite(path, config=config_json(rank=2**62)), "which is larger than its tensors"),
    "terabytes of queries": (
        lambda path: rewrite(path, config=config_json(query_dim=10**30)),
        "which is larger than its tensors",
    ),
    "integers": (
        lambda path: rewrite(path, {**load_file(path), "scale": torch.tensor(1)}),
        "has scale of dtype torch.int64; expected one of torch.float32",
    ),
    "not finite": (
        lambda path: rewrite(path, {**load_file(path), "scale": torch.tensor(float("nan"))}),
        "has values that are not finite in scale: training has diverged",
    ),
    "bad config value": (lambda path: rewrite(path, config=config_json(rank=0)), "cannot read: ReinConfig.rank is 0"),
    "header without backbone": (lambda path: rewrite(path, drop=("backbone",)), "cannot read: backbone has no architecture name"),
    "header without config": (lambda path: rewrite(path, drop=("config",)), "cannot read: config is missing"),
    "header without widths": (
        lambda path: rewrite(path, backbone='{"architecture": "VisionTransformer", "widths": 1}'),
        "cannot read: backbone must have lists blocks, widths and num_prefix_tokens of equal length",
    ),
    "segmenter without head": (
        lambda path: rewrite(path, kind='"segmenter"', head="[]"),
        r"cannot read: head is \[\], expected a dictionary with name, arguments and indices",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot read .*: it is a folder"),
    "missing tensor": (remove_scale, "does not match: missing: scale"),
    "extra tensor": (add_a_tensor, "does not match: unexpected: bonus"),
    "wrong shape": (change_a_shape, r"does not match: wrong shape: tokens_a is \(4, 5, 2\), expected \(4, 6, 2\)"),
}


@pytest.mark.parametrize("start", ["bare", "wrapped"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_invalid_file_is_an_error_and_the_model_stays_unchanged(saved, damage, start):
    _, path = saved
    damage_file, message = DAMAGE[damage]
    damage_file(path)
    model = build("vit") if start == "bare" else amplify_adapter(rein.wrap(build("vit", seed=3), SMALL))
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
    "another width": (lambda: build("vit", embed_dim=64), r"the file has widths \[32, 32, 32, 32\], the model has \[64,"),
    "fewer blocks": (lambda: build("vit", depth=3), "'blocks.3', which is not in the model"),
    "other prefix tokens": (lambda: build("vit without class token"), r"the file has num_prefix_tokens \[1, 1, 1, 1\]"),
    "another family": (lambda: build("eva02"), "was trained on VisionTransformer, the model is Eva"),
    "another configuration": (lambda: rein.wrap(build("vit"), rein.ReinConfig(rank=3)), r"call rein.unwrap\(model\) first"),
    "other blocks of the same width": (
        lambda: rein.wrap(build("vit", depth=5), SMALL, blocks=[f"blocks.{i}" for i in (0, 1, 2, 4)]),
        r"the file has blocks \['blocks.0', .*'blocks.3'\], the model has",
    ),
    "fewer wrapped blocks": (lambda: rein.wrap(build("vit"), SMALL, blocks=["blocks.0"]), r"the model has \[32\]"),
}


@pytest.mark.parametrize("case", BACKBONES)
def test_a_file_for_another_backbone_is_an_error(saved, case):
    _, path = saved
    make, message = BACKBONES[case]
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(rein.CheckpointError, match=message):
        rein.load(model, path)
    assert list(model.state_dict()) == keys


def test_strict_false_accepts_another_architecture_name(saved):
    model, path = saved
    other = build("vit")
    other.pretrained_cfg = {"architecture": "the_same_under_another_name"}
    with pytest.raises(rein.CheckpointError, match="or strict=False"):
        rein.load(other, path)
    assert torch.equal(rein.load(other, path, strict=False)(images()), model(images()))
