"""The public contract, `rein.testing.check_backbone`, for every class of timm that rein knows."""

import warnings

import pytest
import timm
import torch

import rein
from models import FAMILIES, STAGED, build, images
from rein import backbones
from rein.backbones import families
from rein.testing import check_backbone

ALL = {"same object", "features", "prefix rows", "gradients", "frozen", "disabled", "unwrap", "deepcopy", "save and load"}
ALL |= {"inference mode", "channels last", "checkpointing", "compile"}
CANNOT = {  # what the bare classes themselves cannot do
    "checkpointing": {"convit", "CoaT", "CrossVit", "PoolingVisionTransformer", "SENet", "Sequencer2d", "Twins"},
    "compile": {"CPUBone"},
}
# compiling takes most of the time: one for each layout and each kind of output, others in test_injection
COMPILED = {"ConvNeXt", "SwinTransformer", "HieraDet", "CrossVit", "TinyVit", "beit", "cait", "dinov3", "qwen3", "convit"}
LAYOUTS = {  # of the first and of the last block: layout, width, prefix rows
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
BUILDERS = {**FAMILIES, **STAGED}


def an_image(model):
    spec = backbones.input_spec(model)
    return images(1, *(spec.fixed_size or (2 * spec.multiple[0], 3 * spec.multiple[1])))


def make(family):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        return BUILDERS[family]()


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.filterwarnings("ignore")
def test_every_promise_holds(family):
    model = make(family)
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    checked = check_backbone(model, an_image(model), compile=family in COMPILED)
    wanted = ALL - {promise for promise, cannot in CANNOT.items() if family in cannot}
    assert set(checked) == wanted - (set() if family in COMPILED else {"compile"})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("family", STAGED)
def test_sites_are_the_stages_blocks_and_queries_are_summed(family):
    model = make(family)
    sites = backbones.find_sites(model)
    assert all(any(True for _ in model.get_submodule(site.path).parameters()) for site in sites)
    if family in LAYOUTS:
        ends = [(site.layout, site.width, site.num_prefix_tokens) for site in (sites[0], sites[-1])]
        assert tuple(ends) == LAYOUTS[family]
    rein.wrap(model, rein.ReinConfig(num_tokens=5, query_dim=8))
    stages = getattr(model.rein, "stages", [model.rein])
    assert sum(stage.num_layers for stage in stages) == len(sites)
    assert [site.width for site in sites] == list(model.rein.widths)
    assert torch.allclose(model.rein.queries(), sum(stage.queries() for stage in stages), atol=1e-6)


def test_every_known_class_is_tried():
    columnar = {type(make(family)).__name__ for family in FAMILIES} | {"VisionTransformerDistilled", "VisionTransformer"}
    known = set(families._FAMILIES)
    encoders = {"Qwen3VitEncoder", "DeepseekVitEncoder", "Gemma4VitEncoder", "MobileNetV5Encoder"}  # the classifiers' own parts
    encoders |= {"EfficientNetFeatures", "MobileNetV3Features"}  # tried as features_only
    assert known - encoders <= columnar | set(STAGED)


def test_all_blocks_of_every_stage_are_found():
    swin = make("SwinTransformer")
    paths = [site.path for site in backbones.find_sites(swin)]
    assert paths == ["layers.0.blocks.0", "layers.1.blocks.0", "layers.2.blocks.0", "layers.2.blocks.1", "layers.3.blocks.0"]
    volo = {site.path.rpartition(".")[0] for site in backbones.find_sites(make("VOLO"))}
    assert volo == {"network.0", "network.2", "network.3", "network.4"}  # no downsampling, no class blocks
    efficientformer = backbones.find_sites(make("EfficientFormer"))
    assert len(efficientformer) == 5  # not the reshape that stands among its blocks


def test_a_staged_backbone_carries_a_segmenter():
    convnext = rein.wrap(make("ConvNeXt"), rein.ReinConfig(num_tokens=5))
    head = rein.heads.FPNHead(backbones.map_channels(convnext), num_classes=3, channels=8, tower_channels=8)
    model = rein.Segmenter(convnext, head)
    assert model(images(1, 50, 70)).shape == (1, 3, 50, 70)
    model.loss(images(1, 50, 70), torch.zeros(1, 50, 70, dtype=torch.long)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_adapter_of_a_stage_sees_maps_as_tokens():
    bare, model = make("ResNet").eval(), rein.wrap(make("ResNet").eval(), rein.ReinConfig(num_tokens=5, scale_init=0.5))
    x, found = images(1, 64, 96), {}
    for name, each in (("bare", bare), ("wrapped", model)):
        each.layer1[0].register_forward_hook(lambda module, args, output, name=name: found.update({name: output}))
    with torch.no_grad():
        bare(x), model(x)
        expected = model.rein(found["bare"].flatten(2).mT, 0).mT.reshape(found["bare"].shape)
    assert torch.allclose(found["wrapped"], expected, atol=1e-6)


def test_parameter_counts_follow_the_formula_stage_by_stage():
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
def test_features_only_models_are_wrapped_as_they_are(name):
    settings = {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1)} if name.startswith("swin") else {}
    whole = timm.create_model(name, **settings)
    model = timm.create_model(name, features_only=True, **settings)
    kept = [site.width for site in backbones.find_sites(model)]
    assert kept == [site.width for site in backbones.find_sites(whole)][: len(kept)]
    assert len(kept) >= 4
    x = an_image(model)
    bare = [feature.clone() for feature in model.eval()(x)]
    rein.wrap(model, rein.ReinConfig(num_tokens=5, scale_init=0.5))
    refined = model(x)
    changed = [not torch.allclose(a, b) for a, b in zip(refined, bare, strict=True)]
    assert changed[-1]
    assert all(changed[1:])  # the first may lie before the first block
    check_backbone(timm.create_model(name, features_only=True, **settings), x, compile=False)


def test_features_only_that_prunes_blocks_gets_an_adapter_for_those_that_are_left():
    model = rein.wrap(timm.create_model("test_vit", features_only=True, out_indices=[0, 2]))
    assert len(model.model.blocks) == model.rein.num_layers == 3


def test_a_grid_as_large_as_the_width_is_not_mistaken_for_it():
    """24 channels on a grid of 24 x 24: where images of two sizes can tell them apart they do, where not it is said."""
    model = timm.create_model("test_convnext", num_classes=0)
    model.pretrained_cfg["input_size"] = (3, 96, 96)
    assert backbones.find_sites(model)[0].width == 24
    settings = {"img_size": 96, "window_size": 6, "embed_dim": 24, "depths": (1,) * 4, "num_heads": (1,) * 4}
    with pytest.raises(rein.UnsupportedBackboneError, match=r"\(3, 24, 24, 24\).*whose channels it can tell"):
        backbones.find_sites(timm.create_model("swinv2_tiny_window8_256", **settings))


def test_two_backbones_in_one_model_are_not_guessed_at():
    pair = torch.nn.ModuleDict({"left": build("vit"), "right": build("vit")})
    with pytest.raises(rein.UnsupportedBackboneError, match="holds 2 backbones, 'left', 'right'; wrap one of them"):
        rein.wrap(pair)
