"""`rein.backbones`: measured facts about blocks, the images that a backbone accepts, and its feature maps."""

import pytest
import timm
import torch

from models import FAMILIES, PREFIX_TOKENS, build, get_blocks, images
from rein import backbones


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_found_in_order_with_its_width_and_prefix_tokens(family):
    blocks = backbones.find_blocks(build(family))
    assert [block.path.rpartition(".blocks.")[2].removeprefix("blocks.") for block in blocks] == ["0", "1", "2", "3"]
    assert {block.width for block in blocks} == {32}
    assert [block.num_prefix_tokens for block in blocks] == PREFIX_TOKENS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_measuring_changes_no_weights_modes_hooks_or_random_state(family):
    model = build(family).train()
    get_blocks(model)[1].eval()
    before = {name: (tensor, tensor.clone(), tensor.device) for name, tensor in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    backbones.find_blocks(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
        assert tensor.device == before[name][2]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("vit_tiny_patch16_224", {}, ((224, 224), (16, 16), 3)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (None, (16, 16), 3)),
        ("vit_tiny_patch16_224", {"img_size": (64, 96), "in_chans": 5}, ((64, 96), (16, 16), 5)),
        ("vit_tiny_patch16_224", {"patch_size": (8, 16), "dynamic_img_size": True}, (None, (8, 16), 3)),
        ("vit_tiny_r_s16_p8_224", {}, ((224, 224), (32, 32), 3)),
        ("eva02_tiny_patch14_224", {}, ((224, 224), (14, 14), 3)),
    ],
)
def test_input_spec_describes_the_images_that_the_backbone_accepts(name, settings, expected):
    model = timm.create_model(name, depth=1, num_classes=0, **settings)
    spec = backbones.input_spec(model)
    assert (spec.fixed_size, spec.multiple, spec.channels) == expected
    height, width = spec.fixed_size or (2 * spec.multiple[0], 3 * spec.multiple[1])
    maps = backbones.feature_maps(model, torch.zeros(1, spec.channels, height, width), [0])
    assert maps[0].shape[-2:] == (height // spec.multiple[0], width // spec.multiple[1])


def test_normalization_is_that_of_the_pretrained_weights():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    assert backbones.normalization(vit) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert backbones.normalization(build("vit"))[0] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("indices", [[0], [1, 3]])
def test_feature_maps_are_block_outputs_without_prefix_tokens_and_norm(indices):
    model, x = build("vit with registers"), images(1, 16, 40)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    maps = backbones.feature_maps(model, x, indices)
    for index, feature_map in zip(indices, maps, strict=True):
        assert feature_map.shape == (1, 32, 2, 5)
        assert torch.equal(feature_map.flatten(2).mT, outputs[index][:, 5:])
