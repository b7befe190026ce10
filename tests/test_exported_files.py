"""`rein.export`: files of torch.export and ONNX that give what the segmenter gives, and int8 weights."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import rein
from models import amplify_adapter, build
from rein import CheckpointError, InputError, MissingExtraError, export
from rein.backbones import normalization
from rein.cli import main
from rein.testing import tiny_vit
from test_heads import HEADS

# torch.export of older versions does not take sizes that are no multiples of a patch; docs/compatibility.md says so
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
pytestmark = pytest.mark.skipif(OLD, reason="dynamic sizes of torch.export were tested with torch 2.14 and newer")

KINDS = ["pt2", pytest.param("onnx", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _onnx(request):
    if "onnx" in request.node.name:
        for module in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(module)


def segmenter(maps=2, head=None, **settings):
    torch.manual_seed(0)
    vit = rein.wrap(
        tiny_vit(**{"dynamic_img_size": True, "depth": 2, **settings}), rein.ReinConfig(num_tokens=6, rank=2, query_dim=None)
    )
    head = rein.heads.LinearHead([32] * maps, 5) if head is None else head
    return rein.Segmenter(amplify_adapter(vit), head).eval()


def read(path):
    """A function that runs a file."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_logits_of_the_segmenter_at_every_size_and_batch(kind, tmp_path):
    model, path = segmenter(), tmp_path / f"model.{kind}"
    done = export.export_segmenter(model, path)
    assert done.path == path
    assert done.bytes == path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert done.difference <= 1e-4 < done.scale
    assert done.input.startswith("float32 (batch, 3, height, width)")
    assert done.output == "logits: float32 (batch, 5, height, width)"
    run = read(path)
    for shape in ((1, 3, 32, 32), (4, 3, 48, 40), (1, 3, 33, 70), (2, 3, 57, 17)):
        images = torch.randn(shape)
        with torch.no_grad():
            assert torch.allclose(run(images), model(images), atol=1e-4), shape  # runtimes add in another order
    with torch.no_grad(), rein.disabled(model.backbone):
        assert not torch.allclose(run(images), model(images), atol=1e-2)  # the adapter is inside


@pytest.mark.parametrize("kind", KINDS)
def test_normalisation_and_argmax_are_inside_if_asked_for(kind, tmp_path):
    model, path = segmenter(), tmp_path / f"model.{kind}"
    done = export.export_segmenter(model, path, normalise=True, argmax=True)
    assert done.input == "uint8 (batch, 3, height, width), RGB, 0 to 255"
    assert done.output == "classes: uint8 (batch, height, width)"
    images = torch.randint(256, (2, 3, 37, 50), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalization(model.backbone))
    with torch.no_grad():
        expected = model((images / 255 - mean) / std).argmax(1)
    got = read(path)(images)
    assert got.dtype == torch.uint8
    assert (got == expected).float().mean() > 0.999  # two logits may be equal up to rounding
    assert len(expected.unique()) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_can_be_fixed(kind, tmp_path):
    model, path = segmenter(), tmp_path / f"model.{kind}"
    assert export.export_segmenter(model, path, size=(40, 33)).input.startswith("float32 (batch, 3, 40, 33)")
    run, images = read(path), torch.randn(3, 3, 40, 33)
    with torch.no_grad():
        assert torch.allclose(run(images), model(images), atol=1e-4)
    with pytest.raises(Exception, match=r"(?i)guard failed|invalid dimensions"):
        run(torch.randn(1, 3, 40, 40))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "fixed"),
    [
        ("fpn", {}),
        pytest.param("mask2former", {"batch": 1, "size": (32, 48)}, marks=pytest.mark.sweep),
        pytest.param("smp dpt", {}, marks=pytest.mark.sweep),
        pytest.param("smp fpn", {"batch": 1}, marks=pytest.mark.sweep),
        pytest.param("smp segformer", {"batch": 1}, marks=pytest.mark.sweep),
        pytest.param("smp upernet", {"batch": 1, "size": (32, 48)}, marks=pytest.mark.sweep),
    ],
)
def test_heads_are_exported_to_onnx_with_what_they_fix(head, fixed, tmp_path):
    template = HEADS[head](3)
    arguments = {**template.arguments, "in_channels": [32] * len(template.in_channels)}
    model = segmenter(head=type(template)(**arguments), depth=4)
    if fixed:
        dynamic = {name: value for name, value in fixed.items() if name != "batch"}
        with pytest.raises(InputError, match=r"cannot be exported with dynamic batch.*Constraints violated \(batch.*--batch N"):
            export.export_segmenter(model, tmp_path / "model.onnx", **dynamic)
    export.export_segmenter(model, tmp_path / "model.onnx", **fixed)
    run = read(tmp_path / "model.onnx")
    for size in (fixed["size"],) if "size" in fixed else ((48, 72), (32, 32), (45, 70), (17, 90)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert torch.allclose(run(images), model(images), atol=1e-4), size


def test_a_backbone_of_fixed_size_keeps_it_and_only_the_batch_is_dynamic(tmp_path):
    model = segmenter(dynamic_img_size=False)
    done = export.export_segmenter(model, tmp_path / "model.pt2")
    assert done.input.startswith("float32 (batch, 3, 32, 32)")
    assert {shape[2:] for shape in done.shapes} == {(32, 32)}
    assert len({shape[0] for shape in done.shapes}) > 1


def test_a_size_beyond_that_of_the_backbone_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"size is 48 x 32, the backbone accepts at most 32 x 32, and a file has no sliding windows"
    ):
        export.export_segmenter(segmenter(dynamic_img_size=False), tmp_path / "model.pt2", size=(48, 32))


