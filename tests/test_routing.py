"""`rein.routed`: every image of a batch is refined by its own adapter, with the numbers of one pass per image."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import rein
from models import STAGED, build, images
from rein.errors import InputError, WrapError
from rein.testing import tiny_vit

CONFIGS = {
    "low rank": {},
    "full tokens": {"rank": None},
    "raw similarity": {"use_softmax": False},
    "raw similarity of full tokens": {"use_softmax": False, "rank": None},
    "separate MLPs": {"share": False},
    "separate MLPs with the raw similarity": {"share": False, "use_softmax": False},
    "one token": {"num_tokens": 1},
}
ROUTE = ["day", "night", "night", "dusk", "day"]


def routed_model(model=None, names=("day", "night", "dusk"), **settings):
    """A wrapped model with adapters that change the features measurably, each in another way."""
    model = build("vit") if model is None else model
    torch.manual_seed(5)
    for name in names:
        rein.wrap(model, rein.ReinConfig(**{"num_tokens": 6, "rank": 2, "query_dim": 8, **settings}), name=name)
        with torch.no_grad():
            for parameter in model.rein[name].parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def features(model, x):
    """The last feature map or tokens of a model."""
    found = model.forward_features(x)
    return found[-1] if isinstance(found, tuple | list) else found


def one_by_one(model, x, names):
    """The features of each image, from a pass of its own with its adapter alone."""
    found = []
    for image, name in zip(x, names, strict=True):
        with model.rein.active(name):
            found.append(features(model, image[None]))
    return torch.cat(found)


def assert_same_numbers(got, expected):
    """To 1e-6 of the largest number; products of a batch round differently from those of one image."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_image_has_the_numbers_of_its_own_adapter(config, grad):
    model, x = routed_model(**CONFIGS[config]), images(len(ROUTE))
    with torch.set_grad_enabled(grad):
        expected = one_by_one(model, x, ROUTE)
        with rein.routed(model, ROUTE):
            got = features(model, x)
        assert_same_numbers(got, expected)
        assert not torch.allclose(features(model, x), expected)  # outside, every image has the active adapter


@pytest.mark.parametrize("family", ["vit with registers", "eva02", "sam", "tnt", "xcit", "naflex", "dinov3"])
@pytest.mark.parametrize("grad", [False, True])
def test_families_with_other_outputs_are_routed(family, grad):
    model, x = routed_model(build(family)), images(len(ROUTE))
    with torch.set_grad_enabled(grad), rein.routed(model, ROUTE):
        got = features(model, x)
    with torch.no_grad():
        assert_same_numbers(got, one_by_one(model, x, ROUTE))


@pytest.mark.parametrize("family", ["SwinTransformer", "ConvMixer"])
@pytest.mark.parametrize("grad", [False, True])
def test_backbones_with_stages_and_feature_maps_are_routed(family, grad):
    model, x = routed_model(STAGED[family]().eval()), images(len(ROUTE), 64, 128)
    with torch.set_grad_enabled(grad), rein.routed(model, ROUTE):
        got = features(model, x)
    with torch.no_grad():
        assert_same_numbers(got, one_by_one(model, x, ROUTE))


def test_adapters_of_different_scale_and_sharing_are_in_one_batch():
    model = routed_model(names=("day",))
    routed_model(model, names=("night",), share=False)
    routed_model(model, names=("dusk",), zero_init=True, query_dim=None)
    x = images(len(ROUTE))
    with torch.no_grad(), rein.routed(model, ROUTE):
        got = features(model, x)
    assert_same_numbers(got, one_by_one(model, x, ROUTE))


def test_one_adapter_for_all_images_has_the_bits_of_the_active_one():
    model, x = routed_model(), images(3)
    with torch.no_grad():
        model.rein.activate("night")
        expected = features(model, x)
        model.rein.activate("day")
        with rein.routed(model, ["night"] * 3):
            assert torch.equal(features(model, x), expected)


def test_gradients_are_those_of_one_pass_per_image():
    model, x = routed_model(), images(len(ROUTE))
    twin = copy.deepcopy(model)
    with rein.routed(model, ROUTE):
        features(model, x).square().sum().backward()
    one_by_one(twin, x, ROUTE).square().sum().backward()
    for (name, parameter), other in zip(model.rein.named_parameters(), twin.rein.parameters(), strict=True):
        if parameter.grad is None:
            assert other.grad is None
            assert "query" in name
        else:  # float32 sums over images and tokens in another order
            assert torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-5 * other.grad.abs().max().item()), name


