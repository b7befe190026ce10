"""Segmenters for other runtimes: files of `torch.export` and ONNX, checked against the segmenter itself, and int8 weights.

The segmenter stays as it is when it is exported. `quantize_backbone` changes it in place.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rein import backbones
from rein.errors import CheckpointError, InputError, one_line
from rein.extras import require
from rein.files import describe_missing, reason_of
from rein.heads import DepthHead
from rein.injection import ADAPTER, is_wrapped
from rein.modes import eval_mode
from rein.segmenter import Segmenter

FORMATS = ("pt2", "onnx")
TOLERANCE = 1e-3  # of the largest logit, in float32; ONNX runtimes add in another order
Size = tuple[int, int]
_FIX = "Fix batch and size with --batch N (batch=) and --size HEIGHT WIDTH (size=), or choose the other format."
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """A file that `export_segmenter` wrote.

    Attributes:
        path: the file.
        bytes: its size, with that of `path.data` if the weights of an ONNX file exceed 2 GB.
        input: dtype, shape and meaning of the input `images`.
        output: name, dtype and shape of the output.
        difference: largest difference from the logits of the segmenter. With `argmax`, the largest logit of a pixel minus that of the
            class that the file chooses.
        scale: largest magnitude of these logits.
        shapes: shapes (B, C, H, W) of the images that were compared.
    """

    path: Path
    bytes: int
    input: str
    output: str
    difference: float
    scale: float
    shapes: tuple[tuple[int, ...], ...]


def export_segmenter(
    segmenter: Segmenter,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    batch: int | None = None,
    size: Size | None = None,
    normalise: bool = False,
    argmax: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write a segmenter, weights of the backbone included, to a file of `torch.export` or ONNX, and compare its outputs.

    The file holds `segmenter(images)` in eval mode: whole images, without sliding windows. The batch is dynamic. Height and width are
    dynamic, from one pixel more than two patches, unless the backbone has a fixed size. Nothing is written if the outputs differ.
    `docs/deployment.md` lists backbones and heads whose code fixes the batch or the size.

    Args:
        segmenter: the segmenter; it stays unchanged. A file of `torch.export` runs on its device.
        path: the file to write.
        format: `pt2` (load it with `torch.export.load(path).module()`) or `onnx` (extra `export`). None means the suffix of `path`.
        batch: number of images to fix, for runtimes, backbones and heads that need a fixed one.
        size: (height, width) in pixels to fix, for the same.
        normalise: put the segmenter's normalisation inside. The images are then uint8, RGB, 0 to 255; otherwise float32, normalised.
        argmax: put the argmax inside. The output is then the classes (B, H, W), uint8; otherwise the logits (B, K, H, W), or the
            depth (B, 1, H, W) of a `DepthHead`.
        overwrite: replace an existing file.

    Raises:
        InputError: the file exists, or the format, batch or size is invalid; or the model cannot be exported, or not with a dynamic
            batch or size; or the exported outputs differ from the segmenter's.
        CheckpointError: the file cannot be written.
        MissingExtraError: ONNX without the extra `export`.
    """
    _check_segmenter(segmenter)
    path = Path(path)
    kind = check_path(path, format, overwrite)
    model = _Model(segmenter, normalise, argmax)
    axes = _Axes(_check_batch(batch), _check_size(segmenter, size))
    shapes = _shapes(segmenter, axes)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:100]}.", dir=path.parent) as folder:
            written = Path(folder) / path.name
            with eval_mode(model), torch.no_grad(), _quiet():
                run = _write(model, written, kind, shapes[0], axes)
                difference, scale = _compare(model, run, shapes)
            files = sorted(
                Path(folder).iterdir(), key=lambda file: file == written
            )  # the weights before the file that names them
            total = sum(file.stat().st_size for file in files)
            for file in files:
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {reason_of(error, path)}.") from error
    return Exported(path, total, model.describe_input(axes), model.describe_output(axes), difference, scale, shapes)


