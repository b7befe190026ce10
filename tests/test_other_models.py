"""Backbones from outside timm: Hugging Face, DINOv2 of torch.hub, encoders of other libraries, audio and video."""

import pytest
import timm
import torch
from torch import nn

import rein
from models import amplify_adapter, build, images
from rein import backbones
from rein.testing import BackboneCheckError, check_backbone, tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


def get_layers(model):
    """The blocks of a Hugging Face model; their attribute depends on the version of transformers."""
    return list(model.layers if hasattr(model, "layers") else model.encoder.layer)


def test_a_hugging_face_dinov2_is_wrapped_by_its_layers():
    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, image_size=56, patch_size=14)).eval()
    blocks = get_layers(model)
    assert [(s.width, s.num_prefix_tokens) for s in backbones.find_blocks(model, blocks)] == [(32, 1)] * 3
    assert "compile" in check_backbone(model, images(1, 56, 84), blocks=blocks)


def test_a_timm_model_inside_a_hugging_face_one_is_found():
    transformers = pytest.importorskip("transformers")
    model = transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture="test_vit", do_pooling=False)).eval()
    assert backbones.find_blocks(model)[0].path == "timm_model.blocks.0"
    assert backbones.architecture(model) == "test_vit"
    check_backbone(model, images(1, 160, 160), compile=False)


def test_audio_and_video_models_are_wrapped_with_example_inputs():
    transformers = pytest.importorskip("transformers")
    audio = transformers.ASTModel(transformers.ASTConfig(**SMALL, max_length=64, num_mel_bins=32)).eval()
    with pytest.raises(rein.UnsupportedBackboneError, match="example_inputs"):
        rein.wrap(audio, blocks=get_layers(audio), num_prefix_tokens=2)
    check_backbone(audio, (torch.randn(1, 64, 32),), blocks=get_layers(audio), num_prefix_tokens=2, compile=False)
    settings = {**SMALL, "image_size": 32, "patch_size": 8, "num_frames": 4}
    video = transformers.VideoMAEModel(transformers.VideoMAEConfig(**settings)).eval()
    clip = {"pixel_values": torch.randn(1, 4, 3, 32, 32)}
    check_backbone(video, clip, blocks=get_layers(video), num_prefix_tokens=0, compile=False)
    with pytest.raises(rein.UnsupportedBackboneError, match="could not be measured; .* Pass num_prefix_tokens=N"):
        rein.wrap(video, blocks=get_layers(video), example_inputs=clip)


def test_an_encoder_inside_a_segmentation_model_is_found():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-test_resnet", encoder_weights=None, encoder_depth=4, decoder_channels=(32, 16, 16, 8)).eval()
    assert backbones.find_blocks(model)[0].path == "encoder.model.layer1.0"
    check_backbone(model, images(1, 64, 96), compile=False)
    model = smp.DPT("tu-test_vit", encoder_weights=None).eval()
    rein.wrap(model.encoder)  # the decoder stays trainable
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} > {"decoder", "segmentation_head"}
    model.encoder.model.train()
    model(images(1, 160, 160)).sum().backward()
    tokens = model.encoder.rein.tokens_a.grad.flatten(1).abs().amax(1)
    last = max(model.encoder.out_indices if hasattr(model.encoder, "out_indices") else [len(tokens) - 1])
    assert (tokens[:last] > 0).all()


class HubBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class HubDinoVisionTransformer(nn.Module):
    """The structure of DINOv2 in torch.hub: blocks in chunks with leading identities, register tokens, a dictionary as output."""

    def __init__(self, dim=32, registers=4):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 14, 14)
        self.cls_token, self.register_tokens = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, registers, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 4 * 4, dim))
        self.blocks = nn.ModuleList(
            nn.ModuleList([*(nn.Identity() for _ in range(2 * chunk)), HubBlock(dim), HubBlock(dim)]) for chunk in range(2)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = self.patch_embed(x)
        pos = self.pos_embed.mT.unflatten(2, (4, 4))
        x = (x + nn.functional.interpolate(pos, x.shape[-2:], mode="bicubic")).flatten(2).mT
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), self.register_tokens.expand(len(x), -1, -1), x), 1)
        for chunk in self.blocks:
            for block in chunk:
                x = block(x)
        x = self.norm(x)
        return {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, 5:]}


