"""The checks of `check_backbone`: one function for each property that a backbone must have to work with rein."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rein.backbones import BlockInfo, get_tokens, replace_tokens
from rein.checkpoint import load, save
from rein.config import ReinConfig
from rein.errors import InputError, ReinError
from rein.injection import ADAPTER, disabled, get_injection, is_wrapped, unwrap, wrap

_SMALL = ReinConfig(num_tokens=6, rank=2, query_dim=8)


class BackboneCheckError(ReinError, AssertionError):
    """A backbone fails a check; the message begins with the name of the check."""


@dataclass
class _Case:
    """A backbone under test, its inputs, and the keyword arguments for `wrap`."""

    model: nn.Module
    inputs: Any
    wrap_options: dict[str, Any]

    def bare(self) -> nn.Module:
        """An independent copy, in eval mode."""
        return copy.deepcopy(self.model).eval()

    def wrapped(self) -> nn.Module:
        """A wrapped copy with a scale s of 0.5, so that the adapter changes the features measurably."""
        model = wrap(self.bare(), _SMALL, **self.wrap_options)
        with torch.no_grad():
            for name, parameter in getattr(model, ADAPTER).named_parameters():
                if name.endswith("scale"):
                    parameter.fill_(0.5)
        return model

    def run(self, model: Callable[..., Any]) -> Any:
        """Call the model with the inputs and return its output."""
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs)
        return model(*self.inputs) if isinstance(self.inputs, tuple) else model(self.inputs)

    def tokens(self, model: nn.Module, infos: Sequence[BlockInfo]) -> list[Tensor]:
        """Run the model and return the tokens in the outputs of the blocks, including prefix tokens."""
        with _record_outputs(model, infos) as found:
            self.run(model)
        return found


@contextmanager
def _record_outputs(model: nn.Module, infos: Sequence[BlockInfo], first: bool = False) -> Iterator[list[Any]]:
    """Record the tokens in the outputs of the blocks, before all other forward hooks (`first`) or after them."""
    found: list[Any] = [None] * len(infos)

    def record(index: int, info: BlockInfo) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = output if info.item is None else output[info.item]

        return hook

    handles = [
        model.get_submodule(info.path).register_forward_hook(record(index, info), prepend=first)
        for index, info in enumerate(infos)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def check_backbone(
    model: nn.Module,
    images: Any,
    *,
    compile: bool = True,
    blocks: Sequence[str | nn.Module] | None = None,
    num_prefix_tokens: int | None = None,
    example_inputs: Any = None,
) -> list[str]:
    """Check that a backbone works with rein. All checks run on copies of `model`.

    The checks, by name. A check is skipped if the bare model itself does not support the feature.

    * same object: `wrap` returns the model itself and adds only `rein.` keys to the state dict.
    * features: the outputs of every block and of the model change.
    * prefix rows: prefix tokens and all other items of a block's output stay bit-identical. Tokens that are the same for every
      image, and therefore are not patches, come before the patch tokens.
    * gradients: they reach every layer of the adapter and no frozen parameter.
    * frozen: training mode changes neither features nor buffers.
    * disabled, unwrap: the outputs are bit-identical to those of the bare model.
    * deepcopy: a copy of the wrapped model is independent.
    * save and load: the outputs stay bit-identical.
    * inference mode, channels last, compile (full graph): the outputs stay equal within a tolerance.
    * checkpointing: the gradients stay equal within a tolerance.
    * in place: in training, hooks may change the outputs of the blocks in place.

    Args:
        model: a backbone as for `rein.wrap`, not wrapped.
        images: inputs of the model: a tensor (B, C, H, W), a tuple of positional or a dictionary of keyword arguments. If the only
            argument is itself a dictionary (NaFlexVit), pass it in a tuple.
        compile: also run the compile check, which takes longest.
        blocks: as for `rein.wrap`.
        num_prefix_tokens: as for `rein.wrap`.
        example_inputs: as for `rein.wrap`. Defaults to `images` if `blocks` are given and `images` is not a tensor.

    Returns:
        The names of the checks that ran.

    Raises:
        BackboneCheckError: a check fails; the message says which one and where.
        UnsupportedBackboneError: as `rein.wrap`.
        InputError: the model is wrapped, or the outputs of the bare model are not finite.
    """
    if is_wrapped(model):
        raise InputError("rein.testing.check_backbone expects a bare model, got a wrapped one; call rein.unwrap(model) first.")
    if example_inputs is None and blocks is not None and not isinstance(images, Tensor):
        example_inputs = images
    if blocks is not None and not isinstance(blocks, str):  # names are also valid for copies of the model
        names = {id(module): name for name, module in model.named_modules()}
        blocks = [block if isinstance(block, str) else names.get(id(block), "?") for block in blocks]
    wrap_options = {"blocks": blocks, "num_prefix_tokens": num_prefix_tokens, "example_inputs": example_inputs}
    case = _Case(model, images, wrap_options)
    with torch.no_grad():
        for tensor in _floating(case.run(case.bare())):
            if not tensor.isfinite().all():
                raise InputError("the outputs of the bare model are not finite; use other weights or images.")
    checks = [*_CHECKS, *([("compile", _compile)] if compile else [])]
    return [name for name, check in checks if check(case) is not False]


def _check(passed: Any, name: str, message: str) -> None:
    if not passed:
        raise BackboneCheckError(f"{name}: {message}")


def _floating(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _equal(first: Any, second: Any) -> bool:
    one, other = _floating(first), _floating(second)
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _close(first: Any, second: Any, tolerance: float) -> bool:
    """Whether corresponding tensors differ by at most `tolerance` times the largest absolute value of the second."""
    one, other = _floating(first), _floating(second)
    return len(one) == len(other) and all(
        a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()
        for a, b in zip(one, other, strict=True)
        if b.numel()
    )


def _same_object(case: _Case) -> None:
    model = case.bare()
    keys = list(model.state_dict())
    _check(wrap(model, _SMALL, **case.wrap_options) is model, "same object", "rein.wrap returned another object")
    after = list(model.state_dict())
    _check(
        [key for key in after if not key.startswith(f"{ADAPTER}.")] == keys,
        "same object",
        "the state dict keys of the backbone changed",
    )
    _check(len(after) > len(keys), "same object", "the state dict has no key of the adapter")


@torch.no_grad()
def _features(case: _Case) -> None:
    bare, model = case.bare(), case.wrapped()
    infos = get_injection(model).blocks
    for info, plain, refined in zip(infos, case.tokens(bare, infos), case.tokens(model, infos), strict=True):
        _check(refined is not None, "features", f"block {info.path!r} did not run")
        _check(
            refined.shape == plain.shape and refined.dtype == plain.dtype,
            "features",
            f"the output of block {info.path!r} changed its shape or dtype",
        )
        _check(refined.isfinite().all(), "features", f"the output of block {info.path!r} is not finite")
        _check(not torch.allclose(refined, plain), "features", f"the output of block {info.path!r} is not refined")
    changed = not _equal(case.run(model), case.run(bare))
    if not changed and hasattr(model, "forward_features"):  # a classifier with zero weights hides the change
        forwards: list[Any] = [model.forward_features, bare.forward_features]
        changed = not _equal(*map(case.run, forwards))
    _check(changed, "features", "the adapter does not change the outputs of the model")


@torch.no_grad()
def _prefix_rows(case: _Case) -> None:
    model = case.wrapped()
    infos = get_injection(model).blocks
    whole: list[BlockInfo] = [BlockInfo(info.path, info.width, 0) for info in infos]
    with _record_outputs(model, whole, first=True) as before, _record_outputs(model, whole) as after:
        case.run(model)
    for info, plain, refined in zip(infos, before, after, strict=True):
        if info.item is not None:
            token_items = {other.item for other in infos if other.path == info.path}
            others = [pair for item, pair in enumerate(zip(plain, refined, strict=True)) if item not in token_items]
            unchanged = all(_equal(before_item, after_item) for before_item, after_item in others)
            _check(unchanged, "prefix rows", f"another item of the output of block {info.path!r} changed")
            plain, refined = plain[info.item], refined[info.item]
        count = info.num_prefix_tokens
        unchanged = not count or torch.equal(plain[:, :count], refined[:, :count])
        _check(unchanged, "prefix rows", f"the prefix tokens of block {info.path!r} changed")
    if isinstance(case.inputs, Tensor) and infos[0].layout == "NLC" and case.inputs.is_floating_point():
        _check_prefix_tokens_come_first(case, infos[0])


def _check_prefix_tokens_come_first(case: _Case, info: BlockInfo) -> None:
    """Input tokens of the first block that are the same for every image are not patches, so they must be among the prefix tokens.

    The measured number of prefix tokens does not show where they are.
    """
    inputs: list[Tensor] = []
    bare: Any = case.bare()
    for images in (case.inputs, torch.randn_like(case.inputs)):
        handle = bare.get_submodule(info.path).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            bare(images)
        finally:
            handle.remove()
    if all(isinstance(each, Tensor) and each.ndim == 3 for each in inputs):
        constant = (inputs[0][:1] == inputs[1][:1]).all(-1)[0].nonzero().flatten().tolist()
        count = info.num_prefix_tokens
        misplaced = [row for row in constant if row >= count]
        message = f"rows {misplaced} at block {info.path!r} are not patches; expected such rows among the first {count}"
        _check(not misplaced, "prefix rows", message)


def _gradients(case: _Case) -> None:
    model = case.wrapped().train()
    infos = get_injection(model).blocks
    loss = torch.stack([tokens.float().square().mean() for tokens in case.tokens(model, infos)]).sum()
    adapter = getattr(model, ADAPTER)
    (loss + adapter.queries().square().mean()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith(f"{ADAPTER}."):
            _check(
                parameter.grad is not None and parameter.grad.isfinite().all(),
                "gradients",
                f"{name} has no gradient, or one that is not finite",
            )
            if name.rpartition(".")[2] in ("tokens_a", "tokens_b"):
                gradient: Any = parameter.grad
                reached = gradient.flatten(1).abs().amax(1) > 0
                _check(reached.all(), "gradients", f"{name} has a gradient only in some layers: {reached.tolist()}")
        elif name.startswith(_backbone_prefixes(model)):
            _check(parameter.grad is None, "gradients", f"the frozen parameter {name} has a gradient")


def _in_place(case: _Case) -> None:
    """Hooks that change the outputs of the blocks in place give the features and gradients of hooks that return a new output."""
    first = case.wrapped().train()
    second = copy.deepcopy(first)
    infos = get_injection(first).blocks
    found = []
    for model, make_hook in ((first, _scale), (second, _scale_in_place)):
        for info in infos:
            model.get_submodule(info.path).register_forward_hook(make_hook(info))
        try:
            tokens = case.tokens(model, infos)
            torch.stack([each.float().square().mean() for each in tokens]).sum().backward()
        except RuntimeError as error:
            raise BackboneCheckError(f"in place: the outputs of the blocks cannot be changed in place: {error}") from error
        found.append([*tokens, *(p.grad for p in getattr(model, ADAPTER).parameters() if p.grad is not None)])
    _check(
        _close(found[1], found[0], 1e-5), "in place", "the features or gradients differ from those of a change in a new tensor"
    )


def _scale(info: BlockInfo) -> Callable[..., Any]:
    """A hook that returns a new output, with the tokens multiplied."""
    return lambda module, args, output: replace_tokens(output, info, get_tokens(output, info) * 1.5)


def _scale_in_place(info: BlockInfo) -> Callable[..., Any]:
    """A hook that multiplies the tokens of the output in place."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        (output if info.item is None else output[info.item]).mul_(1.5)

    return hook


