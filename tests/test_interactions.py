"""Wrapped models used with the tools of timm and torch."""

import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import rein
from models import amplify_adapter, build, images

SMALL = rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)


def adapter_of(model):
    return {name: value.clone() for name, value in model.rein.state_dict().items()}


@pytest.mark.parametrize("family", ["vit", "eva02", "beit", "cait", "xcit", "tnt"])
def test_initialising_the_backbone_again_does_not_change_the_adapter(family):
    model = rein.wrap(build(family), SMALL)
    before, backbone = adapter_of(model), model.blocks[0].state_dict()
    backbone = {key: value.clone() for key, value in backbone.items()}
    if hasattr(model, "init_weights"):
        model.init_weights()
    if hasattr(model, "_init_weights"):
        model.apply(model._init_weights)
    assert all(torch.equal(value, before[key]) for key, value in model.rein.state_dict().items())
    assert any(not torch.equal(value, backbone[key]) for key, value in model.blocks[0].state_dict().items())


@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_timms_optimizers_do_not_decay_the_tokens(layer_decay):
    model = rein.wrap(timm.create_model("test_vit"), SMALL)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    scale = {id(p): group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.rein.named_parameters():
        no_decay = name in ("tokens_a", "tokens_b", "scale") or parameter.ndim == 1  # timm does not decay biases
        assert decay[id(parameter)] == (0.0 if no_decay else 0.05), name
        assert scale[id(parameter)] == 1.0, name
    assert len(decay) == len(list(model.rein.parameters()))
    assert {"pos_embed", "cls_token"} <= set(model.no_weight_decay())  # the names from timm are still included
    rein.unwrap(model)
    assert "no_weight_decay" not in vars(model)
    assert not any(name.startswith("rein") for name in model.no_weight_decay())


def test_a_users_no_weight_decay_is_extended_and_restored():
    model = build("vit")
    model.no_weight_decay = users_method = lambda: {"norm.weight"}
    rein.wrap(model, SMALL)
    assert model.no_weight_decay() == {"norm.weight", "rein.tokens_a", "rein.tokens_b", "rein.scale"}
    rein.unwrap(model)
    assert model.no_weight_decay is users_method


def test_a_model_stays_frozen_and_refined_after_a_change_of_input_size():
    model, bare = amplify_adapter(rein.wrap(build("vit"), SMALL)), build("vit")
    for each in (model, bare):
        each.set_input_size((64, 32))
    x = images(1, 64, 32)
    assert not torch.allclose(model(x), bare(x))
    groups = rein.param_groups(model)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.rein.parameters()}
    model.train()
    assert [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("rein.")] == []
    model.pos_embed.requires_grad_(True)  # unfreezing on purpose works
    model.train()
    assert model.pos_embed.requires_grad


@pytest.mark.filterwarnings("ignore")  # timm warns
def test_a_model_stays_frozen_after_a_change_of_window_size():
    settings = {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
    model = rein.wrap(timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **settings), SMALL)
    model.set_input_size((128, 128), window_size=8)
    model.train()
    assert model(images(1, 128, 128)).shape == (1, 192)
    assert [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("rein.")] == []


def test_a_new_classifier_trains_and_the_backbone_does_not():
    model = rein.wrap(timm.create_model("test_vit", num_classes=10), SMALL)
    model.reset_classifier(3)
    model.train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("rein.")}
    assert trainable == {"head.weight", "head.bias"}
    assert model.head.training
    assert {id(model.head.weight), id(model.head.bias)} < {id(p) for g in rein.param_groups(model) for p in g["params"]}


def test_images_of_different_sizes_are_refined():
    model, bare = amplify_adapter(rein.wrap(build("dinov3"), SMALL)), build("dinov3")
    for size in ((32, 32), (16, 64), (40, 24)):
        x = images(1, *size)
        assert not torch.allclose(model(x), bare(x))
        assert model(x).shape == bare(x).shape