def test_checkpointed_blocks_have_the_same_gradients_inside_the_context():
    model, x = routed_model(), images(len(ROUTE))
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for each in (model, twin):
        with rein.routed(each.train(), ROUTE):
            features(each, x).square().sum().backward()
    for one, other in zip(model.rein.parameters(), twin.rein.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


def test_the_loss_of_a_segmenter_trains_the_adapters_of_the_batch_only():
    model = routed_model()
    segmenter = rein.Segmenter(model, rein.heads.LinearHead([32], num_classes=2), indices=[3])
    with rein.routed(model, ["day", "night"]):
        segmenter(images(), torch.zeros(2, 32, 32, dtype=torch.long)).backward()
    trained = {name for name in model.rein if any(p.grad is not None for p in model.rein[name].parameters())}
    assert trained == {"day", "night"}
    assert all(parameter.grad is not None for name in trained for parameter in model.rein[name].parameters())


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch.func.jvp scripts its decompositions
def test_function_transforms_of_routed_tokens_work():
    model, tokens, direction = routed_model(), *torch.randn(2, 2, 9, 32)
    with rein.routed(model, ["day", "night"]):
        _, tangent = torch.func.jvp(lambda x: model.rein(x, 1, 1), (tokens,), (direction,))
        gradient = torch.func.grad(lambda x: model.rein(x, 1, 1).square().sum())(tokens)
    for index, name in enumerate(["day", "night"]):
        one, single = slice(index, index + 1), model.rein[name]
        expected = torch.func.jvp(lambda x: single(x, 1, 1), (tokens[one],), (direction[one],))[1]  # noqa: B023
        assert_same_numbers(tangent[one], expected)
        assert_same_numbers(gradient[one], torch.func.grad(lambda x: single(x, 1, 1).square().sum())(tokens[one]))  # noqa: B023


def test_a_changed_parameter_is_used_in_the_next_pass():
    model, x = routed_model(), images(len(ROUTE))
    with torch.no_grad(), rein.routed(model, ROUTE):
        features(model, x)
        model.rein["night"].scale.data.fill_(2.0)  # torch does not count this change
        got = features(model, x)
    assert_same_numbers(got, one_by_one(model, x, ROUTE))


@pytest.mark.parametrize("config", ["low rank", "raw similarity"])
def test_autocast_rounds_the_products_and_not_the_residual(config):
    model, x = routed_model(**CONFIGS[config]), images(len(ROUTE))
    tokens = torch.randn(len(ROUTE), 17, 32) * 100
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([model.rein[name](tokens[i : i + 1], 1, 1) for i, name in enumerate(ROUTE)])
        with rein.routed(model, ROUTE):
            got = model.rein(tokens, 1, 1)
            assert features(model, x).isfinite().all()
    assert got.dtype == tokens.dtype
    assert torch.equal(got[:, 0], tokens[:, 0])
    assert torch.allclose(got, expected, rtol=1e-2, atol=1e-2)


def test_a_half_precision_backbone_is_routed():
    model, x = routed_model().bfloat16(), images(len(ROUTE)).bfloat16()
    with torch.no_grad(), rein.routed(model, ROUTE):
        got = features(model, x)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), one_by_one(model, x, ROUTE).float(), rtol=0.1, atol=0.1)


def test_outputs_may_be_changed_in_place():
    model, x = routed_model(), images(len(ROUTE))
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: output.mul_(1.0))
    for grad in (False, True):
        with torch.set_grad_enabled(grad), rein.routed(model, ROUTE):
            features(model, x)


def test_a_token_that_is_not_finite_stays_in_its_image_and_a_prefix_passes_through():
    model = routed_model(names=("day", "night"))
    tokens = torch.randn(2, 5, 32)
    tokens[0, 0] = float("nan")  # a prefix token
    tokens[0, 1] = float("inf")
    with torch.no_grad(), rein.routed(model, ["day", "night"]):
        got = model.rein(tokens, 0, 1)
    assert got[0, 0].isnan().all()
    assert got[0, 2:].isfinite().all()
    assert got[1].isfinite().all()


