"""Official checkpoints: renamed with nothing left over, the same function, and back exactly."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.eva import Eva

import rein
from models import build, images
from official_witness import made_up_head, mask2former
from rein import official
from rein.cli import main
from rein.errors import CheckpointError

HEAD = {"channels": 64, "num_classes": 5, "encoder_layers": 2, "decoder_layers": 4, "hidden": 48, "heads": 4}
CONFIG = rein.ReinConfig(num_tokens=7, rank=3, query_dim=64)
CONFORMANCE = Path(__file__).parent / "conformance"


def adapter_state(adapter, prefix="backbone.reins."):
    """An adapter under the authors' names."""
    names = {ours: theirs for theirs, ours in official._ADAPTER_NAMES.items()}
    state = {}
    for key, value in adapter.state_dict().items():
        stage, _, name = key.removeprefix("stages.").partition(".") if key.startswith("stages.") else ("", "", key)
        state[prefix + (f"{stage}." if stage else "") + names[name]] = value.clone()
    return state


def checkpoint(model, path, in_channels=(32,) * 4, with_head=True, **extra):
    state = adapter_state(model.rein)
    if with_head:
        head = made_up_head(list(in_channels), **HEAD)
        state |= {f"decode_head.{key}": value for key, value in head.items()}
    state |= extra
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, path)
    return state


def a_model(seed=0, family="vit"):
    model = rein.wrap(build(family), CONFIG)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.rein.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def test_a_converted_head_agrees_with_a_witness_under_the_official_names():
    state = made_up_head([12, 16, 20, 24], **HEAD)
    found = official.convert({f"decode_head.{key}": value for key, value in state.items()})
    head = rein.heads.Mask2FormerHead(**found.head)
    head.load_state_dict(found.head_tensors)
    generator = torch.Generator().manual_seed(5)
    maps = [
        torch.randn(2, c, *size, generator=generator)
        for c, size in zip((12, 16, 20, 24), ((24, 32), (12, 16), (6, 8), (3, 4)), strict=True)
    ]
    queries = torch.randn(9, 64, generator=generator)
    with torch.no_grad():
        classes, masks = head.eval()._last(maps, queries)
        for image in range(2):
            expected_classes, expected_masks = mask2former(state, [m[image] for m in maps], queries, HEAD["heads"])
            # float32 through six attention layers: 1e-5 of the largest value
            assert (classes[image] - expected_classes).abs().max() < 1e-5 * expected_classes.abs().max()
            assert (masks[image] - expected_masks).abs().max() < 1e-5 * expected_masks.abs().max()


def test_a_complete_checkpoint_gives_the_same_predictions_through_every_way(tmp_path):
    source = a_model()
    state = checkpoint(source, tmp_path / "official.pth")
    model = official.load(tmp_path / "official.pth", build("vit")).eval()
    x = images(2)
    with torch.no_grad():
        maps = rein.backbones.feature_maps(source.eval(), x, model.indices)
        pyramid = rein.heads.FeaturePyramid()(maps)
        head = {key.removeprefix("decode_head."): value for key, value in state.items() if key.startswith("decode_head.")}
        classes, masks = mask2former(head, [m[0] for m in pyramid], source.rein.queries(), HEAD["heads"])
        resized = torch.nn.functional.interpolate(masks[None], (32, 32), mode="bilinear", align_corners=False)[0].sigmoid()
        expected = torch.einsum("mk,mhw->khw", classes.softmax(-1)[:, :-1], resized)
        assert torch.allclose(model(x)[0], expected, atol=1e-4)
    written = official.convert_file(tmp_path / "official.pth", tmp_path / "ours.safetensors", build("vit").to("meta"))
    assert written == [tmp_path / "ours.safetensors"]
    again = rein.Segmenter.load(tmp_path / "ours.safetensors", build("vit")).eval()
    assert torch.equal(again(x), model(x))


