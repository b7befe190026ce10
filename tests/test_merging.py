"""`rein.merge`: one adapter whose updates are the weighted sum of others', or a refusal with the reason."""

import copy
from itertools import groupby

import pytest
import torch

import rein
from models import STAGED, build, images
from rein import checkpoint
from rein.errors import CheckpointError, InputError
from rein.testing import tiny_vit

SMALL = {"num_tokens": 6, "rank": 2, "query_dim": 8}
WEIGHTS = [0.7, -0.4, 1.5]


def randomise(adapter, *parts, keep=0.0):
    """New values for the parameters whose names contain one of `parts`, plus `keep` times the values before.

    W_f is far from singular, so that the rounding of another version of torch does not decide whether a mixture exists.
    """
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if any(part in name for part in parts):
                new = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5 if parameter.ndim else torch.rand(())
                if "delta_mlp" in name and parameter.ndim == 2:
                    new = new + 3 * torch.eye(len(new))
                parameter.copy_((1 - keep) * new + keep * parameter)
    return adapter


@pytest.fixture
def write(tmp_path):
    """Write a file for each adapter: copies of one random adapter with new values of the parameters named by `parts`."""

    def write(*parts, model=None, configs=None, count=3):
        torch.manual_seed(7)
        configs = configs or [rein.ReinConfig(**SMALL)] * count
        model = build("vit") if model is None else model
        first, paths = None, []
        for number, config in enumerate(configs):
            rein.wrap(model, config)
            randomise(model.rein, "")
            if first is not None and not configs.count(config) < len(configs):
                model.rein.load_state_dict(first)
            first = first or copy.deepcopy(model.rein.state_dict())
            if number:
                randomise(model.rein, *parts, keep=0.7)  # as after training from one adapter
            paths.append(tmp_path / f"{number}.safetensors")
            rein.save(model, paths[-1])
            rein.unwrap(model)
        return paths

    return write


def adapter_of(path, model=None):
    return rein.load(build("vit") if model is None else copy.deepcopy(model), path).rein.double()


def assert_mixture(paths, weights, merged_path, model=None):
    """The merged update of every layer is the weighted sum of the updates, to float32 rounding of the merged parameters."""
    adapters, merged = [adapter_of(path, model) for path in paths], adapter_of(merged_path, model)
    for layer, width in enumerate(merged.widths):
        f = torch.randn(2, 9, width, dtype=torch.float64)
        with torch.no_grad():
            expected = sum(w * (a(f, layer, 1) - f) for w, a in zip(weights, adapters, strict=True))
            got = merged(f, layer, 1) - f
        assert (got - expected).norm() <= 1e-5 * expected.norm()
        assert expected.norm() > 0.01 * f.norm()
    return adapters, merged


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rank": None},
        {"share": False},
        {"zero_init": True},
        {"use_softmax": False},
        {"use_softmax": False, "rank": None, "share": False},
        {"num_tokens": 1},
    ],
)
@pytest.mark.parametrize("parts", [["delta_mlp", "scale"], ["token_mlp"], ["token_mlp", "delta_mlp", "scale", "query_merge"]])
def test_adapters_with_equal_tokens_are_mixed_with_their_queries(config, parts, write, tmp_path):
    paths = write(*parts, configs=[rein.ReinConfig(**{**SMALL, **config})] * 3)
    assert rein.merge(paths, WEIGHTS, tmp_path / "merged.safetensors") is None
    adapters, merged = assert_mixture(paths, WEIGHTS, tmp_path / "merged.safetensors")
    expected = sum(w * adapter.queries() for w, adapter in zip(WEIGHTS, adapters, strict=True))
    assert torch.allclose(merged.queries(), expected, atol=1e-5)
    assert merged.config == adapters[0].config
    assert torch.equal(merged.token_parameters()[0], adapters[0].token_parameters()[0])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("rank", [2, None])