def test_compiled_code_serves_other_routes_and_single_adapters():
    model, x = routed_model(tiny_vit()), images(4)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for route in (["day", "day", "night", "night"], ["night", "day", "night", "day"], ["dusk", "day", "day", "day"]):
            expected = torch.cat([_alone(model, x[i : i + 1], name) for i, name in enumerate(route)])
            with rein.routed(model, route):
                assert torch.allclose(compiled(x), expected, atol=1e-5)
        assert counter.frame_count == 1
        assert torch.allclose(compiled(x), _alone(model, x, "day"), atol=1e-5)


def _alone(model, x, name):
    with model.rein.active(name):
        return model(x)


def test_the_context_ends_with_an_error_and_may_be_nested():
    model, x = routed_model(), images(2)
    expected = model(x)
    with rein.routed(model, ["night", "dusk"]):
        with rein.routed(model, ["day", "day"]):
            assert torch.equal(model(x), expected)
        assert not torch.allclose(model(x), expected)
        with pytest.raises(InputError), rein.routed(model, ["day", "day"]):
            model(images(3))
        assert not torch.allclose(model(x), expected)
    assert torch.equal(model(x), expected)
    assert model.rein.in_use == (model.rein["day"],)


def test_disabled_is_bare_inside_the_context():
    bare, model, x = build("vit"), routed_model(), images(2)
    with rein.routed(model, ["day", "night"]), rein.disabled(model):
        assert torch.equal(model(x), bare(x))


def test_switching_and_deleting_inside_the_context_are_refused():
    model = routed_model()
    with rein.routed(model, ["day", "night"]):
        with pytest.raises(WrapError, match="activate was called inside rein.routed"):
            model.rein.activate("night")
        with pytest.raises(WrapError, match="delete was called inside rein.routed"):
            model.rein.delete("night")
        with pytest.raises(WrapError, match="each image has the queries of its own adapter"):
            model.rein.queries()


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([], r"names is \[\]; expected the name"),
        ("day", "names is 'day'; expected the name of an adapter for each image"),
        (3, "names is 3; expected the name"),
        ({"day"}, "names is .*; expected the name"),
        (["day", "dawn"], "no adapter is named 'dawn'; this model has 'day', 'night', 'dusk'"),
        (["day", None], "no adapter is named None"),
        (["day", ["night"]], r"no adapter is named \['night'\]"),
    ],
)
def test_wrong_names_are_refused(names, match):
    with pytest.raises(InputError, match=match), rein.routed(routed_model(), names):
        pass


def test_a_batch_of_another_size_is_refused():
    model = routed_model()
    for names in (["day", "night"], ["day", "day"]):
        with rein.routed(model, names), pytest.raises(InputError, match="the batch has 3 images, rein.routed got 2 names"):
            model(images(3))


def test_adapters_of_other_shapes_are_refused():
    model = routed_model()
    routed_model(model, names=("wide",), rank=4)
    match = "'day' has num_tokens=6, rank=2.*'wide' has num_tokens=6, rank=4.*batch of its own"
    with pytest.raises(InputError, match=match), rein.routed(model, ["day", "wide"]):
        pass
    with rein.routed(model, ["wide", "wide"]):
        model(images())


def test_a_model_without_named_adapters_is_refused():
    match = "one adapter without a name; rein.routed expects named ones"
    with pytest.raises(InputError, match=match), rein.routed(rein.wrap(build("vit")), ["day"]):
        pass
    with pytest.raises(WrapError, match="is not wrapped"), rein.routed(build("vit"), ["day"]):
        pass


@pytest.mark.parametrize("settings", [{"zero_init": True}, {}])
def test_a_pass_that_ended_early_leaves_nothing_for_the_next_one(settings):
    model, x = routed_model(names=("day", "night"), **settings), images(2)
    with torch.no_grad(), rein.routed(model, ["day", "night"]):
        model.forward_intermediates(x, indices=[1], intermediates_only=True, stop_early=True)
        for parameter in model.rein.parameters():
            parameter.mul_(1.5)
        found = features(model, x)
    with torch.no_grad():
        expected = one_by_one(model, x, ["day", "night"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_several_windows_in_a_pass_and_unwrap_are_refused_inside_the_context():
    model = routed_model(names=("day", "night"))
    segmenter = rein.Segmenter(model, rein.heads.LinearHead([32] * 4, 2))
    with rein.routed(model, ["day", "night"]):
        with pytest.raises(InputError, match="window_batch is 2 inside rein.routed"):
            segmenter.predict(images(1), window=16, stride=16, window_batch=2)
        with pytest.raises(WrapError, match="unwrap was called inside rein.routed"):
            rein.unwrap(model)
    rein.unwrap(model)