def test_the_way_back_is_exact(tmp_path):
    state = checkpoint(a_model(), tmp_path / "official.pth")
    official.convert_file(tmp_path / "official.pth", tmp_path / "ours.safetensors", build("vit"))
    official.to_official(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "config",
    [CONFIG, rein.ReinConfig(num_tokens=7, rank=None, query_dim=None), rein.ReinConfig(num_tokens=7, rank=2, zero_init=True)],
)
def test_an_adapter_alone_becomes_an_adapter_file(tmp_path, config):
    model = rein.wrap(build("vit"), config)
    torch.save(adapter_state(model.rein), tmp_path / "adapter.pth")  # a state dict alone
    assert official.load(tmp_path / "adapter.pth", other := build("vit"), zero_init=config.zero_init) is other
    assert other.rein.config == rein.ReinConfig(**{**config.to_dict(), "scale_init": 1e-3})
    assert torch.equal(other(images()), model(images()))
    official.convert_file(tmp_path / "adapter.pth", tmp_path / "a.safetensors", build("vit"), zero_init=config.zero_init)
    third = rein.load(build("vit"), tmp_path / "a.safetensors")
    assert torch.equal(third(images()), model(images()))


def test_adapters_of_several_stages(tmp_path):
    def make():
        torch.manual_seed(0)
        return timm.create_model("test_convnext", num_classes=0).eval()

    model = rein.wrap(make(), rein.ReinConfig(num_tokens=5, rank=2, query_dim=8))
    state = adapter_state(model.rein)
    assert "backbone.reins.3.learnable_tokens_a" in state
    torch.save({"state_dict": state}, tmp_path / "stages.pth")
    other = official.load(tmp_path / "stages.pth", make())
    assert torch.equal(other(images(1, 64, 64)), model(images(1, 64, 64)))
    official.convert_file(tmp_path / "stages.pth", tmp_path / "a.safetensors", make())
    official.to_official(tmp_path / "a.safetensors", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(back[key], value) for key, value in state.items())
    assert len(back) == len(state)


def test_weights_of_a_dinov2_backbone_come_along(tmp_path):
    donor = build("vit", seed=3, init_values=0.1)
    extra = {f"backbone.{key}": value for key, value in donor.state_dict().items()} | {"backbone.mask_token": torch.zeros(1, 32)}
    checkpoint(rein.wrap(build("vit", seed=3, init_values=0.1), CONFIG), tmp_path / "o.pth", **extra)
    model = official.load(tmp_path / "o.pth", build("vit", seed=9, init_values=0.1))
    with rein.disabled(model.backbone):
        assert torch.equal(model.backbone(images()), donor.requires_grad_(False)(images()))
    written = official.convert_file(tmp_path / "o.pth", tmp_path / "ours.safetensors", build("vit", init_values=0.1).to("meta"))
    assert written[1] == tmp_path / "ours.backbone.safetensors"
    fresh = build("vit", seed=9, init_values=0.1)
    fresh.load_state_dict(load_file(written[1]))
    assert torch.equal(rein.Segmenter.load(written[0], fresh).eval()(images()), model.eval()(images()))


def test_eva02s_parts_are_renamed():
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    settings |= {"qkv_fused": False, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True}
    eva = Eva(**settings, ref_feat_shape=(16, 16))
    theirs = {}
    for key, value in eva.state_dict().items():
        for ours, official_name in (
            ("attn.q_proj.bias", "attn.q_bias"),
            ("attn.v_proj.bias", "attn.v_bias"),
            ("mlp.fc1_g.", "mlp.w1."),
            ("mlp.fc1_x.", "mlp.w2."),
            ("mlp.norm.", "mlp.ffn_ln."),
            ("mlp.fc2.", "mlp.w3."),
        ):
            key = key.replace(ours, official_name)
        theirs[f"backbone.{key}"] = value
    theirs |= {"backbone.rope.freqs_cos": torch.zeros(4), "backbone.blocks.0.attn.rope.freqs_sin": torch.zeros(4)}
    found = official.convert(theirs).backbone
    wanted = eva.state_dict()
    assert found.keys() == wanted.keys() - {key for key in wanted if "rope" in key}
    assert all(torch.equal(found[key], wanted[key]) for key in found)