def test_dinov2_of_torch_hub_is_wrapped_by_its_blocks():
    torch.manual_seed(0)
    model = HubDinoVisionTransformer().eval()
    blocks = [block for chunk in model.blocks for block in chunk if isinstance(block, HubBlock)]
    infos = backbones.find_blocks(model, blocks)
    assert [(s.path, s.num_prefix_tokens) for s in infos] == [(f"blocks.{i}", 5) for i in ("0.0", "0.1", "1.2", "1.3")]
    assert "compile" in check_backbone(model, images(1, 56, 84), blocks=blocks)


def test_naflexvit_is_refined_with_a_dictionary_of_patches():
    naflex = timm.create_model(
        "naflexvit_base_patch16_gap", num_classes=0, patch_size=8, embed_dim=32, depth=2, num_heads=2, reg_tokens=2
    )
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    patches = {
        "patches": torch.randn(2, 12, 8 * 8 * 3),
        "patch_coord": torch.stack((rows, columns), -1).reshape(1, 12, 2).repeat(2, 1, 1),
        "patch_valid": torch.arange(12).expand(2, 12) < torch.tensor([[12], [9]]),
    }
    checked = check_backbone(naflex, (patches,), compile=False)
    assert "gradients" in checked
    model = rein.wrap(naflex.eval(), rein.ReinConfig(num_tokens=5, scale_init=0.5))  # measured with an image, called with patches
    with torch.no_grad():
        refined = model(patches)
        with rein.disabled(model):
            assert not torch.allclose(model(patches), refined)


class Forgetful(nn.Module):
    """The output of the block is not used, so a refinement of it is lost."""

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.out = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        self.block(x)
        return self.out(x.mean(1))


def test_a_failed_check_is_named():
    with pytest.raises(BackboneCheckError, match="^features: the adapter does not change the outputs of the model"):
        check_backbone(Forgetful(), images(), blocks=["block"])

    class Noisy(HubDinoVisionTransformer):
        def forward(self, x):
            x = super().forward(x)["x_norm_patchtokens"]
            return x + torch.randn_like(x)

    with pytest.raises(BackboneCheckError, match="^disabled: the outputs differ from those of the bare model"):
        check_backbone(Noisy(), images(1, 56, 56), blocks=["blocks.0.0"])

    class InPlace(nn.Linear):
        def forward(self, x):
            self.running = getattr(self, "running", 0) + 1
            return super().forward(x) * (1 + self.training)

    model = HubDinoVisionTransformer()
    model.blocks[0][1] = InPlace(32, 32)
    assert "frozen" in check_backbone(model, images(1, 56, 56), blocks=["blocks.0.1"], compile=False)
    assert issubclass(BackboneCheckError, AssertionError)


def test_check_backbone_refuses_wrapped_not_finite_and_unknown_models():
    with pytest.raises(rein.errors.InputError, match="expects a bare model, got a wrapped one; call rein.unwrap"):
        check_backbone(rein.wrap(tiny_vit()), images())
    nan = tiny_vit()
    nan.blocks[0].norm1.weight.data.fill_(torch.nan)
    with pytest.raises(rein.errors.InputError, match="not finite"):
        check_backbone(nan, images())
    with pytest.raises(rein.UnsupportedBackboneError, match="rein does not know the blocks of Linear"):
        check_backbone(nn.Linear(3, 3), torch.randn(2, 3))


def test_the_old_name_of_the_check_error_is_deprecated():
    with pytest.warns(DeprecationWarning, match="use rein.testing.BackboneCheckError"):
        assert rein.testing.BrokenPromiseError is BackboneCheckError
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = rein.testing.missing


def test_a_sequential_model_runs_with_its_adapter_as_a_child():
    model = nn.Sequential(build("vit"), nn.LayerNorm(32))
    check_backbone(model, images(), compile=False)
    assert backbones.find_blocks(model)[0].path == "0.blocks.0"