def test_raw_similarities_of_different_tokens_are_mixed(share, rank, write, tmp_path):
    config = rein.ReinConfig(num_tokens=6, rank=rank, query_dim=None, use_softmax=False, share=share)
    paths = write("", configs=[config] * 3)
    rein.merge(paths, WEIGHTS, tmp_path / "merged.safetensors")
    _, merged = assert_mixture(paths, WEIGHTS, tmp_path / "merged.safetensors")
    assert merged.config.num_tokens == 1


def test_raw_similarities_of_different_shapes_are_mixed_without_queries(write, tmp_path):
    configs = [
        rein.ReinConfig(num_tokens=6, rank=2, query_dim=8, use_softmax=False),
        rein.ReinConfig(num_tokens=4, rank=None, query_dim=None, use_softmax=False, share=False),
        rein.ReinConfig(num_tokens=3, rank=1, query_dim=8, use_softmax=False, zero_init=True),
    ]
    paths = write(configs=configs)
    with pytest.raises(
        InputError, match="mixture of the queries: they have different num_tokens, 6 and 4 and 3, .*queries=False"
    ):
        rein.merge(paths, WEIGHTS, tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()
    rein.merge(paths, WEIGHTS, tmp_path / "merged.safetensors", queries=False)
    assert_mixture(paths, WEIGHTS, tmp_path / "merged.safetensors")


@pytest.mark.parametrize("config", [{}, {"use_softmax": False, "query_dim": None}])
def test_adapters_of_stages_are_mixed(config, write, tmp_path):
    model = STAGED["SwinTransformer"]().eval()
    parts = ["mlp", "scale"] if not config else [""]
    paths = write(*parts, model=model, configs=[rein.ReinConfig(**{**SMALL, **config})] * 2)
    rein.merge(paths, [0.5, 0.5], tmp_path / "merged.safetensors")
    assert_mixture(paths, [0.5, 0.5], tmp_path / "merged.safetensors", model)


def test_a_mixture_loads_by_name_and_into_a_segmenter(write, tmp_path):
    paths = write("delta_mlp")
    rein.merge(paths, WEIGHTS, tmp_path / "merged.safetensors")
    model = rein.load(build("vit"), paths[0], name="day")
    rein.load(model, tmp_path / "merged.safetensors", name="dusk")
    with torch.no_grad(), rein.routed(model, ["day", "dusk"]):
        assert model(images()).isfinite().all()


def test_one_file_is_scaled(write, tmp_path):
    paths = write(count=1)
    rein.merge(paths, [-0.5], tmp_path / "half.safetensors")
    assert_mixture(paths, [-0.5], tmp_path / "half.safetensors")


def test_a_file_of_weight_zero_is_left_out_and_a_file_given_twice_counts_twice(write, tmp_path):
    paths = write("")  # all tokens differ
    rein.merge([*paths, paths[0]], [0.5, 0.0, 0, 0.25], tmp_path / "merged.safetensors")
    assert_mixture(paths[:1], [0.75], tmp_path / "merged.safetensors")


def test_a_mixture_may_replace_one_of_its_files(write, tmp_path):
    paths = write("delta_mlp")
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(paths[0].read_bytes())
    rein.merge(paths, WEIGHTS, paths[0])
    assert_mixture([kept, *paths[1:]], WEIGHTS, paths[0])


@pytest.mark.parametrize("part", ["tokens_a", "tokens_b"])
def test_softmax_similarities_of_different_tokens_are_refused(part, write, tmp_path):
    paths = write(part)
    with pytest.raises(InputError, match="their tokens differ, and the softmax over the tokens is not linear.*rein.routed"):
        rein.merge(paths, WEIGHTS, tmp_path / "merged.safetensors")
    with pytest.raises(InputError, match="softmax"):
        rein.merge(paths, WEIGHTS, tmp_path / "merged.safetensors", queries=False)
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize(("key", "value"), [("num_tokens", 4), ("rank", None), ("use_softmax", False), ("share", False)])
def test_adapters_of_other_shapes_are_refused(key, value, write, tmp_path):
    paths = write(configs=[rein.ReinConfig(**SMALL), rein.ReinConfig(**{**SMALL, key: value})])
    with pytest.raises(InputError, match=f"they have different {key}, .* and {value}, and the softmax"):
        rein.merge(paths, [0.5, 0.5], tmp_path / "merged.safetensors")


def test_queries_of_different_projections_are_refused_and_can_be_left_out(write, tmp_path):
    paths = write("query_proj")
    with pytest.raises(InputError, match="W_q differs, and the maximum over the layers is not linear"):
        rein.merge(paths, WEIGHTS, tmp_path / "merged.safetensors")
    rein.merge(paths, WEIGHTS, tmp_path / "merged.safetensors", queries=False)
    _, merged = assert_mixture(paths, WEIGHTS, tmp_path / "merged.safetensors")
    assert merged.config.query_dim is None


def test_a_singular_sum_of_w_f_is_refused(write, tmp_path):
    paths = write("token_mlp", count=2)  # equal s W_f, so that these weights cancel it
    with pytest.raises(InputError, match="the weighted sum of W_f is nearly singular, and the adapters differ in W_t"):
        rein.merge(paths, [1.0, -1.0], tmp_path / "merged.safetensors")
    equal = write("query_merge", count=2)
    rein.merge(equal, [1.0, -1.0], tmp_path / "merged.safetensors")  # no update at all, which an adapter computes
    f = torch.randn(1, 3, 32, dtype=torch.float64)
    assert torch.allclose(adapter_of(tmp_path / "merged.safetensors")(f, 0), f)


def test_untrained_adapters_that_start_at_zero_are_mixed(tmp_path):
    model, paths = rein.wrap(build("vit"), rein.ReinConfig(**SMALL, zero_init=True)), []
    for number in range(2):
        randomise(model.rein, "token_mlp")
        paths.append(tmp_path / f"{number}.safetensors")
        rein.save(model, paths[-1])
    rein.merge(paths, [0.5, 0.5], tmp_path / "merged.safetensors")
    f = torch.randn(1, 3, 32, dtype=torch.float64)
    assert torch.equal(adapter_of(tmp_path / "merged.safetensors")(f, 0), f)


def test_files_of_several_backbones_are_refused(write, tmp_path):
    first = write(count=1)[0].rename(tmp_path / "a.safetensors")
    other = write(count=1, model=build("vit without class token"))[0]
    with pytest.raises(InputError, match=r"0.safetensors has num_prefix_tokens .*, .*a.safetensors has .*of each backbone"):
        rein.merge([first, other], [0.5, 0.5], tmp_path / "merged.safetensors")


def test_segmenter_files_and_missing_files_are_refused(write, tmp_path):
    model = rein.wrap(build("vit"), rein.ReinConfig(**SMALL))
    rein.Segmenter(model, rein.heads.LinearHead([32], 2), indices=[3]).save(tmp_path / "segmenter.safetensors")
    with pytest.raises(InputError, match="is a segmenter file; expected a file of rein.save"):
        rein.merge([tmp_path / "segmenter.safetensors"], [1.0], tmp_path / "merged.safetensors")
    with pytest.raises(CheckpointError, match="cannot read"):
        rein.merge([tmp_path / "missing.safetensors"], [1.0], tmp_path / "merged.safetensors")
    half = write(count=1)[0]
    half.write_bytes(half.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="complete safetensors file"):
        rein.merge([half], [1.0], tmp_path / "merged.safetensors")
    with pytest.raises(CheckpointError, match="nowhere"):
        rein.merge(write(count=1), [1.0], tmp_path / "nowhere" / "merged.safetensors")


@pytest.mark.parametrize(
    ("files", "weights", "match"),
    [
        ([], [], r"files is \[\]; expected a list"),
        ("a.safetensors", [1.0], "files is 'a.safetensors'; expected a list of files"),
        (3, [1.0], "files is 3; expected a list of files"),
        (["a"], 1.0, "weights is 1.0; expected a list"),
        (["a"], [1.0, 2.0], "got 1 files and 2 weights"),
        (["a"], ["1"], "the weight of a is '1'; expected a finite number"),
        (["a"], [float("nan")], "the weight of a is nan"),
        (["a"], [True], "the weight of a is True"),
        (["a", "b"], [0.0, 0], "all weights are 0"),
        (["a", "a"], [1.0, -1.0], "all weights are 0"),
    ],
)
def test_wrong_arguments_are_refused(files, weights, match, tmp_path):
    with pytest.raises(InputError, match=match):
        rein.merge(files, weights, tmp_path / "merged.safetensors")


def test_weights_that_overflow_are_refused(write, tmp_path):
    with pytest.raises(InputError, match="not finite in .*smaller weights"):
        rein.merge(write(count=1), [1e300], tmp_path / "merged.safetensors")


def test_the_file_records_the_backbone(write, tmp_path):
    paths = write("delta_mlp")
    rein.merge(paths, WEIGHTS, tmp_path / "merged.safetensors")
    assert checkpoint.read(tmp_path / "merged.safetensors")[1].backbone == checkpoint.read(paths[0])[1].backbone
    assert [key for key, _ in groupby(rein.load(build("vit"), tmp_path / "merged.safetensors").rein.widths)] == [32]


def test_adapters_of_other_weights_or_options_are_refused(tmp_path):
    config = rein.ReinConfig(**SMALL, use_softmax=False)
    files = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for number, settings in enumerate(({}, {}, {"num_heads": 4}, {"patch_size": 16})):
        torch.manual_seed(number)
        rein.save(rein.wrap(tiny_vit(**settings), config), files[number])
    for other, reason in ((files[1], "other weights"), (files[2], "built"), (files[3], "patch_size")):
        with pytest.raises(InputError, match=f"were trained on different backbones, with {reason}"):
            rein.merge([files[0], other], [0.5, 0.5], tmp_path / "ab.safetensors", queries=False)
    assert not (tmp_path / "ab.safetensors").exists()


def test_adapters_with_and_without_queries_are_refused_in_either_order(tmp_path):
    vit = build("vit")
    rein.wrap(vit, rein.ReinConfig(**SMALL))
    rein.save(vit, tmp_path / "q.safetensors")
    tokens = {key: value.clone() for key, value in vit.rein.state_dict().items() if not key.startswith("query")}
    rein.unwrap(vit)
    rein.wrap(vit, rein.ReinConfig(**{**SMALL, "query_dim": None})).rein.load_state_dict(tokens)
    rein.save(vit, tmp_path / "n.safetensors")
    for names in (("q", "n"), ("n", "q")):
        files = [tmp_path / f"{name}.safetensors" for name in names]
        with pytest.raises(InputError, match=r"the mixture of the queries: they have query_dim .* and .*queries=False"):
            rein.merge(files, [0.5, 0.5], tmp_path / "m.safetensors")
        rein.merge(files, [0.5, 0.5], tmp_path / "m.safetensors", queries=False)
        assert checkpoint.read(tmp_path / "m.safetensors")[1].config.query_dim is None


@pytest.mark.parametrize(
    ("files", "weights", "settings", "match"),
    [
        (["a"], [10**400], {}, "the weight of a is 1000.*expected a finite number"),
        ([3], [1], {}, "files has 3; expected paths"),
        ([["a"]], [1], {}, "files has .*; expected paths"),
        (["a"], [1], {"queries": "no"}, "queries is 'no'; expected True or False"),
    ],
)
def test_wrong_kinds_of_arguments_are_an_input_error(tmp_path, files, weights, settings, match):
    with pytest.raises(InputError, match=match):
        rein.merge(files, weights, tmp_path / "out.safetensors", **settings)