@pytest.mark.parametrize("family", ["vit with patch dropout", "eva with dropout"])
def test_dropped_patches_are_refined_without_a_grid(family):
    model = amplify_adapter(rein.wrap(build(family), SMALL))
    model.patch_drop.training = True  # as a user may do
    out = model.forward_features(images())
    assert out.shape[1] == 1 + 8
    out.square().mean().backward()
    assert (model.rein.tokens_a.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", ["xcit_nano_12_p8_224", "test_resnet"])
def test_batch_norm_statistics_of_a_frozen_backbone_do_not_change(name):
    model = amplify_adapter(rein.wrap(timm.create_model(name, num_classes=0), SMALL)).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert norms
    before = [(norm.running_mean.clone(), norm.num_batches_tracked.clone()) for norm in norms]
    model(images(2, 64, 64)).sum().backward()
    for norm, (mean, count) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert torch.equal(norm.num_batches_tracked, count)


def test_pruning_reduces_the_layers_before_wrapping_and_keeps_features_after():
    model = build("vit")
    model.prune_intermediate_layers([1], prune_norm=True)
    assert rein.wrap(model, SMALL).rein.num_layers == 2
    model = amplify_adapter(rein.wrap(build("vit"), SMALL))
    expected = model.forward_intermediates(images(), indices=[1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    assert torch.equal(model.forward_intermediates(images(), indices=[1], intermediates_only=True)[0], expected)


def test_channels_last_and_inference_mode_give_the_same_numbers():
    model = amplify_adapter(rein.wrap(timm.create_model("test_convnext", num_classes=0).eval(), SMALL))
    x = images(2, 64, 96)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_compiled_models_of_one_class_do_not_share_a_graph(first):
    """torch.compile caches graphs by class, and its guards ignore hooks."""
    torch._dynamo.reset()
    bare, others = build("vit").requires_grad_(False).eval(), []
    for config in (SMALL, SMALL, rein.ReinConfig(num_tokens=6, rank=2, query_dim=8, use_softmax=False)):
        others.append(amplify_adapter(rein.wrap(copy.deepcopy(bare), config)).eval())
    models, x = [bare, *others], images()
    with torch.no_grad():
        for model in models[first:] + models[:first]:
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
            assert model is bare or not torch.allclose(compiled(x), bare(x), atol=1e-3)


def test_unwrapping_leaves_nothing_on_the_blocks():
    model = build("vit")
    before = [set(vars(module)) for module in model.modules()]
    rein.unwrap(rein.wrap(model, SMALL))
    assert [set(vars(module)) for module in model.modules()] == before
    rein.wrap(model, SMALL)
    model.blocks[0].forward = lambda x: x  # replaced by the user after wrap
    rein.unwrap(model)
    assert model.blocks[0].forward(3) == 3


class Caching(nn.Linear):
    """Computes something once in eval mode, and forgets it in `train`, as some attention layers of timm do."""

    cache = None

    def train(self, mode=True):
        super().train(mode)
        self.cache = None
        return self

    def forward(self, x):
        if self.training:
            return super().forward(x)
        self.cache = self.weight.detach().clone() if self.cache is None else self.cache
        return nn.functional.linear(x, self.cache, self.bias)


@pytest.mark.parametrize("use", ["disabled", "unwrap"])
def test_a_mode_is_restored_through_the_train_method_of_the_module(use):
    model, x = build("vit").train(), images()
    model.blocks[0].mlp.fc1 = Caching(32, 128)
    rein.wrap(model, SMALL).train()
    model.attached = Caching(32, 2)
    if use == "disabled":
        with rein.disabled(model):
            model.eval()
            model.attached(model(x))
            assert model.attached.cache is not None
    else:
        model(x)
        assert model.blocks[0].mlp.fc1.cache is not None
        rein.unwrap(model)
        assert model.blocks[0].mlp.fc1.training
        assert model.blocks[0].mlp.fc1.cache is None
    assert model.attached.training
    assert model.attached.cache is None


class Net(nn.Module):
    """A backbone that rein does not know, and a decoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.stem = nn.Conv2d(3, 16, 8, 8)
        self.encoder.stages = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)))
        self.decoder = nn.Sequential(nn.Conv2d(16, 2, 1), nn.Dropout())

    def forward(self, x):
        return self.decoder(self.encoder.stages(self.encoder.stem(x)))


def test_only_the_encoder_is_frozen_where_the_blocks_of_a_net_are_given():
    net = Net().train()
    rein.wrap(net, SMALL, blocks=list(net.encoder.stages)).train()
    trains = {name.partition(".")[0] for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trains == {"decoder", "rein"}
    assert (net.encoder.stem.training, net.decoder[1].training) == (False, True)
    assert rein.summary(net).frozen == ("encoder",)


class Flat(nn.Module):
    """A backbone whose blocks stand beside its other parts."""

    def __init__(self, first):
        super().__init__()
        if first == "stem":
            self.stem = nn.Conv2d(3, 16, 8, 8)
            self.encoder = nn.Sequential(nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))), nn.BatchNorm2d(16))
        else:
            self.encoder = nn.Sequential(nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))))
            self.stem = nn.Conv2d(3, 16, 8, 8)

    def forward(self, x):
        return self.encoder(self.stem(x))


@pytest.mark.parametrize("first", ["stem", "blocks"])
def test_everything_is_frozen_where_the_blocks_stand_beside_the_other_parts(first):
    net = Flat(first)
    rein.wrap(net, SMALL, blocks=list(net.encoder[0]))
    assert {name.partition(".")[0] for name, parameter in net.named_parameters() if parameter.requires_grad} == {"rein"}
