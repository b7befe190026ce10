"""A backbone by name: weights from the hub, from the package, or from a file, at its own sizes and at others."""

import socket

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from rein import official, remote
from rein.backbones import creation as backbone
from rein.backbones.creation import make_backbone
from rein.errors import CheckpointError, InputError
from rein.testing import pocket_vit


def saved(model, path):
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def test_the_pocket_backbone_has_its_weights_without_a_hub(monkeypatch):
    monkeypatch.setattr(backbone, "_download", None)
    made = make_backbone("pocket_vit", True)
    assert torch.equal(made.blocks[3].attn.qkv.weight, pocket_vit().blocks[3].attn.qkv.weight)
    assert make_backbone("pocket_vit", True, img_size=64).patch_embed.img_size == (64, 64)
    torch.manual_seed(0)
    random = make_backbone("pocket_vit", False)
    assert not torch.equal(random.blocks[3].attn.qkv.weight, made.blocks[3].attn.qkv.weight)


def test_weights_that_cannot_be_downloaded_are_an_error_that_names_the_remedies(monkeypatch):
    def offline(name, pretrained=False, **settings):
        assert pretrained
        assert constants.HF_HUB_OFFLINE  # so that its client does not retry for a minute
        raise ConnectionError("no route to the hub\nand a long trace")

    def unreachable(*args, **settings):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(remote, "getproxies", dict)
    monkeypatch.setattr(timm, "create_model", offline)
    said = r"weights of test_vit cannot be downloaded \(ConnectionError: no route to the hub\)\."
    with pytest.raises(InputError, match=said + ".*--model.weights.*--model.pretrained false"):
        make_backbone("test_vit", True)
    assert not constants.HF_HUB_OFFLINE


def test_pretrained_weights_are_downloaded_once(monkeypatch):
    asked = []
    real = timm.create_model

    def online(name, pretrained=False, **settings):
        asked.append((name, pretrained, settings.get("num_classes")))
        return real(name, pretrained=False, **settings)

    monkeypatch.setattr(socket, "create_connection", lambda *args, **settings: socket.socket())
    monkeypatch.setattr(timm, "create_model", online)
    make_backbone("test_vit", True)
    assert asked == [("test_vit", True, 0)]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file_are_the_backbones(tmp_path, suffix):
    model, path = timm.create_model("test_vit", num_classes=0), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        saved(model, path)
    made = make_backbone("test_vit", False, None, weights=path)
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_another_patch_size_is_resampled_the_authors_way(tmp_path):
    model = timm.create_model("test_vit", num_classes=0)
    made = make_backbone("test_vit", False, 8, img_size=64, weights=saved(model, tmp_path / "w.safetensors"))
    wanted = official.resample(model.state_dict(), 8, 8)
    assert torch.equal(made.pos_embed, wanted["pos_embed"])
    assert torch.equal(made.patch_embed.proj.weight, wanted["patch_embed.proj.weight"])


@pytest.mark.parametrize(
    ("name", "patch", "grid"),
    [
        ("eva02_tiny_patch14_224", 16, (1, 17, 192)),
        ("vit_small_patch14_reg4_dinov2", 16, (1, 16, 384)),
        ("samvit_base_patch16", None, (1, 4, 4, 768)),
    ],
)
def test_families_of_the_recipes_are_converted_to_another_size(tmp_path, name, patch, grid):
    model = timm.create_model(
        name, num_classes=0, **({"depth": 3, "global_attn_indexes": (1,)} if "sam" in name else {"depth": 2})
    )
    real = timm.create_model

    def shallow(asked, **settings):
        return real(asked, **settings, **({"depth": 3, "global_attn_indexes": (1,)} if "sam" in asked else {"depth": 2}))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timm, "create_model", shallow)
        made = make_backbone(name, False, patch, img_size=64, weights=saved(model, tmp_path / "w.safetensors"))
    assert made.pos_embed.shape == grid
    with torch.no_grad():
        assert made(torch.randn(1, 3, 64, 64)).isfinite().all()
    key = "blocks.0.mlp.fc1.weight" if "eva" not in name else "blocks.0.norm1.weight"
    assert torch.equal(made.get_parameter(key), model.get_parameter(key))


def test_weights_that_do_not_fit_or_cannot_be_read_are_refused(tmp_path):
    path = saved(timm.create_model("test_vit", num_classes=0), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="do not fit test_vit2 with {}: .* are missing or have another shape or type"):
        make_backbone("test_vit2", False, None, weights=path)
    path.write_bytes(b"nothing")
    with pytest.raises(
        CheckpointError, match="is not a complete safetensors file: .* If it is a PyTorch file, let its name end in"
    ):
        make_backbone("test_vit", False, None, weights=path)
    with pytest.raises(CheckpointError, match=r"cannot read .*none.safetensors: no such file. Pass an existing file"):
        make_backbone("test_vit", False, None, weights=tmp_path / "none.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds no tensors by name"):
        make_backbone("test_vit", False, None, weights=tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "pos_embed",
            torch.zeros(1, 2, 1_000_000),
            r"pos_embed of shape \(1, 2, 1000000\); expected .* no other tensor wider than",
        ),
        (
            "patch_embed.proj.weight",
            torch.zeros(1, 1, 2000, 2000),
            r"of shape \(1, 1, 2000, 2000\); expected kernels of at most 64",
        ),
        ("patch_embed.proj.weight", torch.zeros(3), r"the weights do not fit test_vit with .*: they cannot be converted"),
        (
            "norm.weight",
            torch.zeros(64, dtype=torch.int64),
            r"do not fit test_vit with {}: norm.weight are missing or have another",
        ),
        ("norm.weight", torch.zeros(64, dtype=torch.complex64), r"norm.weight are missing or have another shape or type"),
    ],
)
def test_weights_of_another_shape_or_type_are_refused_before_they_are_resampled(tmp_path, name, tensor, message):
    state = {**timm.create_model("test_vit", num_classes=0).state_dict(), name: tensor}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=message):
        make_backbone("test_vit", False, None, weights=tmp_path / "w.pth")
