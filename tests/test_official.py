"""Official checkpoints: complete conversion of names, equal outputs, and an exact inverse."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.eva import Eva

import rein
from models import build, images
from official_reference import mask2former, random_head
from rein import official
from rein.cli import main
from rein.errors import CheckpointError, InputError
from rein.official.names import ADAPTER_NAMES

HEAD = {"channels": 64, "num_classes": 5, "encoder_layers": 2, "decoder_layers": 4, "hidden": 48, "heads": 4}
CONFIG = rein.ReinConfig(num_tokens=7, rank=3, query_dim=64)
CONFORMANCE = Path(__file__).parent / "conformance"


def adapter_state(adapter, prefix="backbone.reins."):
    """The state dict of an adapter under official names."""
    names = {ours: official_name for official_name, ours in ADAPTER_NAMES.items()}
    state = {}
    for key, value in adapter.state_dict().items():
        stage, _, name = key.removeprefix("stages.").partition(".") if key.startswith("stages.") else ("", "", key)
        state[prefix + (f"{stage}." if stage else "") + names[name]] = value.clone()
    return state


def save_checkpoint(model, path, in_channels=(32,) * 4, **extra):
    """Write an official checkpoint with the adapter of `model` and a random head, and return its state dict."""
    head = random_head(list(in_channels), **HEAD)
    state = adapter_state(model.rein) | {f"decode_head.{key}": value for key, value in head.items()} | extra
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, path)
    return state


def wrapped_model():
    """A wrapped backbone whose adapter has random weights."""
    model = rein.wrap(build("vit"), CONFIG)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.rein.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def test_a_converted_head_agrees_with_the_reference_on_official_names():
    state = random_head([12, 16, 20, 24], **HEAD)
    converted = official.convert({f"decode_head.{key}": value for key, value in state.items()})
    head = rein.heads.Mask2FormerHead(**converted.head)
    head.load_state_dict(converted.head_tensors)
    generator = torch.Generator().manual_seed(5)
    maps = [
        torch.randn(2, c, *size, generator=generator)
        for c, size in zip((12, 16, 20, 24), ((24, 32), (12, 16), (6, 8), (3, 4)), strict=True)
    ]
    queries = torch.randn(9, 64, generator=generator)
    with torch.no_grad():
        classes, masks = head.eval()._decode_last(maps, queries)
        for image in range(2):
            expected_classes, expected_masks = mask2former(state, [m[image] for m in maps], queries, HEAD["heads"])
            # six attention layers in float32: tolerance of 1e-5 relative to the largest value
            assert (classes[image] - expected_classes).abs().max() < 1e-5 * expected_classes.abs().max()
            assert (masks[image] - expected_masks).abs().max() < 1e-5 * expected_masks.abs().max()


def test_loaded_and_converted_checkpoints_agree_with_the_reference(tmp_path):
    source = wrapped_model()
    state = save_checkpoint(source, tmp_path / "official.pth")
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


def test_to_official_inverts_convert_file_exactly(tmp_path):
    state = save_checkpoint(wrapped_model(), tmp_path / "official.pth")
    official.convert_file(tmp_path / "official.pth", tmp_path / "ours.safetensors", build("vit"))
    official.to_official(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "config",
    [CONFIG, rein.ReinConfig(num_tokens=7, rank=None, query_dim=None), rein.ReinConfig(num_tokens=7, rank=2, zero_init=True)],
)
def test_a_checkpoint_without_a_head_becomes_an_adapter_file(tmp_path, config):
    model = rein.wrap(build("vit"), config)
    torch.save(adapter_state(model.rein), tmp_path / "adapter.pth")  # a bare state dict
    assert official.load(tmp_path / "adapter.pth", other := build("vit"), zero_init=config.zero_init) is other
    assert other.rein.config == rein.ReinConfig(**{**config.to_dict(), "scale_init": 1e-3})
    assert torch.equal(other(images()), model(images()))
    official.convert_file(tmp_path / "adapter.pth", tmp_path / "a.safetensors", build("vit"), zero_init=config.zero_init)
    third = rein.load(build("vit"), tmp_path / "a.safetensors")
    assert torch.equal(third(images()), model(images()))


def test_stagewise_adapters_are_converted_both_ways(tmp_path):
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


def test_weights_of_a_dinov2_backbone_are_converted(tmp_path):
    source = build("vit", seed=3, init_values=0.1)
    extra = {f"backbone.{key}": value for key, value in source.state_dict().items()} | {"backbone.mask_token": torch.zeros(1, 32)}
    save_checkpoint(rein.wrap(build("vit", seed=3, init_values=0.1), CONFIG), tmp_path / "o.pth", **extra)
    model = official.load(tmp_path / "o.pth", build("vit", seed=9, init_values=0.1))
    with rein.disabled(model.backbone):
        assert torch.equal(model.backbone(images()), source.requires_grad_(False)(images()))
    written = official.convert_file(tmp_path / "o.pth", tmp_path / "ours.safetensors", build("vit", init_values=0.1).to("meta"))
    assert written[1] == tmp_path / "ours.backbone.safetensors"
    fresh = build("vit", seed=9, init_values=0.1)
    fresh.load_state_dict(load_file(written[1]))
    assert torch.equal(rein.Segmenter.load(written[0], fresh).eval()(images()), model.eval()(images()))


def test_a_converted_file_with_backbone_weights_states_how_to_build_the_backbone(tmp_path):
    torch.manual_seed(3)
    vit = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    extra = {f"backbone.{key}": value.clone() for key, value in vit.state_dict().items()}
    save_checkpoint(rein.wrap(vit, CONFIG), tmp_path / "o.pth", (64,) * 4, **extra)
    with torch.device("meta"):
        bare = timm.create_model("test_vit", num_classes=0)
    path, weights = official.convert_file(tmp_path / "o.pth", tmp_path / "ours.safetensors", bare)
    assert bare.norm.weight.is_meta
    model = official.load(tmp_path / "o.pth", timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)).eval()
    assert torch.equal(rein.Segmenter.load(path, weights=weights)(images()), model(images()))
    with pytest.raises(rein.CheckpointError, match="was trained on the weights test_vit"):
        rein.Segmenter.load(path, timm.create_model("test_vit", num_classes=0, dynamic_img_size=True))


def test_weights_of_an_eva02_backbone_are_renamed():
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    settings |= {"qkv_fused": False, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True}
    eva = Eva(**settings, ref_feat_shape=(16, 16))
    state = {}
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
        state[f"backbone.{key}"] = value
    state |= {"backbone.rope.freqs_cos": torch.zeros(4), "backbone.blocks.0.attn.rope.freqs_sin": torch.zeros(4)}
    converted = official.convert(state).backbone
    expected = eva.state_dict()
    assert converted.keys() == expected.keys() - {key for key in expected if "rope" in key}
    assert all(torch.equal(converted[key], expected[key]) for key in converted)


def test_resampled_dinov2_weights_agree_with_the_authors():
    stored = load_file(CONFORMANCE / "convert_dinov2_512.safetensors")
    state = {"patch_embed.proj.weight": stored["in/patch_weight_out0_4"], "pos_embed": stored["in/pos_embed_ch0_4"]}
    resampled = official.resample(state)
    assert torch.allclose(resampled["patch_embed.proj.weight"], stored["out/patch_weight_out0_4"], atol=1e-6)
    assert torch.allclose(resampled["pos_embed"], stored["out/pos_embed_ch0_4"], atol=1e-6)
    assert resampled["pos_embed"].shape[1] == 1 + 32 * 32
    with pytest.raises(InputError, match=r"pos_embed has shape \(1, 12, 4\); expected a class token and a square grid"):
        official.resample({**state, "pos_embed": torch.zeros(1, 12, 4)})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"decode_head.extra.weight": torch.zeros(1)}, r"has 1 unknown keys: decode_head.extra.weight"),
        (
            {"neck.conv": torch.zeros(1), "backbone.reins.gamma": torch.zeros(1)},
            r"2 unknown keys: backbone.reins.gamma, neck.conv",
        ),
        ({"backbone.blocks.0.nosuch": torch.zeros(1)}, "does not fit this .*missing: .*unexpected: blocks.0.nosuch"),
    ],
)
def test_unknown_keys_are_listed_and_the_backbone_stays_unchanged(tmp_path, extra, message):
    save_checkpoint(wrapped_model(), tmp_path / "o.pth", **extra)
    backbone = build("vit")
    with pytest.raises(CheckpointError, match=message):
        official.load(tmp_path / "o.pth", backbone)
    assert not hasattr(backbone, "rein")
    assert all(p.requires_grad for p in backbone.parameters())


def test_missing_keys_are_listed():
    state = {f"decode_head.{key}": value for key, value in random_head([32] * 4, **HEAD).items()}
    del state["decode_head.cls_embed.bias"]
    with pytest.raises(CheckpointError, match="lacks 1 keys of a Mask2Former head: decode_head.cls_embed.bias"):
        official.convert(state)


class Malicious:
    def __reduce__(self):
        return (Path("/nonexistent/never").touch, ())


@pytest.mark.parametrize("content", [{"state_dict": {"a": Malicious()}}, {"state_dict": {}}, [1, 2], {"a": "text"}])
def test_a_file_that_is_not_a_state_dict_of_tensors_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "o.pth")
    with pytest.raises(
        CheckpointError, match=r"cannot be read as a PyTorch file|has no state dict; expected a dictionary of tensors"
    ):
        official.read(tmp_path / "o.pth")
    (tmp_path / "o.pth").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read as a PyTorch file"):
        official.read(tmp_path / "o.pth")
    (tmp_path / "o.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"o\.pth is empty\. Restore it"):
        official.read(tmp_path / "o.pth")
    with pytest.raises(CheckpointError, match=r"cannot read .*nosuch\.pth: no such file"):
        official.read(tmp_path / "nosuch.pth")
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.pth: .*nowhere does not exist"):
        official.read(tmp_path / "nowhere" / "a.pth")
    with pytest.raises(CheckpointError, match="it is a folder; expected the path of a file"):
        official.read(tmp_path)


def test_another_backbone_is_an_error(tmp_path):
    save_checkpoint(wrapped_model(), tmp_path / "o.pth")
    with pytest.raises(CheckpointError, match="does not match|does not fit"):
        official.load(tmp_path / "o.pth", build("vit", embed_dim=48, num_heads=4))
    with pytest.raises(CheckpointError, match="expects a bare backbone, got a wrapped one"):
        official.load(tmp_path / "o.pth", wrapped_model())


def test_the_command_converts_both_ways(tmp_path, capsys):
    model = rein.wrap(timm.create_model("test_vit", num_classes=0), CONFIG)
    state = save_checkpoint(model, tmp_path / "o.pth", in_channels=(64,) * 4)
    assert main(["convert", str(tmp_path / "o.pth"), str(tmp_path / "ours.safetensors"), "--backbone", "test_vit"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'ours.safetensors'}\n"
    assert main(["info", str(tmp_path / "ours.safetensors")]) == 0
    assert "Mask2FormerHead" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pth"), "--to-official"]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(back[key], value) for key, value in state.items())
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "o.pth"), str(tmp_path / "x.safetensors")]) == 2
    assert "--backbone is missing; expected timm's name of the backbone" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "o.pth"), str(tmp_path / "x.safetensors"), "--backbone", "nosuch"]) == 2
    assert "timm has no model 'nosuch'" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_content_without_official_names_is_an_error(tmp_path):
    unshared = rein.wrap(build("vit"), rein.ReinConfig(num_tokens=7, rank=2, query_dim=8, share=False))
    rein.save(unshared, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="has an adapter with share=False; the official layout supports only share=True"):
        official.to_official(tmp_path / "a.safetensors", tmp_path / "o.pth")
    other = rein.Segmenter(wrapped_model(), rein.heads.LinearHead(32, 3))
    other.save(tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match="has a LinearHead; the official layout supports only Mask2FormerHead"):
        official.to_official(tmp_path / "s.safetensors", tmp_path / "o.pth")


def damage(state, name):
    """Return a copy of a complete official state dict with one error."""
    adapter, head = "backbone.reins.", "decode_head."
    if name == "no queries":
        return {key: value for key, value in state.items() if not key.startswith((f"{adapter}transform", f"{adapter}merge"))}
    if name == "no adapter":
        return {key: value for key, value in state.items() if not key.startswith(adapter)}
    if name == "no first stage":
        return {key.replace(adapter, f"{adapter}1."): value for key, value in state.items()}
    if name == "no tokens":
        return {key: value for key, value in state.items() if "learnable" not in key}
    if name == "no scale":
        return {key: value for key, value in state.items() if not key.endswith("scale")}
    if name == "no encoder":
        return {key: value for key, value in state.items() if "encoder.layers" not in key}
    changed = {
        "flat tokens": {f"{adapter}learnable_tokens_a": torch.zeros(3)},
        "scalar level": {f"{head}level_embed.weight": torch.zeros(())},
        "two rows": {f"{head}transformer_decoder.layers.0.self_attn.attn.in_proj_weight": torch.zeros(2, 64)},
        "few offsets": {f"{head}pixel_decoder.encoder.layers.0.self_attn.sampling_offsets.weight": torch.zeros(2, 64)},
        "many classes": {f"{head}cls_embed.weight": torch.zeros(400, 64)},
        "integers": {f"{adapter}merge.bias": torch.zeros(64, dtype=torch.int32)},
        "not finite": {f"{adapter}merge.bias": torch.full((64,), torch.nan)},
        "integer key": {3: torch.zeros(1)},
    }
    return state | changed[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no queries", "expects an adapter with query_dim=64, but an adapter with query_dim=None"),
        ("no adapter", "expects an adapter with query_dim=64, but no adapter"),
        ("no first stage", "an adapter without tokens in its first stage: expected .*learnable_tokens"),
        ("no tokens", "an adapter without tokens in its first stage: expected .*learnable_tokens"),
        ("no scale", "lacks backbone.reins.scale; .*zero_init=True"),
        ("no encoder", "lacks .* keys of a Mask2Former head|not in the official layout"),
        ("flat tokens", "not in the official layout"),
        ("scalar level", "not in the official layout"),
        ("two rows", "not in the official layout|does not match"),
        ("few offsets", "invalid arguments for Mask2FormerHead|not in the official layout"),
        ("many classes", "invalid arguments for Mask2FormerHead|does not match"),
        ("integers", "merge.bias of dtype torch.int32; expected finite floating point numbers"),
        ("not finite", "merge.bias of dtype torch.float32; expected finite floating point numbers"),
        ("integer key", "has 1 unknown keys: 3"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_that_changes_and_writes_nothing(tmp_path, name, message):
    state = save_checkpoint(wrapped_model(), tmp_path / "o.pth")
    torch.save({"state_dict": damage(state, name)}, tmp_path / "o.pth")
    backbone = build("vit")
    with pytest.raises(CheckpointError, match=message):
        official.load(tmp_path / "o.pth", backbone)
    assert not hasattr(backbone, "rein")
    with pytest.raises(CheckpointError, match=message):
        official.convert_file(tmp_path / "o.pth", tmp_path / "ours.safetensors", backbone)
    assert not (tmp_path / "ours.safetensors").exists()


def test_a_backbone_with_other_maps_than_the_head_expects_is_an_error(tmp_path):
    save_checkpoint(rein.wrap(build("vit", depth=2), CONFIG), tmp_path / "o.pth")
    backbone = build("vit", depth=2)
    with pytest.raises(
        CheckpointError, match=r"its head expects maps of \[32, 32, 32, 32\] channels, the model's maps have \[32, 32\]"
    ):
        official.load(tmp_path / "o.pth", backbone)
    assert not hasattr(backbone, "rein")


def test_a_head_on_other_blocks_than_the_default_is_an_error(tmp_path):
    deep = rein.wrap(build("vit", depth=8), CONFIG)
    head = rein.heads.Mask2FormerHead([32] * 4, 5, channels=64, encoder_layers=1, decoder_layers=1)
    rein.Segmenter(deep, head, [0, 1, 2, 7]).save(tmp_path / "s.safetensors")
    with pytest.raises(
        CheckpointError, match=r"with block indices \[0, 1, 2, 7\]; the official layout supports only the default"
    ):
        official.to_official(tmp_path / "s.safetensors", tmp_path / "o.pth")


def test_an_empty_file_is_an_error_of_one_line(tmp_path, capsys):
    (tmp_path / "e.pth").touch()
    assert main(["convert", str(tmp_path / "e.pth"), str(tmp_path / "x.safetensors"), "--backbone", "test_vit"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match="lacks patch_embed.proj.weight or pos_embed"):
        official.resample({})