def check_path(path: Path, format: str | None, overwrite: bool) -> str:
    """Return the format of a file that is to be written, `pt2` or `onnx`; arguments and errors as for `export_segmenter`."""
    kind = path.suffix.lower().removeprefix(".") if format is None else format
    if kind not in FORMATS:
        got = f"the suffix of {path} is {path.suffix!r}" if format is None else f"format is {format!r}"
        raise InputError(f"{got}; expected pt2 for torch.export, or onnx. Name the file so, or pass a format.")
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot write {path}: {describe_missing(path.parent)}.")
    if path.is_dir():
        raise CheckpointError(f"cannot write {path}: it is a folder; expected the path of a file.")
    if path.exists() and not overwrite:
        raise InputError(
            f"{path} exists; expected a new file. Pass --overwrite (overwrite=True) to replace it, or choose another."
        )
    if kind == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            require(module, "export")
    return kind


def quantize_backbone(segmenter: Segmenter) -> int:
    """Replace the weights of the frozen linear layers of the backbone by int8, in place; for inference only (extra `int8`).

    Each output channel has a scale of its own. Activations, adapter, head, convolutions and layers that train keep their precision.
    The weights take a quarter of the memory; on a CPU, eager inference is not faster. Save the segmenter before.

    Returns:
        The number of layers.

    Raises:
        InputError: the backbone has no frozen linear layer that is not quantised yet.
        MissingExtraError: the extra `int8` is not installed.
    """
    _check_segmenter(segmenter)
    with _quiet():
        quantization: Any = require("torchao.quantization", "int8")
        backbone = segmenter.backbone
        adapter = set(getattr(backbone, ADAPTER).modules()) if is_wrapped(backbone) else set()
        layers = {
            module
            for module in backbone.modules()
            if isinstance(module, nn.Linear) and module not in adapter and _is_plain_and_frozen(module.weight)
        }
        if not layers:
            raise InputError(
                f"the {backbones.architecture(backbone)} has no frozen linear layer that is not quantised yet; expected a "
                "transformer with frozen weights. Leave int8 out."
            )
        quantization.quantize_(backbone, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: module in layers)
    return len(layers)


@torch.no_grad()
def example_logits(segmenter: Segmenter) -> Tensor:
    """The logits of random images, (B, K, H, W): to see what a change of the weights, such as int8, changes."""
    model = _Model(segmenter, normalise=False, argmax=False)
    with eval_mode(segmenter):
        return model.logits(model.example(_shapes(segmenter, _Axes(None, _check_size(segmenter, None)))[0]))


@dataclass(frozen=True)
class _Axes:
    """Batch and size of the images of a file; None means dynamic."""

    batch: int | None
    size: Size | None

    @property
    def names(self) -> tuple[int | str, int | str, int | str]:
        """Batch, height and width as numbers or, where they are dynamic, names."""
        return self.batch or "batch", *(self.size or ("height", "width"))

    def dims(self, least: Size) -> dict[int, Any]:
        """The dynamic axes for torch.export. `least` is (height, width) of the smallest images."""
        smallest = zip((0, 2, 3), self.names, (2, *least), strict=True)  # torch.export accepts a batch of 1, too
        return {axis: torch.export.Dim(name, min=number) for axis, name, number in smallest if isinstance(name, str)}