def _backbone_prefixes(model: nn.Module) -> tuple[str, ...]:
    """The beginnings of the names of parameters and buffers of the frozen backbone."""
    return tuple(f"{path}." if path else "" for path in get_injection(model).backbones)


@torch.no_grad()
def _frozen(case: _Case) -> None:
    model = case.wrapped()
    infos = get_injection(model).blocks
    expected = case.tokens(model, infos)
    prefixes = _backbone_prefixes(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name.startswith(prefixes)}
    model.train()
    for _ in range(2):
        _check(_equal(case.tokens(model, infos), expected), "frozen", "the features change in training mode, or are random")
    changed = [name for name, buffer in model.named_buffers() if name in buffers and not torch.equal(buffer, buffers[name])]
    _check(not changed, "frozen", f"buffers changed in training mode: {changed}")


@torch.no_grad()
def _disabled(case: _Case) -> None:
    bare, model = case.bare(), case.wrapped()
    refined = case.run(model)
    with disabled(model):
        _check(_equal(case.run(model), case.run(bare)), "disabled", "the outputs differ from those of the bare model")
    _check(_equal(case.run(model), refined), "disabled", "the outputs after the context differ from those before it")


@torch.no_grad()
def _unwrap(case: _Case) -> None:
    bare, model = case.bare(), case.wrapped()
    _check(_equal(case.run(unwrap(model)), case.run(bare)), "unwrap", "the outputs differ from those of the bare model")
    flags = [parameter.requires_grad for parameter in bare.parameters()]
    _check([parameter.requires_grad for parameter in model.parameters()] == flags, "unwrap", "requires_grad is not restored")
    _check(list(model.state_dict()) == list(bare.state_dict()), "unwrap", "the state dict keys are not restored")


