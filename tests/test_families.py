"""`rein.testing.check_backbone` on every class of timm that rein knows."""

import warnings

import pytest
import timm
import torch

import rein
from models import FAMILIES, STAGED, build, images
from rein import backbones
from rein.backbones import families
from rein.testing import check_backbone
from snapshots import assert_unchanged, snapshot

ALL = {"same object", "features", "prefix rows", "gradients", "frozen", "disabled", "unwrap", "deepcopy", "save and load"}
ALL |= {"in place", "inference mode", "channels last", "checkpointing", "compile"}
UNSUPPORTED = {  # checks that the bare models themselves do not support
    "checkpointing": {"convit", "CoaT", "CrossVit", "PoolingVisionTransformer", "SENet", "Sequencer2d", "Twins"},
    "compile": {"CPUBone"},
}
# compiling takes most of the time: one family for each layout and each kind of output; test_injection compiles others
COMPILED = {"ConvNeXt", "SwinTransformer", "HieraDet", "CrossVit", "TinyVit", "beit", "cait", "dinov3", "qwen3", "convit"}
LAYOUTS = {  # (layout, width, number of prefix tokens) of the first and the last block
    "CoaT": (("NLC", 64, 1), ("NLC", 320, 1)),
    "CrossVit": (("NLC", 24, 1), ("NLC", 48, 1)),
    "ConvNeXt": (("NCHW", 24, 0), ("NCHW", 64, 0)),
    "Hiera": (("NLC", 24, 0), ("NLC", 192, 0)),
    "HieraDet": (("NHWC", 24, 0), ("NHWC", 192, 0)),
    "MetaFormer": (("NCHW", 64, 0), ("NLC", 512, 0)),
    "MultiScaleVit": (("NLC", 96, 0), ("NLC", 768, 0)),
    "Nest": (("NHWC", 24, 0), ("NHWC", 64, 0)),
    "PoolingVisionTransformer": (("NLC", 24, 1), ("NLC", 48, 1)),
    "SwinTransformer": (("NHWC", 24, 0), ("NHWC", 192, 0)),
    "TinyVit": (("NCHW", 24, 0), ("NHWC", 96, 0)),
    "VOLO": (("NHWC", 192, 0), ("NHWC", 384, 0)),
}
NEED_TORCH_2_14 = {"CoaT", "CrossVit", "EfficientVit", "EfficientVitLarge", "Visformer"}  # autocast and others on meta tensors
BUILDERS = {**FAMILIES, **STAGED}
# the slowest, all convolutional or staged, of which the ordinary run has others; `make test-backbones` has all
SWEEP = {
    "MobileNetV5",
    "Sequencer2d",
    "RepVit",
    "NextViT",
    "RepGhostNet",
    "IFormer",
    "LowFormer",
    "GlobalContextVit",
    "SHViT",
    "GhostNet",
}
SWEEP |= {
    "EfficientVitMsra",
    "HighPerfGpuNet",
    "EfficientVit",
    "SwiftFormer",
    "MobileNetV3",
    "RegNet",
    "VovNet",
    "LCNetV2",
    "VOLO",
}
SWEEP |= {"CPUBone", "DaVit", "EfficientFormerV2", "EfficientVitLarge", "FastVit", "MetaFormer", "MultiScaleVit", "TinyVit"}
every_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.sweep) if name in SWEEP else name for name in BUILDERS]
)


def example_image(model):
    spec = backbones.input_spec(model)
    return images(1, *(spec.fixed_size or (2 * spec.multiple[0], 3 * spec.multiple[1])))


def make(family):
    if family in NEED_TORCH_2_14 and torch.__version__ < "2.14":
        pytest.skip("this torch cannot measure the class on meta tensors")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm warns
        try:
            return BUILDERS[family]()
        except RuntimeError as error:
            if str(error).startswith("Unknown model"):
                pytest.skip(f"{error}: this timm does not have it")
            raise


@every_family
@pytest.mark.filterwarnings("ignore")
def test_every_check_passes_and_leaves_the_model_unchanged(family):
    model = make(family)
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    checked = check_backbone(model, example_image(model), compile=family in COMPILED)
    expected = ALL - {check for check, unsupported in UNSUPPORTED.items() if family in unsupported}
    assert set(checked) == expected - (set() if family in COMPILED else {"compile"})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


