"""Complete backbones agree with stored outputs of the authors' code: a wrapped DINOv2 in timm, and stage-wise adapters."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import rein
from reference import from_official
from rein.stagewise import StagewiseAdapter
from test_conformance import FOLDER, assert_close, with_prefix

MAPS32, GRADIENT32, MAPS64 = 2e-6, 5e-6, 1e-13


def dinov2(tensors, dtype, img_size=64):
    """The small DINOv2 of the stored run (width 48, depth 4, patch size 16) as a wrapped timm model, with its weights."""
    vit = VisionTransformer(
        img_size=img_size, patch_size=16, embed_dim=48, depth=4, num_heads=4, mlp_ratio=4, init_values=0.1, num_classes=0
    )
    state = with_prefix(tensors, "state/")
    backbone = {k: v for k, v in state.items() if not k.startswith("reins.") and k != "mask_token"}
    if img_size != 64:
        backbone["pos_embed"] = tensors[f"pos_embed_{img_size[0]}x{img_size[1]}"]
    vit.load_state_dict(backbone)
    rein.wrap(vit.to(dtype), rein.ReinConfig(num_tokens=10, rank=4, query_dim=16, scale_init=0.3))
    vit.rein.load_state_dict(from_official(with_prefix(state, "reins.")))
    return vit


@pytest.mark.parametrize("bits", [32, 64])
def test_a_wrapped_dinov2_agrees_with_the_authors_on_maps_queries_and_gradients(bits):
    tensors, dtype = load_file(FOLDER / "dinov2_backbone.safetensors"), getattr(torch, f"float{bits}")
    tolerance = MAPS32 if bits == 32 else MAPS64
    vit = dinov2(tensors, dtype)
    blocks = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, output: blocks.append(output))
    maps = vit.forward_intermediates(tensors["image"].to(dtype), intermediates_only=True)
    queries = vit.rein.queries()
    resized = rein.heads.FeaturePyramid()(maps)
    loss = (queries * tensors["cot_query"].to(dtype)).sum()
    for i in range(4):
        loss = loss + (resized[i] * tensors[f"cot_feat_{i}"].to(dtype)).sum()
    if bits == 32:
        for i in range(4):
            assert_close(blocks[i], tensors[f"out/adapted_{i}"], tolerance, f"block {i}")
            expected = tensors["out/map_2" if i == 2 else f"out/feat_{i}"]
            assert_close(resized[i], expected, tolerance, f"map {i} after resizing")
        assert_close(queries, tensors["out/query"], tolerance, "queries")
    else:
        for i in range(4):
            assert_close(maps[i], tensors[f"out64/map_{i}"], tolerance, f"map {i}")
        assert_close(queries, tensors["out64/query"], tolerance, "queries")
    loss.backward()
    prefix = "out/grad/reins." if bits == 32 else "out64/grad/reins."
    gradients = from_official(with_prefix(tensors, prefix))
    assert gradients.keys() == dict(vit.rein.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert_close(vit.rein.get_parameter(name).grad, gradient, GRADIENT32 if bits == 32 else 1e-12, f"gradient of {name}")


def official_resize(position, rows, columns):
    """Resample a position embedding as the authors do: bicubic, scale factors (n + 0.1) / sqrt(N0), class token unchanged."""
    side = int((position.shape[1] - 1) ** 0.5)
    grid = position[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    assert grid.shape[-2:] == (rows, columns)
    return torch.cat((position[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), 1)


def test_another_image_size_agrees_with_the_authors_position_embedding():
    tensors = load_file(FOLDER / "dinov2_backbone.safetensors")
    position = tensors["state/pos_embed"]
    for height, width in ((96, 96), (64, 96), (32, 48)):
        resized = official_resize(position, height // 16, width // 16)
        assert_close(resized, tensors[f"pos_embed_{height}x{width}"], 1e-6, "position embedding")
    vit = dinov2({**tensors, "pos_embed_96x64": official_resize(position, 6, 4)}, torch.float32, img_size=(96, 64))
    third = vit.forward_intermediates(tensors["image_96x64"], indices=[2], intermediates_only=True)[0]
    assert_close(third, tensors["feat_96x64_2"], MAPS32, "third map")


class ToyConvNeXt(nn.Module):
    """The backbone of the stored run: per stage a downsampling, then blocks x + pw(relu(dw(x))) with an adapter layer each."""

    def __init__(self, state, config):
        super().__init__()
        self.state, self.adapter = state, StagewiseAdapter([12, 12, 16, 16, 16], config)

    def forward(self, x):
        layer, maps = 0, []
        for stage, depth in enumerate((2, 3)):
            weight = self.state[f"downsample_layers.{stage}.weight"]
            x = F.conv2d(x, weight, self.state[f"downsample_layers.{stage}.bias"], stride=weight.shape[-1])
            for block in range(depth):
                name = f"stages.{stage}.{block}"
                y = F.conv2d(x, self.state[f"{name}.dw.weight"], self.state[f"{name}.dw.bias"], padding=1, groups=x.shape[1])
                x = x + F.conv2d(y.relu(), self.state[f"{name}.pw.weight"], self.state[f"{name}.pw.bias"])
                tokens = self.adapter(x.flatten(2).mT, layer)
                x, layer = tokens.mT.reshape(x.shape), layer + 1
            normed = F.layer_norm(
                x.permute(0, 2, 3, 1), (x.shape[1],), self.state[f"norm{stage}.weight"], self.state[f"norm{stage}.bias"], 1e-6
            )
            maps.append(normed.permute(0, 3, 1, 2))
        return maps


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("rank", [None, 3])
def test_stagewise_adapters_agree_with_the_authors_on_a_convnext(rank, bits):
    tensors = load_file(FOLDER / f"stages_convnext{'_lora' if rank else ''}.safetensors")
    dtype = getattr(torch, f"float{bits}")
    state = {k: v.to(dtype) for k, v in with_prefix(tensors, "state/").items()}
    backbone = {k: v for k, v in state.items() if not k.startswith("reins.")}
    model = ToyConvNeXt(backbone, rein.ReinConfig(num_tokens=6, rank=rank, query_dim=8, scale_init=0.3)).to(dtype)
    for stage, adapter in enumerate(model.adapter.stages):
        adapter.load_state_dict(from_official(with_prefix(state, f"reins.{stage}.")))
    maps, queries = model(tensors["image"].to(dtype)), model.adapter.queries()
    prefix, tolerance, gradient_tolerance = ("out/", MAPS32, GRADIENT32) if bits == 32 else ("out64/", MAPS64, 1e-12)
    loss = (queries * tensors["cot_query"].to(dtype)).sum()
    for i, feature_map in enumerate(maps):
        assert_close(feature_map, tensors[f"{prefix}feat_{i}"], tolerance, f"map {i}")
        loss = loss + (feature_map * tensors[f"cot_feat_{i}"].to(dtype)).sum()
    assert_close(queries, tensors[f"{prefix}query"], tolerance, "queries")
    loss.backward()
    compared = 0
    for stage, adapter in enumerate(model.adapter.stages):
        for name, gradient in from_official(with_prefix(tensors, f"{prefix}grad/reins.{stage}.")).items():
            assert_close(adapter.get_parameter(name).grad, gradient, gradient_tolerance, f"gradient of stage {stage} {name}")
            compared += 1
    assert compared == len(list(model.adapter.parameters()))