def test_hooks_that_were_added_before_wrap_see_refined_features():
    model, seen = build("vit"), []
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(images())
    rein.wrap(model, rein.ReinConfig(num_tokens=5, scale_init=0.5))(images())
    assert not torch.allclose(seen[0], seen[1])


def hub(**attributes):
    torch.manual_seed(0)
    model = HubDinoVisionTransformer().eval()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model, ["blocks.0.0", "blocks.0.1"]


class Trailing(HubDinoVisionTransformer):
    """Detection tokens after the patch tokens, as in YOLOS."""

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x, self.register_tokens.expand(len(x), -1, -1)), 1)
        for chunk in self.blocks:
            for block in chunk:
                x = block(x)
        return x


def test_tokens_after_the_patch_tokens_are_detected():
    with pytest.raises(
        BackboneCheckError,
        match=r"^prefix rows: rows \[17, 18, 19, 20\] at block 'blocks.0.0' are not patches; expected such rows among the first 5",
    ):
        check_backbone(Trailing(), images(1, 56, 56), blocks=["blocks.0.0"], compile=False)
    model = rein.wrap(Trailing(), blocks=["blocks.0.0"], num_prefix_tokens=1)  # a user may still pass the number
    assert model.rein_injection.blocks[0].num_prefix_tokens == 1


class Caching(HubBlock):
    def __init__(self, dim):
        super().__init__(dim)
        self.cache, self.log = {}, []

    def forward(self, x):
        self.log.append(x.shape)
        if x.shape[1] not in self.cache:
            self.cache[x.shape[1]] = torch.linspace(0, 1, x.shape[1], device=x.device)
        return super().forward(x + self.cache[x.shape[1]][:, None])


def test_caches_of_blocks_are_unchanged():
    model, paths = hub()
    model.blocks[0][1] = Caching(32).eval()
    model(images(1, 56, 56))
    rein.wrap(model, blocks=paths)
    assert [len(shape) for shape in model.blocks[0][1].log] == [3]
    assert [cached.device.type for cached in model.blocks[0][1].cache.values()] == ["cpu"]
    model(images(1, 224, 448))


def test_users_hooks_and_pre_hooks_see_no_meta_tensors():
    model, paths = hub()
    seen = []
    model.blocks[0][0].register_forward_pre_hook(lambda module, args: seen.append(args[0].device.type))
    model.blocks[0][0].register_forward_hook(lambda module, args, output: seen.append(output.device.type))
    rein.wrap(model, blocks=paths)
    assert seen == []
    model(images(1, 56, 56))
    assert seen == ["cpu", "cpu"]


def test_a_block_with_weight_norm_can_be_measured():
    model, paths = hub()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0][0].mlp[0])
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model.blocks[0][1].mlp[0])
    before = model(images(1, 56, 56))["x_norm_patchtokens"]
    rein.wrap(model, blocks=paths)
    with rein.disabled(model):
        assert torch.allclose(model(images(1, 56, 56))["x_norm_patchtokens"], before, atol=1e-6)


class SequenceFirst(HubDinoVisionTransformer):
    def forward(self, x):
        x = self.patch_embed(x).flatten(2).permute(2, 0, 1)
        for chunk in self.blocks:
            for block in chunk:
                x = block(x)
        return x


class ChannelsBeforeRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Conv2d(3, 16, 8, 8), nn.Conv1d(16, 16, 1)

    def forward(self, x):
        return self.block(self.embed(x).flatten(2))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (SequenceFirst(), {"blocks": ["blocks.0.0"], "num_prefix_tokens": 1}, "expected the batch as first axis"),
        (
            SequenceFirst(),
            {"blocks": ["blocks.0.0"], "num_prefix_tokens": 1, "example_inputs": torch.zeros(2, 3, 56, 56)},
            "returns a tensor of shape .* for 2 inputs",
        ),
        (ChannelsBeforeRows(), {"blocks": ["block"], "num_prefix_tokens": 0}, r"returns a tensor of shape \(3, 16,"),
        (tiny_vit(), {"blocks": 5}, "blocks is 5; expected a list"),
        (
            tiny_vit(),
            {"num_prefix_tokens": 99},
            "num_prefix_tokens is 99, but block .* returns 17 tokens per image; expected 0 to 16; the measured .* 1",
        ),
        (tiny_vit(), {"num_prefix_tokens": -1}, "num_prefix_tokens is -1"),
        (tiny_vit(), {"example_inputs": "x"}, "example_inputs is a str without a tensor; expected a tensor"),
    ],
)
def test_unsupported_layouts_and_wrong_arguments_are_refused(model, arguments, message):
    with pytest.raises(rein.UnsupportedBackboneError, match=message):
        rein.wrap(model, **arguments)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("example", [images(), (images(),), {"x": images()}])
def test_an_example_image_may_be_a_tensor_a_tuple_or_a_dictionary(example):
    assert backbones.find_blocks(tiny_vit(), example_inputs=example)[0].num_prefix_tokens == 1


