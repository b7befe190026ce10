"""ONNX: both exporters of torch, called by the user and checked with onnxruntime. `test_exported_files.py` tests `rein.export`."""

import contextlib
import io

import pytest
import torch
from torch import nn

import rein
from models import amplify_adapter, build, images
from test_heads import HEADS

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
DYNAMIC = torch.export.Dim.DYNAMIC
CONFIGS = {
    "low-rank": {},
    "full tokens": {"rank": None},
    "raw similarity": {"use_softmax": False},
    "separate": {"share": False, "rank": None},
}


def export(model, inputs, path, **settings):
    """Export a model, and return a function that runs the file."""
    with contextlib.redirect_stdout(io.StringIO()):  # the exporters print
        torch.onnx.export(model, inputs, str(path), **settings)
    session = onnxruntime.InferenceSession(str(path))

    def run(*tensors):
        named = {each.name: tensor.numpy() for each, tensor in zip(session.get_inputs(), tensors, strict=True)}
        return torch.from_numpy(session.run(None, named)[0])

    return run


def wrapped(family="vit", **config):
    model = rein.wrap(build(family), rein.ReinConfig(**{"num_tokens": 6, "rank": 2, "query_dim": 64} | config))
    if not model.rein.config.share:
        with torch.no_grad():
            for parameter in model.rein.delta_mlp.parameters():
                parameter.mul_(500)  # s is 1, and these start at a thousandth
    return amplify_adapter(model).eval()


def segmenter(head, family="vit"):
    template = HEADS[head](3)
    arguments = {**template.arguments, "in_channels": [32] * len(template.in_channels)}
    return rein.Segmenter(wrapped(family), type(template)(**arguments)).eval()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_legacy_exporter_exports_a_wrapped_model(config, gradients, tmp_path):
    model, x = wrapped(**CONFIGS[config]), images(1)
    with torch.set_grad_enabled(gradients):
        run = export(model, (x,), tmp_path / "model.onnx", dynamo=False)
    with torch.no_grad():
        assert torch.allclose(run(x), model(x), atol=1e-5)
        with rein.disabled(model):
            assert not torch.allclose(run(x), model(x), atol=1e-2)


@pytest.mark.parametrize("head", ["linear, four maps", "fpn", "smp dpt"])
def test_the_legacy_exporter_exports_a_segmenter(head, tmp_path):
    model, x = segmenter(head), images(1)
    run = export(model, (x,), tmp_path / "model.onnx", dynamo=False)
    with torch.no_grad():
        assert torch.allclose(run(x), model(x), atol=1e-4)


class OfMaps(nn.Module):
    """A head that is called with its maps as separate inputs."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, *maps):
        return self.head(maps)


@pytest.mark.parametrize(
    "head", ["fpn", *(pytest.param(head, marks=pytest.mark.sweep) for head in ("linear, four maps", "smp dpt"))]
)
def test_a_head_is_exported_with_dynamic_height_and_width(head, tmp_path):
    head = HEADS[head](3).eval()
    maps = [torch.randn(2, 12, 4, 6) for _ in range(4)]
    shapes = ((dict.fromkeys((0, 2, 3), DYNAMIC),) * 4,)
    run = export(OfMaps(head), tuple(maps), tmp_path / "head.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    for size in ((4, 6), (5, 7), (3, 2), (9, 4), (2, 2)):  # torch.export excludes 1
        maps = [torch.randn(3, 12, *size) for _ in range(4)]
        with torch.no_grad():
            assert torch.allclose(run(*maps), head(maps), atol=1e-4), size


@pytest.mark.parametrize("head", ["linear, four maps", "fpn", "smp dpt"])
def test_a_traced_head_keeps_its_pyramid(head):
    """Sizes are tensors while torch.jit traces. As members of a set, they made every map look different."""
    head = HEADS[head](3).eval()
    maps = [torch.randn(1, 12, 4, 6) for _ in range(4)]
    traced = torch.jit.trace(OfMaps(head), tuple(maps))
    assert torch.allclose(traced(*maps), head(maps), atol=1e-5)