def test_a_backbone_that_computes_positions_from_numbers_needs_a_fixed_size(tmp_path):
    backbone = rein.wrap(build("dinov3"))
    model = rein.Segmenter(backbone, rein.heads.LinearHead([32], 5))
    with pytest.raises(
        InputError, match=r"the Eva with LinearHead cannot be exported with dynamic batch, height, width: .*--size HEIGHT WIDTH"
    ):
        export.export_segmenter(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
    export.export_segmenter(model, tmp_path / "model.pt2", size=(32, 48))


def test_depth_is_exported_as_depth_and_has_no_argmax(tmp_path):
    model = segmenter(head=rein.heads.DepthHead([32, 32], num_bins=8))
    done = export.export_segmenter(model, tmp_path / "model.pt2")
    assert done.output == "depth: float32 (batch, 1, height, width)"
    with pytest.raises(InputError, match="the head is a DepthHead, whose output is depth; expected a head with classes"):
        export.export_segmenter(model, tmp_path / "classes.pt2", argmax=True)


def test_the_segmenter_stays_as_it_was(tmp_path):
    model = segmenter().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    export.export_segmenter(model, tmp_path / "model.pt2", normalise=True)
    assert modes == [module.training for module in model.modules()]
    assert gradients == [parameter.requires_grad for parameter in model.parameters()]
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


# -- the comparison


class _Wrong(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, images, model):
        return self.change(model.logits(images))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda logits: logits + 0.1, "differs from the segmenter by 0.1 "),
        (lambda logits: logits[..., 1:], r"gives \(2, 5, 25, 40\) for images of shape \(2, 3, 25, 41\)"),
        (lambda logits: logits * float("nan"), "infinite or NaN values"),
        (lambda logits: 1 / 0, r"does not run on images of shape \(2, 3, 25, 41\): division by zero"),
    ],
    ids=["values", "shape", "NaN", "error"],
)
def test_a_file_that_does_not_give_the_segmenters_outputs_is_not_written(change, said, tmp_path, monkeypatch):
    def write(model, path, *_):
        path.write_bytes(b"wrong")
        return lambda images: change(model.logits(images))

    monkeypatch.setattr(export, "_write", write)
    (tmp_path / "model.pt2").write_bytes(b"old")
    with pytest.raises(InputError, match=said):
        export.export_segmenter(segmenter(), tmp_path / "model.pt2", overwrite=True)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_a_wrong_class_counts_by_the_logit_that_it_loses(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_write", lambda model, path, *_: lambda images: model.logits(images).argmin(1).to(torch.uint8))
    with pytest.raises(InputError, match="differs from the segmenter by"):
        export.export_segmenter(segmenter(), tmp_path / "model.pt2", argmax=True)


def test_ctrl_c_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def interrupt(model, path, *_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_write", interrupt)
    (tmp_path / "model.pt2").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        export.export_segmenter(segmenter(), tmp_path / "model.pt2", overwrite=True)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


# -- bad input


def test_an_existing_file_is_replaced_only_on_demand(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match=r"model.pt2 exists; expected a new file. Pass --overwrite \(overwrite=True\)"):
        export.export_segmenter(segmenter(), path)
    assert path.read_bytes() == b"old"
    export.export_segmenter(segmenter(), path, overwrite=True)
    assert path.read_bytes() != b"old"


@pytest.mark.parametrize(
    ("name", "settings", "error", "said"),
    [
        ("model.pth", {}, InputError, "the suffix of .*model.pth is '.pth'; expected pt2 for torch.export, or onnx"),
        ("model", {}, InputError, "the suffix of .*model is ''; expected"),
        ("model.pt2", {"format": "tensorrt"}, InputError, "format is 'tensorrt'; expected pt2"),
        ("nowhere/model.pt2", {}, CheckpointError, "cannot write .*: .*nowhere does not exist"),
        ("folder.pt2", {"overwrite": True}, CheckpointError, "it is a folder; expected the path of a file"),
        ("model.pt2", {"batch": 0}, InputError, "batch is 0; expected a number of images of at least 1"),
        ("model.pt2", {"size": 512}, InputError, r"size is 512; expected \(height, width\) in pixels"),
        ("model.pt2", {"size": (0, 32)}, InputError, r"size is \(0, 32\); expected"),
        ("model.pt2", {"size": (32.0, 32)}, InputError, "expected .* two integers above 0"),
    ],
)
def test_a_bad_argument_is_an_error_that_says_what_was_expected(name, settings, error, said, tmp_path):
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(error, match=said):
        export.export_segmenter(segmenter(), tmp_path / name, **settings)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.pt2"]


def test_only_segmenters_are_exported(tmp_path):
    for call in (lambda model: export.export_segmenter(model, tmp_path / "a.pt2"), export.quantize_backbone):
        with pytest.raises(InputError, match=r"segmenter is a VisionTransformer; expected a rein.Segmenter"):
            call(tiny_vit())


def test_the_normalisation_needs_images_of_its_channels(tmp_path):
    model = segmenter(in_chans=4)
    with pytest.raises(
        InputError, match=r"the normalisation has 3 channels, the backbone's images have 4; expected the same number"
    ):
        export.export_segmenter(model, tmp_path / "model.pt2", normalise=True)


@pytest.mark.parametrize(("missing", "extra"), [("onnxruntime", "export"), ("torchao", "int8")])
def test_a_missing_extra_says_what_to_install(missing, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    calls = {"int8": export.quantize_backbone, "export": lambda model: export.export_segmenter(model, tmp_path / "model.onnx")}
    with pytest.raises(MissingExtraError, match=rf"this needs {missing}.*rein-adapter\[{extra}\]"):
        calls[extra](segmenter())


# -- int8


def quantized_names(model):
    return {name for name, parameter in model.named_parameters() if type(parameter) is not nn.Parameter}


def test_int8_replaces_the_weights_of_the_frozen_linear_layers_alone():
    pytest.importorskip("torchao")
    model = segmenter()
    model.backbone.blocks[0].mlp.fc1.weight.requires_grad_(True)
    images = torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        before = model(images)
        assert export.quantize_backbone(model) == 2 * 4 - 1
        after = model(images)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"backbone.blocks.{block}.{layer}.weight" for block in range(2) for layer in layers}
    assert quantized_names(model) == expected - {"backbone.blocks.0.mlp.fc1.weight"}
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()  # 255 steps for each channel
    weight = model.backbone.blocks[1].mlp.fc2.weight
    assert weight.qdata.dtype == torch.int8
    model.backbone.blocks[0].mlp.fc1.weight.requires_grad_(False)
    assert export.quantize_backbone(model) == 1
    with pytest.raises(InputError, match=r"the VisionTransformer has no frozen linear layer that is not quantised yet"):
        export.quantize_backbone(model)


def test_int8_refuses_a_backbone_that_trains():
    pytest.importorskip("torchao")
    model = segmenter()
    model.backbone.requires_grad_(True)
    with pytest.raises(InputError, match="no frozen linear layer"):
        export.quantize_backbone(model)
    assert not quantized_names(model)


@pytest.mark.parametrize("kind", ["pt2", pytest.param("onnx", marks=pytest.mark.sweep)])
def test_a_file_with_int8_weights_is_smaller_and_its_reader_needs_no_torchao(kind, tmp_path):
    pytest.importorskip("torchao")
    wide = {"embed_dim": 256, "num_heads": 4, "depth": 2}
    torch.manual_seed(0)
    vit = rein.wrap(tiny_vit(dynamic_img_size=True, **wide), rein.ReinConfig(num_tokens=4, rank=2, query_dim=None))
    model = rein.Segmenter(vit, rein.heads.LinearHead([256], 5))
    full = export.export_segmenter(model, tmp_path / f"full.{kind}").bytes
    export.quantize_backbone(model)
    small = export.export_segmenter(model, tmp_path / f"small.{kind}")
    assert small.bytes < 0.5 * full  # a quarter, but for convolutions, adapter, head and program
    images = torch.randn(1, 3, 40, 33)
    np.save(tmp_path / "images.npy", images.numpy())
    load = {
        "pt2": "run = torch.export.load(path).module()",
        "onnx": "import onnxruntime; s = onnxruntime.InferenceSession(path)\n"
        "run = lambda x: torch.from_numpy(s.run(None, {'images': x.numpy()})[0])",
    }
    program = f"""
import sys, numpy, torch
sys.modules["torchao"] = sys.modules["rein"] = None
path = {str(small.path)!r}
{load[kind]}
numpy.save({str(tmp_path / "logits.npy")!r}, run(torch.from_numpy(numpy.load({str(tmp_path / "images.npy")!r}))).detach().numpy())
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(np.load(tmp_path / "logits.npy")), model(images), atol=1e-4)


# -- the command


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A segmenter file, and a `Segmenter.load` that finds the backbone."""
    path = tmp_path / "seg.safetensors"
    segmenter().save(path)
    load = rein.Segmenter.load
    monkeypatch.setattr(rein.Segmenter, "load", lambda path, weights=None: load(path, build_backbone()), raising=True)

    def build_backbone():
        torch.manual_seed(0)
        return tiny_vit(dynamic_img_size=True, depth=2)

    return path


def test_the_command_writes_a_file_and_states_input_output_and_difference(saved, tmp_path, capsys):
    pytest.importorskip("torchao")
    out = tmp_path / "model.pt2"
    assert main(["export", str(saved), str(out), "--normalise", "--argmax", "--int8"]) == 0
    wrote, images, output, change, difference = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB"
    assert images == "input images: uint8 (batch, 3, height, width), RGB, 0 to 255"
    assert output == "output classes: uint8 (batch, height, width)"
    assert re.match(r"int8 weights of \d+ layers change the logits by up to \d\.\de-\d\d, of up to \d", change)
    assert difference.startswith("largest difference from the segmenter: 0.0e+00, of logits up to ")
    assert difference.endswith("images 2 x 3 x 25 x 41, 1 x 3 x 32 x 48, 3 x 3 x 31 x 24, 1 x 3 x 17 x 17")
    assert read(out)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 32, 32)


def test_the_command_refuses_to_overwrite_and_to_replace_its_input(saved, tmp_path, capsys):
    out = tmp_path / "model.pt2"
    out.write_bytes(b"old")
    assert main(["export", str(saved), str(out)]) == 2
    assert "exists; expected a new file. Pass --overwrite" in capsys.readouterr().err
    content = saved.read_bytes()
    assert main(["export", str(saved), str(saved), "--format", "pt2", "--overwrite"]) == 2
    assert "OUT is FILE" in capsys.readouterr().err
    assert (out.read_bytes(), saved.read_bytes()) == (b"old", content)
    assert main(["export", str(saved), str(out), "--overwrite", "--size", "32", "48"]) == 0
    assert "float32 (batch, 3, 32, 48)" in capsys.readouterr().out


def test_the_command_checks_out_before_it_loads_the_segmenter(tmp_path, capsys):
    assert main(["export", str(tmp_path / "missing.safetensors"), str(tmp_path / "model.bin")]) == 2
    assert "the suffix of " in capsys.readouterr().err