def test_an_adapter_of_an_audio_model_is_loaded_with_example_inputs(tmp_path):
    transformers = pytest.importorskip("transformers")
    make = lambda: transformers.ASTModel(transformers.ASTConfig(**SMALL, max_length=64, num_mel_bins=32)).eval()  # noqa: E731
    torch.manual_seed(0)
    audio, x = make(), torch.randn(1, 64, 32)
    rein.wrap(audio, blocks=get_layers(audio), num_prefix_tokens=2, example_inputs=x)
    rein.save(audio, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    with pytest.raises(rein.CheckpointError, match="example_inputs"):
        rein.load(make(), tmp_path / "a.safetensors")
    torch.manual_seed(0)
    again = rein.load(make(), tmp_path / "a.safetensors", example_inputs=x)
    assert torch.equal(again(x).last_hidden_state, audio(x).last_hidden_state)


def test_an_adapter_of_a_model_loads_into_its_features_only_form(tmp_path):
    whole = rein.wrap(timm.create_model("test_convnext"), rein.ReinConfig(num_tokens=5))
    rein.save(whole, tmp_path / "a.safetensors")
    features = timm.create_model("test_convnext", features_only=True)
    with pytest.raises(rein.CheckpointError):
        rein.load(features, tmp_path / "a.safetensors")
    rein.load(features, tmp_path / "a.safetensors", strict=False)
    for key, value in whole.rein.state_dict().items():
        assert torch.equal(features.rein.state_dict()[key], value)


@pytest.mark.parametrize("name", ["levit_128s", "crossvit_tiny_240"])
def test_stages_that_round_up_cover_the_whole_fixed_image(name):
    spec = backbones.input_spec(timm.create_model(name, num_classes=0))
    assert spec.covered == spec.fixed_size


def test_a_square_grid_as_large_as_the_width_is_measured_at_a_second_size():
    with torch.device("meta"):
        model = timm.create_model("maxvit_nano_rw_256", num_classes=0)
    infos = backbones.find_blocks(model)
    assert (infos[0].layout, infos[0].width) == ("NCHW", 64)


HUGGING_FACE = {  # class, configuration, number of prefix tokens that is passed, fixed side of the images, multiple of their sides
    "Dinov2": ("Dinov2Model", {"image_size": 56, "patch_size": 14}, None, None, 14),
    "Dinov2 with registers": ("Dinov2WithRegistersModel", {"image_size": 56, "patch_size": 14}, None, None, 14),
    "ViT": ("ViTModel", {"image_size": 30, "patch_size": 8}, 1, 30, 8),
    "SigLIP": ("SiglipVisionModel", {"image_size": 64, "patch_size": 16}, 0, 64, 16),
}


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    model, settings, *_ = HUGGING_FACE[name]
    config = getattr(transformers, model.replace("Model", "Config"))(**{**SMALL, "num_hidden_layers": 4}, **settings)
    torch.manual_seed(0)
    return getattr(transformers, model)(config).eval()


def wrap_layers(model, num_prefix_tokens=None):
    encoder = getattr(getattr(model, "vision_model", model), "encoder", None)  # vision_model: transformers 4
    layers = encoder.layers if hasattr(encoder, "layers") else get_layers(model)
    rein.wrap(model, rein.ReinConfig(num_tokens=6, rank=2), blocks=list(layers), num_prefix_tokens=num_prefix_tokens)
    return amplify_adapter(model)


def over_blocks(model, width=32, **settings):
    torch.manual_seed(1)
    return rein.Segmenter(model, rein.heads.FPNHead([width] * 4, 3, channels=8, tower_channels=8), **settings).eval()


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_segmenter_takes_the_maps_of_a_hugging_face_model_from_its_wrapped_blocks(name, tmp_path):
    _, _, num_prefix_tokens, side, multiple = HUGGING_FACE[name]
    model = wrap_layers(hugging_face(name), num_prefix_tokens)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    segmenter = over_blocks(model)
    for size in ((56, 84), (45, 70), (1, 90)):  # padded or in windows
        assert segmenter(images(1, *size)).shape == (1, 3, *size)
    height, width = (side // multiple * multiple,) * 2 if side else (45, 70)
    x, labels = images(2, height, width), torch.zeros(2, height, width, dtype=torch.long)
    segmenter(x, labels).backward()
    assert (model.rein.tokens_a.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(p.grad is not None for p in segmenter.parameters() if p.requires_grad)
    with torch.no_grad():
        refined = segmenter(x)
        with rein.disabled(model):
            assert not torch.allclose(segmenter(x), refined, atol=1e-3)
    segmenter.save(tmp_path / "s.safetensors")
    for backbone in (hugging_face(name), wrap_layers(hugging_face(name), num_prefix_tokens)):
        again = rein.Segmenter.load(tmp_path / "s.safetensors", backbone).eval()
        assert torch.equal(again.predict(x), segmenter.predict(x))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_the_maps_are_the_refined_patch_tokens_in_rows_and_columns():
    model = wrap_layers(hugging_face("Dinov2 with registers"))
    x, maps = images(2, 42, 70), over_blocks(model)._maps
    outputs = {}
    for index, layer in enumerate(get_layers(model)):
        layer.register_forward_hook(lambda module, args, output, index=index: outputs.update({index: output}))
    got = maps(model, x, [1, 3])
    for index, feature_map in zip((1, 3), got, strict=True):
        assert feature_map.shape == (2, 32, 3, 5)
        assert torch.equal(feature_map[:, :, 2, 4], outputs[index][:, 5 + 2 * 5 + 4])
        assert torch.equal(feature_map[:, :, 0, 3], outputs[index][:, 5 + 3])


@pytest.mark.parametrize("wrap", ["with blocks", "without blocks", "not"])
@pytest.mark.parametrize("architecture", ["test_vit", "test_convnext"])
def test_a_segmenter_takes_the_maps_of_a_timm_wrapper_model_from_its_blocks(architecture, wrap, tmp_path):
    transformers = pytest.importorskip("transformers")

    def make():
        torch.manual_seed(0)
        config = transformers.TimmWrapperConfig(architecture=architecture, do_pooling=False)
        return transformers.TimmWrapperModel(config).eval().requires_grad_(False)

    model, small = make(), rein.ReinConfig(num_tokens=6, rank=2)
    if wrap != "not":
        blocks = [block.path for block in backbones.find_blocks(model)] if wrap == "with blocks" else None
        amplify_adapter(rein.wrap(model, small, blocks=blocks))
    channels = backbones.map_channels(model.timm_model)
    segmenter = rein.Segmenter(model, rein.heads.LinearHead([channels[1], channels[-1]], 3), [1, len(channels) - 1]).eval()
    x = images(1, 64, 160)
    expected = model.timm_model.forward_intermediates(x, indices=list(segmenter.indices), intermediates_only=True)
    got = segmenter._maps(model, x, segmenter.indices)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(got, expected, strict=True))
    segmenter.save(tmp_path / "s.safetensors")
    assert torch.equal(rein.Segmenter.load(tmp_path / "s.safetensors", make()).eval()(x), segmenter(x))


def test_a_segmenter_over_an_encoder_of_another_library_takes_its_last_block_of_each_width():
    smp = pytest.importorskip("segmentation_models_pytorch")
    encoder = smp.Unet("tu-test_convnext", encoder_weights=None, encoder_depth=4, decoder_channels=(32, 16, 16, 8)).encoder.eval()
    rein.wrap(encoder, rein.ReinConfig(num_tokens=6, rank=2))
    head = rein.heads.FPNHead([24, 32, 48], 3, channels=8, tower_channels=8)
    assert rein.Segmenter(encoder, head).eval()(images(1, 45, 70)).shape == (1, 3, 45, 70)


@pytest.mark.slow
def test_a_compiled_segmenter_over_blocks_gives_the_same_logits():
    segmenter = over_blocks(wrap_layers(hugging_face("Dinov2")))
    torch._dynamo.reset()
    compiled = torch.compile(segmenter, backend="eager")
    with torch.no_grad():
        for size in ((56, 84), (42, 42), (56, 84)):
            x = images(1, *size)
            assert torch.allclose(compiled(x), segmenter(x), atol=1e-5)


def test_models_without_known_blocks_or_maps_are_refused():
    transformers = pytest.importorskip("transformers")
    head = rein.heads.LinearHead(32, 3)
    with pytest.raises(
        rein.UnsupportedBackboneError,
        match=r"feature maps of a Dinov2Model are the outputs of the blocks .* this one is bare .* Call rein.wrap\(model, blocks=",
    ):
        rein.Segmenter(hugging_face("Dinov2"), head)
    audio = transformers.ASTModel(transformers.ASTConfig(**SMALL, max_length=64, num_mel_bins=32)).eval()
    rein.wrap(audio, blocks=get_layers(audio), num_prefix_tokens=2, example_inputs=torch.randn(1, 64, 32))
    with pytest.raises(
        rein.UnsupportedBackboneError, match=r"ASTModel does not run with images \(B, 1, H, W\) of 224 x 448.* pixels"
    ):
        rein.Segmenter(audio, head)
    mae = transformers.ViTMAEModel(transformers.ViTMAEConfig(**SMALL, image_size=64, patch_size=16)).eval()
    rein.wrap(mae, blocks=get_layers(mae), num_prefix_tokens=1)  # it masks patches at random
    with pytest.raises(
        rein.UnsupportedBackboneError, match=r"returns 4 patch tokens for an image of 64 x 64 pixels; expected one for"
    ):
        rein.Segmenter(mae, head)
    settings = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "image_size": [224, 224]}
    hiera = transformers.HieraModel(transformers.HieraConfig(**settings)).eval()
    blocks = [name for name, module in hiera.named_modules() if type(module).__name__ == "HieraLayer"]
    rein.wrap(hiera, blocks=blocks, num_prefix_tokens=0)
    with pytest.raises(
        rein.UnsupportedBackboneError, match="return their patch tokens in the order of windows; expected the order of"
    ):
        rein.Segmenter(hiera, head)


def test_a_file_for_a_bare_model_of_unknown_blocks_is_an_error_and_leaves_it_unchanged(tmp_path):
    wrapped = over_blocks(wrap_layers(hugging_face("Dinov2")))
    wrapped.save(tmp_path / "wrapped.safetensors")
    other = rein.Segmenter(tiny_vit().requires_grad_(False), rein.heads.LinearHead(32, 3))
    other.save(tmp_path / "head.safetensors")
    model = hugging_face("Dinov2")
    before = list(model.state_dict())
    with pytest.raises(rein.CheckpointError, match="head.safetensors does not fit this Dinov2Model: the feature maps of"):
        rein.Segmenter.load(tmp_path / "head.safetensors", model)
    with pytest.raises(rein.CheckpointError, match="does not fit this Dinov2WithRegistersModel|was trained on Dinov2Model"):
        rein.Segmenter.load(tmp_path / "wrapped.safetensors", hugging_face("Dinov2 with registers"))
    assert list(model.state_dict()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