@torch.no_grad()
def _deepcopy(case: _Case) -> None:
    model = case.wrapped()
    infos = get_injection(model).blocks
    expected, twin = case.tokens(model, infos), copy.deepcopy(model)
    _check(_equal(case.tokens(twin, infos), expected), "deepcopy", "the features of a copy differ")
    for parameter in getattr(twin, ADAPTER).parameters():
        parameter.zero_()
    _check(not _equal(case.tokens(twin, infos), expected), "deepcopy", "a copy does not use its own adapter")
    _check(_equal(case.tokens(model, infos), expected), "deepcopy", "the original uses the adapter of its copy")


@torch.no_grad()
def _save_and_load(case: _Case) -> None:
    model, other = case.wrapped(), case.bare()
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "adapter.safetensors")
        load(other, Path(folder) / "adapter.safetensors", example_inputs=case.wrap_options["example_inputs"])
    _check(_equal(case.run(other), case.run(model)), "save and load", "the outputs differ after loading")


def _inference_mode(case: _Case) -> None:
    model = case.wrapped()
    with torch.no_grad():
        expected = case.run(model)
    with torch.inference_mode():
        _check(_close(case.run(model), expected, 1e-5), "inference mode", "the outputs differ")


@torch.no_grad()
def _channels_last(case: _Case) -> bool:
    if not isinstance(case.inputs, Tensor) or case.inputs.ndim != 4:
        return False
    model, images = case.wrapped(), case.inputs
    try:  # double precision: the two layouts round differently, and a random model may amplify that
        model, images = model.double(), images.double()
        expected = model(images)
    except Exception:  # the model supports single precision only
        model, images = case.wrapped(), case.inputs
        expected = model(images)
    got = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    # a wrong layout changes the outputs completely; rounding errors grow through some random networks to more than 1e-3
    _check(_close(got, expected, 0.03), "channels last", "the outputs differ")
    return True