class _Model(nn.Module):
    """A segmenter with what comes before and after it."""

    mean: Tensor
    std: Tensor

    def __init__(self, segmenter: Segmenter, normalise: bool, argmax: bool) -> None:
        super().__init__()
        self.segmenter, self.normalise, self.argmax = segmenter, normalise, argmax
        self.output = "classes" if argmax else "depth" if isinstance(segmenter.head, DepthHead) else "logits"
        if argmax and isinstance(segmenter.head, DepthHead):
            raise InputError(
                "the head is a DepthHead, whose output is depth; expected a head with classes. Export without argmax."
            )
        mean, std = segmenter.normalization
        if normalise and len(mean) != segmenter.input_spec.channels:
            raise InputError(
                f"the normalisation has {len(mean)} channels, the backbone's images have {segmenter.input_spec.channels}; "
                "expected the same number. Export without normalisation."
            )
        self.values = mean, std
        device = next(segmenter.parameters()).device
        for name, numbers in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(numbers, device=device).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> classes (B, H, W) or logits (B, K, H, W)."""
        logits = self.logits(images)
        return logits.argmax(1).to(torch.uint8) if self.argmax else logits  # at most 255 classes

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        if self.normalise:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        logits: Tensor = self.segmenter(images)
        return logits

    def example(self, shape: Sequence[int]) -> Tensor:
        """Images of random values."""
        generator = torch.Generator().manual_seed(0)
        if self.normalise:
            return torch.randint(256, tuple(shape), generator=generator, dtype=torch.uint8).to(self.mean.device)
        return torch.randn(tuple(shape), generator=generator).to(self.mean.device)

    def describe_input(self, axes: _Axes) -> str:
        """Dtype, shape and meaning of the input."""
        batch, *sides = axes.names
        shape = _in_words((batch, self.segmenter.input_spec.channels, *sides))
        if self.normalise:
            return f"uint8 {shape}, RGB, 0 to 255"
        mean, std = self.values
        return f"float32 {shape}, in [0, 1], then minus {_in_words(mean)} and divided by {_in_words(std)}"

    def describe_output(self, axes: _Axes) -> str:
        """Name, dtype and shape of the output."""
        batch, *sides = axes.names
        if self.argmax:
            return f"classes: uint8 {_in_words((batch, *sides))}"
        channels = 1 if self.output == "depth" else self.segmenter.head.num_classes
        return f"{self.output}: float32 {_in_words((batch, channels, *sides))}"


def _write(model: _Model, path: Path, kind: str, shape: tuple[int, ...], axes: _Axes) -> Run:
    """Write the file, and return a function that reads and runs it."""
    program = _trace(model, shape, axes)
    if kind == "pt2":
        torch.export.save(program, path)
        loaded: Run = torch.export.load(path).module()
        return loaded
    try:
        converted: Any = torch.onnx.export(
            program, input_names=["images"], output_names=[model.output], dynamo=True, verbose=False
        )
    except Exception as error:  # the exporter has many kinds
        raise InputError(
            f"the {_names(model)} cannot be converted to ONNX: {_reason(error)} Choose the format pt2, or another head."
        ) from error
    graph = converted.model.graph
    for value in (graph.inputs[0], graph.outputs[0]):  # the exporter calls them s34, and 8*((s14 + 7)//8)
        for axis, name in zip((0, -2, -1), axes.names, strict=True):
            value.shape[axis] = name
    converted.save(path)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0]).to(images.device)


def _trace(model: _Model, shape: tuple[int, ...], axes: _Axes) -> torch.export.ExportedProgram:
    from torch.fx.experimental import _config

    config: Any = _config
    rows, columns = model.segmenter.input_spec.multiple
    dims = axes.dims((2 * rows + 1, 2 * columns + 1))  # heads with a pyramid halve the maps
    try:
        # Otherwise the program accepts only sizes that are multiples of a patch, or only others, as the example is, because
        # the padded and cropped tensors have other memory layouts. The values are the same.
        with config.patch(backed_size_oblivious=True):
            program = torch.export.export(model, (model.example(shape),), dynamic_shapes=(dims or None,))
            if all(type(tensor) in (Tensor, nn.Parameter) for tensor in program.state_dict.values()):
                return program
            return program.run_decompositions({})  # int8 weights as plain tensors, so that a reader of the file needs no torchao
    except Exception as error:
        dynamic = ", ".join(name for name in axes.names if isinstance(name, str))
        kept = f"with dynamic {dynamic}" if dynamic else "at a fixed batch and size"
        advice = (
            "Fix them with --batch N (batch=) and --size HEIGHT WIDTH (size=)." if dynamic else "Choose another head or backbone."
        )
        raise InputError(f"the {_names(model)} cannot be exported {kept}: {_reason(error)} {advice}") from error


def _compare(model: _Model, run: Run, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """The largest difference between file and segmenter, and the largest logit."""
    difference = scale = 0.0
    tolerance = max(TOLERANCE, *(8 * torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()))
    for shape in shapes:
        images = model.example(shape)
        logits = model.logits(images)
        try:
            got = run(images)
        except Exception as error:
            raise InputError(
                f"the exported {_names(model)} does not run on images of shape {shape}: {_reason(error)} {_FIX}"
            ) from error
        expected = logits.amax(1) if model.argmax else logits
        shown = logits.gather(1, got.long().unsqueeze(1)).squeeze(1) if model.argmax else got
        if shown.shape != expected.shape or not bool(torch.isfinite(expected - shown).all()):
            raise InputError(
                f"the exported {_names(model)} gives {tuple(shown.shape)} for images of shape {shape}, or infinite or NaN values; "
                f"expected finite values of shape {tuple(expected.shape)}. Check that the segmenter predicts finite logits."
            )
        difference = max(difference, float((expected - shown).abs().max()))
        scale = max(scale, float(logits.abs().max()))
        if difference > tolerance * max(scale, 1e-6):
            raise InputError(
                f"the exported {_names(model)} differs from the segmenter by {difference:.2g} on images of shape {shape}, with "
                f"logits up to {scale:.2g}; expected at most {tolerance:.0e} of it. {_FIX}"
            )
    return difference, scale


def _shapes(segmenter: Segmenter, axes: _Axes) -> tuple[tuple[int, ...], ...]:
    """Shapes to compare: sizes that are multiples of a patch, and others; batches of 1, 2 and 3. The first is traced."""
    spec = segmenter.input_spec
    rows, columns = spec.multiple
    sizes = (
        (3 * rows + 1, 5 * columns + 1),
        (4 * rows, 6 * columns),
        (4 * rows - 1, 3 * columns),
        (2 * rows + 1, 2 * columns + 1),
    )
    batches = (2, 1, 3, 1)
    shapes = [(axes.batch or batch, spec.channels, *(axes.size or size)) for batch, size in zip(batches, sizes, strict=True)]
    return tuple(dict.fromkeys(shapes))


def _check_segmenter(segmenter: object) -> None:
    if not isinstance(segmenter, Segmenter):
        raise InputError(f"segmenter is a {type(segmenter).__name__}; expected a rein.Segmenter.")


def _check_batch(batch: Any) -> int | None:
    if batch is not None and (type(batch) is not int or batch < 1):
        raise InputError(f"batch is {batch!r}; expected a number of images of at least 1, or None for any.")
    return batch


def _check_size(segmenter: Segmenter, size: Any) -> Size | None:
    """The (height, width) to which the file is fixed, or None."""
    covered = segmenter.input_spec.covered
    if size is None:
        return covered
    if not isinstance(size, Sequence) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise InputError(f"size is {size!r}; expected (height, width) in pixels, two integers above 0.")
    if covered is not None and (size[0] > covered[0] or size[1] > covered[1]):
        raise InputError(
            f"size is {size[0]} x {size[1]}, the backbone accepts at most {covered[0]} x {covered[1]}, and a file has no sliding "
            "windows. Choose a size within, and run the file on each window."
        )
    return size[0], size[1]


def _is_plain_and_frozen(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.is_floating_point() and not weight.requires_grad


def _names(model: _Model) -> str:
    return f"{backbones.architecture(model.segmenter.backbone)} with {type(model.segmenter.head).__name__}"


def _reason(error: Exception) -> str:
    """What torch says, without its advice on logs."""
    text = one_line(str(error).partition("For more information")[0] or type(error).__name__)
    return text if text.endswith((".", "!")) else f"{text}."


def _in_words(values: Sequence[Any]) -> str:
    return f"({', '.join(str(value) for value in values)})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporters print, warn and log about their own code."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