def test_dinov2_is_resampled_the_authors_way():
    stored = load_file(CONFORMANCE / "convert_dinov2_512.safetensors")
    state = {"patch_embed.proj.weight": stored["in/patch_weight_out0_4"], "pos_embed": stored["in/pos_embed_ch0_4"]}
    got = official.resample(state)
    assert torch.allclose(got["patch_embed.proj.weight"], stored["out/patch_weight_out0_4"], atol=1e-6)
    assert torch.allclose(got["pos_embed"], stored["out/pos_embed_ch0_4"], atol=1e-6)
    assert got["pos_embed"].shape[1] == 1 + 32 * 32
    with pytest.raises(rein.errors.InputError, match="no class token and a square grid"):
        official.resample({**state, "pos_embed": torch.zeros(1, 12, 4)})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"decode_head.extra.weight": torch.zeros(1)}, r"holds 1 keys that rein does not know: decode_head.extra.weight"),
        ({"neck.conv": torch.zeros(1), "backbone.reins.gamma": torch.zeros(1)}, r"2 keys.*backbone.reins.gamma, neck.conv"),
        ({"backbone.blocks.0.nosuch": torch.zeros(1)}, "does not fit this .*missing: .*unexpected: blocks.0.nosuch"),
    ],
)
def test_unknown_keys_are_listed_and_nothing_changes(tmp_path, extra, message):
    checkpoint(a_model(), tmp_path / "o.pth", **extra)
    backbone = build("vit")
    with pytest.raises(CheckpointError, match=message):
        official.load(tmp_path / "o.pth", backbone)
    assert not hasattr(backbone, "rein")
    assert all(p.requires_grad for p in backbone.parameters())


def test_missing_keys_are_listed(tmp_path):
    state = {f"decode_head.{key}": value for key, value in made_up_head([32] * 4, **HEAD).items()}
    del state["decode_head.cls_embed.bias"]
    with pytest.raises(CheckpointError, match="lacks 1 keys of a Mask2Former head: decode_head.cls_embed.bias"):
        official.convert(state)


class Evil:
    def __reduce__(self):
        return (Path("/nonexistent/never").touch, ())


@pytest.mark.parametrize("content", [{"state_dict": {"a": Evil()}}, {"state_dict": {}}, [1, 2], {"a": "text"}])
def test_only_tensors_are_read(tmp_path, content):
    torch.save(content, tmp_path / "o.pth")
    with pytest.raises(CheckpointError, match=r"weights_only=True|holds no state_dict of tensors"):
        official.read(tmp_path / "o.pth")
    (tmp_path / "o.pth").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read with weights_only=True"):
        official.read(tmp_path / "o.pth")
    with pytest.raises(CheckpointError, match="cannot read"):
        official.read(tmp_path / "nosuch.pth")


def test_another_backbone_is_refused(tmp_path):
    checkpoint(a_model(), tmp_path / "o.pth")
    with pytest.raises(CheckpointError, match="does not match|does not fit"):
        official.load(tmp_path / "o.pth", build("vit", embed_dim=48, num_heads=4))
    with pytest.raises(CheckpointError, match="wants a bare backbone"):
        official.load(tmp_path / "o.pth", a_model())


def test_the_command_converts_both_ways(tmp_path, capsys):
    model = rein.wrap(timm.create_model("test_vit", num_classes=0), CONFIG)
    state = checkpoint(model, tmp_path / "o.pth", in_channels=(64,) * 4)
    assert main(["convert", str(tmp_path / "o.pth"), str(tmp_path / "ours.safetensors"), "--backbone", "test_vit"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'ours.safetensors'}\n"
    assert main(["info", str(tmp_path / "ours.safetensors")]) == 0
    assert "Mask2FormerHead" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pth"), "--to-official"]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(back[key], value) for key, value in state.items())
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "o.pth"), str(tmp_path / "x.safetensors")]) == 2
    assert "--backbone NAME is wanted" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "o.pth"), str(tmp_path / "x.safetensors"), "--backbone", "nosuch"]) == 2
    assert "timm has no model 'nosuch'" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_what_the_authors_have_no_names_for_is_refused(tmp_path):
    unshared = rein.wrap(build("vit"), rein.ReinConfig(num_tokens=7, rank=2, query_dim=8, share=False))
    rein.save(unshared, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="share=False"):
        official.to_official(tmp_path / "a.safetensors", tmp_path / "o.pth")
    other = rein.Segmenter(a_model(), rein.heads.LinearHead(32, 3))
    other.save(tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match="holds a LinearHead, which the authors' layout has no names for"):
        official.to_official(tmp_path / "s.safetensors", tmp_path / "o.pth")


