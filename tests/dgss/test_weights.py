"""A backbone by name with weights from a file: at its own sizes, and brought to others."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from rein import official
from rein.dgss import weights
from rein.dgss.weights import make_backbone
from rein.errors import InputError
from rein.testing import pocket_vit


def saved(model, path):
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def test_the_pocket_backbone_comes_with_its_weights_and_no_hub(monkeypatch):
    monkeypatch.setattr(weights, "_hub_asked_once", None)
    made, loaded = make_backbone(weights.POCKET, True, None)
    assert loaded
    assert torch.equal(made.blocks[3].attn.qkv.weight, pocket_vit().blocks[3].attn.qkv.weight)
    resized, _ = make_backbone(weights.POCKET, True, None, img_size=64)
    assert resized.patch_embed.img_size == (64, 64)
    torch.manual_seed(0)
    random, loaded = make_backbone(weights.POCKET, False, None)
    assert not loaded
    assert not torch.equal(random.blocks[3].attn.qkv.weight, made.blocks[3].attn.qkv.weight)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file_are_the_backbones(tmp_path, suffix):
    model, path = timm.create_model("test_vit", num_classes=0), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        saved(model, path)
    made, loaded = make_backbone("test_vit", False, None, weights=path)
    assert loaded
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_another_patch_size_is_reached_the_authors_way(tmp_path):
    model = timm.create_model("test_vit", num_classes=0)
    made, _ = make_backbone("test_vit", False, 8, img_size=64, weights=saved(model, tmp_path / "w.safetensors"))
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
def test_families_of_the_recipes_come_to_the_size_that_is_asked(tmp_path, name, patch, grid):
    model = timm.create_model(
        name, num_classes=0, **({"depth": 3, "global_attn_indexes": (1,)} if "sam" in name else {"depth": 2})
    )
    real = timm.create_model

    def shallow(asked, **settings):
        return real(asked, **settings, **({"depth": 3, "global_attn_indexes": (1,)} if "sam" in asked else {"depth": 2}))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timm, "create_model", shallow)
        made, _ = make_backbone(name, False, patch, img_size=64, weights=saved(model, tmp_path / "w.safetensors"))
    assert made.pos_embed.shape == grid
    with torch.no_grad():
        assert made(torch.randn(1, 3, 64, 64)).isfinite().all()
    key = "blocks.0.mlp.fc1.weight" if "eva" not in name else "blocks.0.norm1.weight"
    assert torch.equal(made.get_parameter(key), model.get_parameter(key))


def test_weights_that_do_not_fit_or_cannot_be_had_are_said(tmp_path):
    path = saved(timm.create_model("test_vit", num_classes=0), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="do not fit test_vit2 with {}: .* are missing or of another shape"):
        make_backbone("test_vit2", False, None, weights=path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as weights"):
        make_backbone("test_vit", False, None, weights=path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds no tensors by name"):
        make_backbone("test_vit", False, None, weights=tmp_path / "list.pth")
