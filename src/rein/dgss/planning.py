"""`rein plan RECIPE`: the memory that a run needs on each device, and the largest batch that fits, without weights and without a GPU.

One training step runs on fake tensors, which have shapes and no values. The allocations of its tensors are counted, in the order in
which they are made and freed. Kernels' own workspace, fragmentation and the device's context are not counted. `docs/experiments.md`
states the error against measured peaks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rein import backbones
from rein.dgss import recipes
from rein.dgss.training.experiment import Experiment
from rein.errors import InputError, one_line
from rein.heads import Mask2FormerHead

GB = 10**9
CONTEXT = 1.0  # gigabytes of a device that its context and libraries take; a usual value, not measured here
NUM_CLASSES = 19
_PRECISIONS = {
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
}


@dataclass(frozen=True)
class Memory:
    """What a training step needs on one device, in bytes.

    Attributes:
        frozen: weights that do not train, and buffers.
        trained: weights that train.
        gradients: of the weights that train.
        optimizer: state of AdamW, two numbers for each weight that trains.
        average: moving average of the weights, if the run keeps one.
        buckets: copies of the gradients that DistributedDataParallel sends; 0 on one device.
        gathered: under FSDP2, the whole weights of two units, one that computes and one that is fetched.
        activations: the largest amount of all other tensors of a step, beside the gradients.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    buckets: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Step:
    """A training step of a configuration, which `memory` measures.

    Attributes:
        model: the section `model` of a configuration.
        precision: of Lightning's trainer, such as `bf16-mixed`.
        crop: side of the crops in pixels.
        checkpointing: recompute the blocks in the backward pass.
    """

    model: Mapping[str, Any]
    precision: str
    crop: int
    checkpointing: bool

    def memory(self, batch: int, devices: int = 1, *, sharded: bool = False) -> Memory:
        """What one device needs for `batch` images per step.

        Args:
            batch: number of images of each device.
            devices: number of devices.
            sharded: spread weights, gradients and optimizer state by FSDP2; otherwise every device has all of them.
        """
        fixed = _fixed(self)
        parts = {name: -(-size // devices) if sharded else size for name, size in fixed.weights.items()}
        activations = max(_activations(self, batch), parts["gradients"])  # the optimizer copies what trains
        if sharded:
            return Memory(**parts, activations=activations, gathered=fixed.gathered)
        return Memory(**parts, activations=activations, buckets=parts["gradients"] if devices > 1 else 0)

    def largest_batch(self, budget: float, devices: int = 1, *, sharded: bool = False) -> int:
        """The largest number of images for each device that needs at most `budget` bytes; 0 if not even one image fits."""
        return largest(lambda batch: self.memory(batch, devices, sharded=sharded).total, budget)


def largest(required: Callable[[int], float], budget: float) -> int:
    """The largest count whose requirement is within the budget, or 0.

    Few counts are tried. The requirement is the largest of several sums that grow linearly with the count, so it is convex: beyond
    two counts it grows at least as fast as between them.
    """
    known = {1: required(1)}
    if known[1] > budget:
        return 0
    known[2] = required(2)
    while True:
        *_, low = sorted(count for count, value in known.items() if value <= budget)
        above = [count for count, value in known.items() if value > budget]
        if above:
            high = min(above)
            slope = (known[high] - known[low]) / (high - low)
            if known[high] - slope <= budget:  # so one less fits
                return high - 1
            guess = min(high - 1, low + max(1, int((budget - known[low]) // slope)))
        else:
            before = sorted(known)[-2]
            slope = (known[low] - known[before]) / (low - before)
            if slope > budget - known[low]:  # so one more does not fit
                return low
            guess = low + max(1, int((budget - known[low]) // slope)) if slope else 2 * low
        known[guess] = required(guess)


@dataclass(frozen=True)
class Report:
    """Whether the run of a configuration fits on devices.

    Attributes:
        title: what was counted: recipe, precision, crop, batch and devices.
        columns: by title, the memory of one device, and the largest number of images for each device.
        budget: bytes of one device, without its context.
    """

    title: str
    columns: Mapping[str, tuple[Memory, int]]
    budget: float

    @property
    def fits(self) -> list[str]:
        """Titles of the columns that fit, in their order."""
        return [title for title, (memory, _) in self.columns.items() if memory.total <= self.budget]

    def __str__(self) -> str:
        names = [*self.columns]
        rows = [("GB on each device", names)]
        for field, title in _ROWS.items():
            sizes = [getattr(memory, field) for memory, _ in self.columns.values()]
            if any(sizes):
                rows.append((title, [f"{size / GB:.2f}" for size in sizes]))
        rows.append(("all", [f"{memory.total / GB:.2f}" for memory, _ in self.columns.values()]))
        rows.append(("largest batch of a device", [str(batch) for _, batch in self.columns.values()]))
        width = max(len(title) for title, _ in rows)
        lines = [
            f"{title:{width}}  {'  '.join(f'{cell:>{len(name)}}' for cell, name in zip(cells, names, strict=True))}"
            for title, cells in rows
        ]
        return "\n".join([self.title, "", *lines, "", self._verdict()])

    def _verdict(self) -> str:
        if not self.fits:
            best, (memory, _) = min(self.columns.items(), key=lambda column: column[1][0].total)
            return (
                f"It does not fit: {best} needs {memory.total / GB:.1f} of {self.budget / GB:.1f} GB. Use more or larger devices, a "
                "smaller --batch-size or --crop."
            )
        only = "" if len(self.fits) == len(self.columns) else "only "
        return f"It fits {only}with {self.fits[0]}." if len(self.fits) == 1 else f"It fits with: {', '.join(self.fits)}."


# field of Memory -> row of the table
_ROWS = {
    "frozen": "frozen weights",
    "trained": "trained weights",
    "gradients": "gradients",
    "optimizer": "AdamW's state",
    "average": "moving average",
    "buckets": "DDP's copies of gradients",
    "gathered": "FSDP2's whole units",
    "activations": "activations",
}


def plan(recipe: str, *, devices: int = 1, memory: float = 80, batch: int | None = None, crop: int | None = None) -> Report:
    """Count what a run needs on each device, with and without gradient checkpointing, and on several devices with DDP and FSDP2.

    Args:
        recipe: name of a recipe, or path of a configuration.
        devices: number of devices.
        memory: gigabytes (10^9 bytes) of one device; `CONTEXT` of it are kept for the device's context.
        batch: images per step and device; None takes the configuration's.
        crop: side of the crops in pixels; None takes the configuration's.

    Raises:
        InputError: there is no such recipe, or a setting of it is invalid; or `memory` is no larger than `CONTEXT`.
        UnsupportedBackboneError: as `Experiment`.
    """
    if not CONTEXT < memory < float("inf"):
        raise InputError(f"memory is {memory} GB; expected the memory of a device, more than {CONTEXT:g} GB.")
    config = recipes.resolve(recipe)
    budget, batch = (memory - CONTEXT) * GB, batch or batch_of(config)
    columns: dict[str, tuple[Memory, int]] = {}
    for checkpointing in (False, True):
        step = step_of(config, crop=crop, checkpointing=checkpointing)
        for sharded in (False, True)[: 1 + (devices > 1)]:
            name = "FSDP2" if sharded else "DDP" if devices > 1 else "one device"
            title = f"{name} + checkpointing" if checkpointing else name
            try:
                columns[title] = (
                    step.memory(batch, devices, sharded=sharded),
                    step.largest_batch(budget, devices, sharded=sharded),
                )
            except InputError as error:
                if not checkpointing or "checkpointing" not in str(error):
                    raise
    title = f"{recipe}: {step.precision}, crops of {step.crop} x {step.crop}, {batch} images per step and device"
    return Report(f"{title}; {devices} x {memory:g} GB, of which {CONTEXT:g} for the context", columns, budget)


@dataclass(frozen=True)
class _Fixed:
    """What does not depend on the images: bytes by field of `Memory`, and the whole weights of two units of FSDP2."""

    weights: dict[str, int]
    gathered: int


def step_of(config: Mapping[str, Any], *, crop: int | None = None, checkpointing: bool | None = None) -> Step:
    """The training step of a complete configuration, such as `recipes.resolve` returns.

    Args:
        config: the configuration; its sections `model`, `data` and `trainer` are read.
        crop: side of the crops in pixels; None takes the configuration's.
        checkpointing: gradient checkpointing of the backbone; None takes the configuration's.

    Raises:
        InputError: the precision is unknown.
    """
    model = {**config.get("model", {})}
    precision = str(config.get("trainer", {}).get("precision") or "32-true")
    precision = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}.get(precision, precision)
    if precision not in _PRECISIONS:
        raise InputError(
            f"trainer.precision is {one_line(precision)}; rein plan knows {', '.join(_PRECISIONS)}. Choose one of them."
        )
    chosen = bool(model.get("gradient_checkpointing")) if checkpointing is None else checkpointing
    return Step(_Frozen(model), precision, crop or config.get("data", {}).get("crop") or 512, chosen)


class _Frozen(dict[str, Any]):
    """A dictionary that identifies itself, so that results can be kept."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


def batch_of(config: Mapping[str, Any]) -> int:
    """Number of images of a step on each device."""
    return int(config.get("data", {}).get("batch_size", 4))


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, and their largest sum at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet[Any]()

    def _free(self, size: int) -> None:
        self.now -= size

    def ignore(self, tensors: Any) -> None:
        """Do not count these tensors, which are there before."""
        for tensor in tensors:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):  # such as: are all finite
            return True if args[0].dtype == torch.bool else 1
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    size = storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, size)
        return result


class _FirstQueries(nn.Module):
    """In place of the matching of queries and masks, which depends on values: query i is matched to mask i."""

    def forward(self, masks: Tensor, classes: Tensor, mask_labels: list[Tensor], class_labels: list[Tensor]) -> Any:
        """As the matcher of transformers' Mask2Former."""
        counts = [torch.arange(len(each)) for each in class_labels]
        return [(count, count) for count in counts]


def _build(step: Step) -> Experiment:
    """The experiment on meta tensors."""
    settings = {**step.model, "pretrained": False, "weights": None, "gradient_checkpointing": step.checkpointing}
    with torch.device("meta"):
        return Experiment(num_classes=NUM_CLASSES, **settings)


@cache
def _fixed(step: Step) -> _Fixed:
    experiment = _build(step)
    stored, _ = _PRECISIONS[step.precision]

    def size(tensors: Any) -> int:
        return sum(
            tensor.numel() * (stored.itemsize if tensor.is_floating_point() else tensor.element_size()) for tensor in tensors
        )

    parameters = list(experiment.segmenter.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    weights = {
        "frozen": size(chain(frozen, experiment.buffers())),
        "trained": size(trained),
        "gradients": size(trained),
        "optimizer": 2 * size(trained),
        "average": size(trained) if experiment.optimization.ema is not None else 0,
    }
    backbone = experiment.segmenter.backbone
    blocks = [size(backbone.get_submodule(block.path).parameters()) for block in backbones.find_blocks(backbone)]
    return _Fixed(weights, max(blocks) + size(parameters) - sum(blocks))


@cache
def _activations(step: Step, batch: int) -> int:
    """The largest amount of tensors until the end of the backward pass, besides weights, gradients and optimizer state."""
    stored, computed = _PRECISIONS[step.precision]
    experiment = _build(step).to(stored)  # not inside: timm reads values of tensors, which fake ones do not have
    with FakeTensorMode(allow_non_fake_inputs=True):
        experiment.to_empty(device="cpu")
        segmenter = experiment.segmenter.train()
        if isinstance(segmenter.head, Mask2FormerHead):
            segmenter.head.criterion.matcher = _FirstQueries()
        images = torch.empty(batch, backbones.input_spec(segmenter.backbone).channels, step.crop, step.crop, dtype=torch.uint8)
        labels = torch.empty(batch, step.crop, step.crop, dtype=torch.uint8)
        counted = _Allocations()
        counted.ignore(chain(segmenter.parameters(), experiment.buffers()))
        gradients = sum(parameter.nbytes for parameter in segmenter.parameters() if parameter.requires_grad)
        with counted:
            with torch.autocast("cpu", computed) if computed else nullcontext():
                loss = _loss(experiment, images, labels)
            loss.backward()
    return counted.peak - gradients


def _loss(experiment: Experiment, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of a batch. The labels have no values: every image has every class."""
    segmenter, head = experiment.segmenter, experiment.segmenter.head
    maps, queries, (height, width) = segmenter._features(experiment.normalize(images))
    labels = nn.functional.pad(labels.long(), (0, width - labels.shape[-1], 0, height - labels.shape[-2]))
    if not isinstance(head, Mask2FormerHead):
        loss: Tensor = head.loss(maps, labels, queries)
        return loss
    present = [torch.arange(NUM_CLASSES, device=labels.device) for _ in labels]
    terms = head.loss_terms(maps, labels, queries, present)
    return torch.stack(list(terms.values())).sum()