def _checkpointing(case: _Case) -> bool:
    bare, model = case.bare().requires_grad_(False), case.wrapped()
    try:
        plain_output = case.run(bare)
        bare.set_grad_checkpointing(True)  # type: ignore[operator]
    except Exception:  # the model has no such method, or refuses with an error of its own class
        return False
    if not _close(case.run(bare), plain_output, 1e-4):
        return False

    def gradients() -> list[Tensor]:
        model.zero_grad()
        tokens = case.tokens(model, get_injection(model).blocks)  # not the outputs: a classifier may use dropout
        torch.stack([each.float().square().mean() for each in tokens]).sum().backward()
        return [parameter.grad.clone() for parameter in getattr(model, ADAPTER).parameters() if parameter.grad is not None]

    model.train()
    plain = gradients()
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    again = gradients()
    _check(len(again) == len(plain) and len(plain) > 0, "checkpointing", "parameters lose their gradients")
    _check(_close(again, plain, 1e-4), "checkpointing", "the gradients differ")
    return True


@torch.no_grad()
def _compile(case: _Case) -> bool:
    torch._dynamo.reset()
    bare = case.bare()
    try:
        if not _close(case.run(torch.compile(bare, fullgraph=True, backend="aot_eager")), case.run(bare), 1e-3):
            return False
    except Exception:  # torch.compile does not support the bare model
        return False
    torch._dynamo.reset()
    model = case.wrapped()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        got = case.run(compiled)
    except Exception as error:
        raise BackboneCheckError(f"compile: the bare model compiles, but the wrapped model does not: {error}") from error
    _check(_close(got, case.run(model), 1e-3), "compile", "the outputs differ")
    with disabled(model):
        _check(_close(case.run(compiled), case.run(model), 1e-3), "compile", "the outputs inside rein.disabled differ")
    return True


_CHECKS: list[tuple[str, Callable[[_Case], bool | None]]] = [
    ("same object", _same_object),
    ("features", _features),
    ("prefix rows", _prefix_rows),
    ("gradients", _gradients),
    ("frozen", _frozen),
    ("disabled", _disabled),
    ("unwrap", _unwrap),
    ("deepcopy", _deepcopy),
    ("save and load", _save_and_load),
    ("inference mode", _inference_mode),
    ("channels last", _channels_last),
    ("checkpointing", _checkpointing),
    ("in place", _in_place),
]