def spoiled(name):
    """What a complete checkpoint becomes when something is wrong with it."""
    reins, head = "backbone.reins.", "decode_head."

    def spoil(state):
        if name == "no queries":
            return {key: value for key, value in state.items() if not key.startswith((f"{reins}transform", f"{reins}merge"))}
        if name == "no adapter":
            return {key: value for key, value in state.items() if not key.startswith(reins)}
        if name == "no first stage":
            return {key.replace(reins, f"{reins}1."): value for key, value in state.items()}
        if name == "no tokens":
            return {key: value for key, value in state.items() if "learnable" not in key}
        if name == "no scale":
            return {key: value for key, value in state.items() if not key.endswith("scale")}
        if name == "no encoder":
            return {key: value for key, value in state.items() if "encoder.layers" not in key}
        changed = {
            "flat tokens": {f"{reins}learnable_tokens_a": torch.zeros(3)},
            "scalar level": {f"{head}level_embed.weight": torch.zeros(())},
            "two rows": {f"{head}transformer_decoder.layers.0.self_attn.attn.in_proj_weight": torch.zeros(2, 64)},
            "few offsets": {f"{head}pixel_decoder.encoder.layers.0.self_attn.sampling_offsets.weight": torch.zeros(2, 64)},
            "many classes": {f"{head}cls_embed.weight": torch.zeros(400, 64)},
            "whole numbers": {f"{reins}merge.bias": torch.zeros(64, dtype=torch.int32)},
            "not finite": {f"{reins}merge.bias": torch.full((64,), torch.nan)},
            "number key": {3: torch.zeros(1)},
        }
        return state | changed[name]

    return spoil


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no queries", "linked to queries 64 wide, but an adapter with query_dim=None"),
        ("no adapter", "linked to queries 64 wide, but no adapter"),
        ("no first stage", "lacks the tokens of its first stage"),
        ("no tokens", "lacks the tokens of its first stage"),
        ("no scale", "lacks backbone.reins.scale; .*zero_init=True"),
        ("no encoder", "lacks .* keys of a Mask2Former head|not in the official layout"),
        ("flat tokens", "not in the official layout"),
        ("scalar level", "not in the official layout"),
        ("two rows", "not in the official layout|does not match"),
        ("few offsets", "impossible head|not in the official layout"),
        ("many classes", "impossible head|does not match"),
        ("whole numbers", "not of finite floating point numbers"),
        ("not finite", "not of finite floating point numbers"),
        ("number key", "1 keys that rein does not know: 3"),
    ],
)
def test_a_spoiled_checkpoint_changes_and_writes_nothing(tmp_path, name, message):
    state = checkpoint(a_model(), tmp_path / "o.pth")
    torch.save({"state_dict": spoiled(name)(state)}, tmp_path / "o.pth")
    backbone = build("vit")
    with pytest.raises(CheckpointError, match=message):
        official.load(tmp_path / "o.pth", backbone)
    assert not hasattr(backbone, "rein")
    with pytest.raises(CheckpointError, match=message):
        official.convert_file(tmp_path / "o.pth", tmp_path / "ours.safetensors", backbone)
    assert not (tmp_path / "ours.safetensors").exists()


def test_a_backbone_with_other_maps_than_the_heads_is_refused(tmp_path):
    checkpoint(rein.wrap(build("vit", depth=2), CONFIG), tmp_path / "o.pth")
    backbone = build("vit", depth=2)
    with pytest.raises(CheckpointError, match=r"its head wants maps of \[32, 32, 32, 32\] channels, the model's are \[32, 32\]"):
        official.load(tmp_path / "o.pth", backbone)
    assert not hasattr(backbone, "rein")


def test_a_head_over_other_blocks_has_no_official_form(tmp_path):
    deep = rein.wrap(build("vit", depth=8), CONFIG)
    head = rein.heads.Mask2FormerHead([32] * 4, 5, channels=64, encoder_layers=1, decoder_layers=1)
    rein.Segmenter(deep, head, [0, 1, 2, 7]).save(tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match=r"over the maps \[0, 1, 2, 7\], which the authors' layout cannot say"):
        official.to_official(tmp_path / "s.safetensors", tmp_path / "o.pth")


def test_an_empty_file_is_one_line(tmp_path, capsys):
    (tmp_path / "e.pth").touch()
    assert main(["convert", str(tmp_path / "e.pth"), str(tmp_path / "x.safetensors"), "--backbone", "test_vit"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(rein.errors.InputError, match="no patch_embed.proj.weight and pos_embed"):
        official.resample({})