@every_family
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_as_before_after_wrap_a_training_step_and_unwrap(family):
    model = make(family)
    x = example_image(model)
    with torch.no_grad():
        model.eval()(x)  # some models cache tensors in their first pass
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    rein.wrap(model, rein.ReinConfig(num_tokens=5, rank=2, query_dim=8)).train()
    optimizer = torch.optim.AdamW(rein.param_groups(model), lr=0.1)
    outputs = []
    handles = [
        model.get_submodule(block.path).register_forward_hook(
            lambda module, args, output, block=block: outputs.append(backbones.get_tokens(output, block))
        )
        for block in model.rein_injection.blocks
    ]
    model(x)
    (sum(output.square().mean() for output in outputs) + model.rein.queries().square().mean()).backward()
    tokens = [parameter.clone() for parameter in model.rein.parameters()]
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(tokens, model.rein.parameters(), strict=True))
    for handle in handles:
        handle.remove()
    rein.unwrap(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("family", STAGED)
def test_found_blocks_are_those_of_the_stages_and_queries_are_summed(family):
    model = make(family)
    blocks = backbones.find_blocks(model)
    assert all(any(True for _ in model.get_submodule(block.path).parameters()) for block in blocks)
    if family in LAYOUTS:
        ends = [(block.layout, block.width, block.num_prefix_tokens) for block in (blocks[0], blocks[-1])]
        assert tuple(ends) == LAYOUTS[family]
    rein.wrap(model, rein.ReinConfig(num_tokens=5, query_dim=8))
    stages = getattr(model.rein, "stages", [model.rein])
    assert sum(stage.num_layers for stage in stages) == len(blocks)
    assert [block.width for block in blocks] == list(model.rein.widths)
    assert torch.allclose(model.rein.queries(), sum(stage.queries() for stage in stages), atol=1e-6)


def test_every_known_class_is_tested():
    if not hasattr(timm.models, "Gemma4VitClassifier"):
        pytest.skip("this timm does not have all of the classes")
    isotropic = {type(make(family)).__name__ for family in FAMILIES} | {"VisionTransformerDistilled", "VisionTransformer"}
    known = set(families._FAMILY_OF_CLASS)
    encoders = {
        "Qwen3VitEncoder",
        "DeepseekVitEncoder",
        "Gemma4VitEncoder",
        "MobileNetV5Encoder",
    }  # tested as part of the classifiers
    encoders |= {"EfficientNetFeatures", "MobileNetV3Features"}  # tested with features_only
    assert known - encoders <= isotropic | set(STAGED)


def test_all_blocks_of_every_stage_are_found():
    swin = make("SwinTransformer")
    paths = [block.path for block in backbones.find_blocks(swin)]
    assert paths == ["layers.0.blocks.0", "layers.1.blocks.0", "layers.2.blocks.0", "layers.2.blocks.1", "layers.3.blocks.0"]
    volo = {block.path.rpartition(".")[0] for block in backbones.find_blocks(make("VOLO"))}
    assert volo == {"network.0", "network.2", "network.3", "network.4"}  # without downsampling and class blocks
    efficientformer = backbones.find_blocks(make("EfficientFormer"))
    assert len(efficientformer) == 5  # without the reshape between its blocks


def test_a_segmenter_trains_on_a_backbone_with_stages():
    convnext = rein.wrap(make("ConvNeXt"), rein.ReinConfig(num_tokens=5))
    head = rein.heads.FPNHead(backbones.map_channels(convnext), num_classes=3, channels=8, tower_channels=8)
    model = rein.Segmenter(convnext, head)
    assert model(images(1, 50, 70)).shape == (1, 3, 50, 70)
    model(images(1, 50, 70), torch.zeros(1, 50, 70, dtype=torch.long)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_feature_map_is_refined_as_tokens():
    bare, model = make("ResNet").eval(), rein.wrap(make("ResNet").eval(), rein.ReinConfig(num_tokens=5, scale_init=0.5))
    x, found = images(1, 64, 96), {}
    for name, each in (("bare", bare), ("wrapped", model)):
        each.layer1[0].register_forward_hook(lambda module, args, output, name=name: found.update({name: output}))
    with torch.no_grad():
        bare(x), model(x)
        expected = model.rein(found["bare"].flatten(2).mT, 0).mT.reshape(found["bare"].shape)
    assert torch.allclose(found["wrapped"], expected, atol=1e-6)


def test_the_parameter_count_of_every_stage_follows_the_formula():
    model = rein.wrap(make("ConvNeXt"))
    m, r, q = 100, 16, 256
    expected = 0
    depths = [len(stage.blocks) for stage in model.stages]
    for width, layers in zip((info["num_chs"] for info in model.feature_info), depths, strict=True):
        expected += layers * r * (m + width) + 2 * (width**2 + width) + (width * q + q) + (3 * q * q + q) + 1
    assert rein.summary(model).adapter_parameters == expected


@pytest.mark.parametrize(
    "name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet", "swin_tiny_patch4_window7_224"]
)
def test_features_only_models_can_be_wrapped(name):
    settings = {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1)} if name.startswith("swin") else {}
    whole = timm.create_model(name, **settings)
    model = timm.create_model(name, features_only=True, **settings)
    widths = [block.width for block in backbones.find_blocks(model)]
    assert widths == [block.width for block in backbones.find_blocks(whole)][: len(widths)]
    assert len(widths) >= 4
    x = example_image(model)
    bare = [feature.clone() for feature in model.eval()(x)]
    rein.wrap(model, rein.ReinConfig(num_tokens=5, scale_init=0.5))
    refined = model(x)
    changed = [not torch.allclose(a, b) for a, b in zip(refined, bare, strict=True)]
    assert changed[-1]
    assert all(changed[1:])  # the first feature may come from before the first block
    check_backbone(timm.create_model(name, features_only=True, **settings), x, compile=False)


def test_a_pruned_features_only_model_gets_one_layer_per_remaining_block():
    model = rein.wrap(timm.create_model("test_vit", features_only=True, out_indices=[0, 2]))
    assert len(model.model.blocks) == model.rein.num_layers == 3


def test_a_grid_as_large_as_the_width_is_measured_with_two_sizes_or_refused():
    """24 channels on a 24 x 24 grid: a second image size shows which axis is which; a model of a fixed size is refused."""
    model = timm.create_model("test_convnext", num_classes=0)
    model.pretrained_cfg["input_size"] = (3, 96, 96)
    assert backbones.find_blocks(model)[0].width == 24
    settings = {"img_size": 96, "window_size": 6, "embed_dim": 24, "depths": (1,) * 4, "num_heads": (1,) * 4}
    with pytest.raises(rein.UnsupportedBackboneError, match=r"\(3, 24, 24, 24\).*with more or fewer channels than rows"):
        backbones.find_blocks(timm.create_model("swinv2_tiny_window8_256", **settings))


def test_a_model_with_two_backbones_is_refused():
    pair = torch.nn.ModuleDict({"left": build("vit"), "right": build("vit")})
    with pytest.raises(rein.UnsupportedBackboneError, match="holds 2 backbones, 'left', 'right'; expected one. Wrap one of them"):
        rein.wrap(pair)
