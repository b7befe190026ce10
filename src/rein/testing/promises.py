"""What rein promises of every backbone, one check each, and `check_backbone`, which goes through them."""

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

from rein.backbones import Site
from rein.checkpoint import load, save
from rein.config import ReinConfig
from rein.errors import InputError, ReinError
from rein.injection import ADAPTER, disabled, injection_of, is_wrapped, unwrap, wrap

_SMALL = ReinConfig(num_tokens=6, rank=2, query_dim=8)


class BrokenPromiseError(ReinError, AssertionError):
    """A backbone does with rein what it must not; the message begins with the promise's name."""


@dataclass
class _Case:
    """A backbone under test."""

    model: nn.Module
    inputs: Any
    facts: dict[str, Any]

    def bare(self) -> nn.Module:
        """An independent copy, in eval mode."""
        return copy.deepcopy(self.model).eval()

    def wrapped(self) -> nn.Module:
        """A wrapped copy whose adapter visibly changes the features."""
        model = wrap(self.bare(), _SMALL, **self.facts)
        with torch.no_grad():
            for name, parameter in getattr(model, ADAPTER).named_parameters():
                if name.endswith("scale"):
                    parameter.fill_(0.5)
        return model

    def run(self, model: Callable[..., Any]) -> Any:
        """What the model gives."""
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs)
        return model(*self.inputs) if isinstance(self.inputs, tuple) else model(self.inputs)

    def tokens(self, model: nn.Module, sites: Sequence[Site]) -> list[Tensor]:
        """What the sites' blocks hand on: prefix rows, patches and all."""
        with _recorded(model, sites) as found:
            self.run(model)
        return found


@contextmanager
def _recorded(model: nn.Module, sites: Sequence[Site], first: bool = False) -> Iterator[list[Any]]:
    """The tokens in the sites' outputs, in the order of the sites, after all other hooks or before them."""
    found: list[Any] = [None] * len(sites)

    def record(place: int, site: Site) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[place] = output if site.item is None else output[site.item]

        return hook

    handles = [
        model.get_submodule(site.path).register_forward_hook(record(place, site), prepend=first)
        for place, site in enumerate(sites)
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
    """Check that a backbone keeps rein's promises; `model` itself is left as it was.

    The promises, by name. What the bare model itself cannot do is not asked.

    * same object: `wrap` is in place and adds only `rein.` keys to the state dict.
    * features: every block's output and the model's change.
    * prefix rows: they, and whatever else a block returns, pass untouched, bit for bit; and no row that is no patch, since it is the
      same for every image, lies elsewhere.
    * gradients: they reach every layer of the adapter from its features, and nothing frozen.
    * frozen: training mode changes neither features nor buffers.
    * disabled, unwrap: the bare outputs, bit for bit.
    * deepcopy: a copy is independent.
    * save and load: the same outputs, bit for bit.
    * inference mode, channels last, checkpointing (gradients), compile (the full graph): the same numbers.

    Args:
        model: as for `rein.wrap`, not wrapped; it is copied several times.
        images: what it is called with: (B, C, H, W), or a tuple of positional or a dictionary of keyword arguments; a model whose one
            argument is a dictionary, as NaFlexVit's may be, wants it in a tuple.
        compile: also compile, which takes longest.
        blocks: as for `rein.wrap`.
        num_prefix_tokens: as for `rein.wrap`.
        example_inputs: as for `rein.wrap`; `images` where `blocks` are given and `images` are no single tensor.

    Returns:
        The names of the promises that were checked.

    Raises:
        BrokenPromiseError: the first promise that does not hold, and where.
        UnsupportedBackboneError: as `rein.wrap`.
        InputError: the model is wrapped, or its bare outputs are not finite.
    """
    if is_wrapped(model):
        raise InputError("rein.testing.check_backbone wants a bare model; call rein.unwrap(model) first.")
    if example_inputs is None and blocks is not None and not isinstance(images, Tensor):
        example_inputs = images
    if blocks is not None and not isinstance(blocks, str):  # by name, so that copies can be wrapped
        names = {id(module): name for name, module in model.named_modules()}
        blocks = [block if isinstance(block, str) else names.get(id(block), "?") for block in blocks]
    facts = {"blocks": blocks, "num_prefix_tokens": num_prefix_tokens, "example_inputs": example_inputs}
    case = _Case(model, images, facts)
    with torch.no_grad():
        for tensor in _floating(case.run(case.bare())):
            if not tensor.isfinite().all():
                raise InputError("the bare model's outputs are not finite; give it other weights or images.")
    checks = [*_CHECKS, *([("compile", _compile)] if compile else [])]
    return [name for name, check in checks if check(case) is not False]


def _promise(kept: Any, name: str, what: str) -> None:
    if not kept:
        raise BrokenPromiseError(f"{name}: {what}")


def _floating(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _equal(first: Any, second: Any) -> bool:
    one, other = _floating(first), _floating(second)
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _close(first: Any, second: Any, tolerance: float) -> bool:
    """Whether outputs agree to `tolerance` of their largest value."""
    one, other = _floating(first), _floating(second)
    return len(one) == len(other) and all(
        a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()
        for a, b in zip(one, other, strict=True)
        if b.numel()
    )


def _same_object(case: _Case) -> None:
    model = case.bare()
    keys = list(model.state_dict())
    _promise(wrap(model, _SMALL, **case.facts) is model, "same object", "rein.wrap returned another object")
    after = list(model.state_dict())
    _promise(
        [key for key in after if not key.startswith(f"{ADAPTER}.")] == keys,
        "same object",
        "keys of the backbone's state dict changed",
    )
    _promise(len(after) > len(keys), "same object", "the state dict has no adapter")


@torch.no_grad()
def _features(case: _Case) -> None:
    bare, model = case.bare(), case.wrapped()
    sites = injection_of(model).sites
    for site, plain, refined in zip(sites, case.tokens(bare, sites), case.tokens(model, sites), strict=True):
        _promise(refined is not None, "features", f"block {site.path!r} did not run")
        _promise(
            refined.shape == plain.shape and refined.dtype == plain.dtype, "features", f"block {site.path!r} changed its shape"
        )
        _promise(refined.isfinite().all(), "features", f"the output of block {site.path!r} is not finite")
        _promise(not torch.allclose(refined, plain), "features", f"the output of block {site.path!r} is not refined")
    changed = not _equal(case.run(model), case.run(bare))
    if not changed and hasattr(model, "forward_features"):  # a head of zeros hides what changed
        paths: list[Any] = [model.forward_features, bare.forward_features]
        changed = not _equal(*map(case.run, paths))
    _promise(changed, "features", "the model's outputs do not see the adapter")


@torch.no_grad()
def _prefix_rows(case: _Case) -> None:
    model = case.wrapped()
    sites = injection_of(model).sites
    whole: list[Site] = [Site(site.path, site.width, 0) for site in sites]
    with _recorded(model, whole, first=True) as before, _recorded(model, whole) as after:
        case.run(model)
    for site, plain, refined in zip(sites, before, after, strict=True):
        if site.item is not None:
            here = {other.item for other in sites if other.path == site.path}
            untouched = all(_equal(p, r) for place, (p, r) in enumerate(zip(plain, refined, strict=True)) if place not in here)
            _promise(untouched, "prefix rows", f"what else block {site.path!r} returns changed")
            plain, refined = plain[site.item], refined[site.item]
        rows = site.num_prefix_tokens
        _promise(
            torch.equal(plain[:, :rows], refined[:, :rows]) or not rows, "prefix rows", f"those of block {site.path!r} changed"
        )
    if isinstance(case.inputs, Tensor) and sites[0].layout == "NLC" and case.inputs.is_floating_point():
        _first_rows(case, sites[0])


def _first_rows(case: _Case, site: Site) -> None:
    """What enters the first block and is the same for every image must be prefix rows: a count does not say where they are."""
    entered: list[Tensor] = []
    bare: Any = case.bare()
    for images in (case.inputs, torch.randn_like(case.inputs)):
        handle = bare.get_submodule(site.path).register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        try:
            bare(images)
        finally:
            handle.remove()
    if all(isinstance(each, Tensor) and each.ndim == 3 for each in entered):
        same = (entered[0][:1] == entered[1][:1]).all(-1)[0]
        late = same.nonzero().flatten().tolist()
        late = [row for row in late if row >= site.num_prefix_tokens]
        _promise(not late, "prefix rows", f"rows {late} at block {site.path!r} are no patches, but do not come first")


def _gradients(case: _Case) -> None:
    model = case.wrapped().train()
    sites = injection_of(model).sites
    loss = torch.stack([tokens.float().square().mean() for tokens in case.tokens(model, sites)]).sum()
    adapter = getattr(model, ADAPTER)
    (loss + adapter.queries().square().mean()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith(f"{ADAPTER}."):
            _promise(
                parameter.grad is not None and parameter.grad.isfinite().all(), "gradients", f"{name} has none, or not finite"
            )
            if name.rpartition(".")[2] in ("tokens_a", "tokens_b"):
                gradient: Any = parameter.grad
                reached = gradient.flatten(1).abs().amax(1) > 0
                _promise(reached.all(), "gradients", f"they do not reach every layer of {name}: {reached.tolist()}")
        else:
            _promise(parameter.grad is None, "gradients", f"the frozen parameter {name} has one")


@torch.no_grad()
def _frozen(case: _Case) -> None:
    model = case.wrapped()
    sites = injection_of(model).sites
    expected = case.tokens(model, sites)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    for _ in range(2):
        _promise(_equal(case.tokens(model, sites), expected), "frozen", "training mode changes the features, or they are random")
    moved = [name for name, buffer in model.named_buffers() if name in buffers and not torch.equal(buffer, buffers[name])]
    _promise(not moved, "frozen", f"buffers moved in training: {moved}")


@torch.no_grad()
def _disabled(case: _Case) -> None:
    bare, model = case.bare(), case.wrapped()
    refined = case.run(model)
    with disabled(model):
        _promise(_equal(case.run(model), case.run(bare)), "disabled", "the outputs are not the bare ones")
    _promise(_equal(case.run(model), refined), "disabled", "the outputs afterwards are not the refined ones")


@torch.no_grad()
def _unwrap(case: _Case) -> None:
    bare, model = case.bare(), case.wrapped()
    _promise(_equal(case.run(unwrap(model)), case.run(bare)), "unwrap", "the outputs are not the bare ones")
    flags = [parameter.requires_grad for parameter in bare.parameters()]
    _promise([parameter.requires_grad for parameter in model.parameters()] == flags, "unwrap", "requires_grad is not as it was")
    _promise(list(model.state_dict()) == list(bare.state_dict()), "unwrap", "the state dict's keys are not as they were")


@torch.no_grad()
def _deepcopy(case: _Case) -> None:
    model = case.wrapped()
    sites = injection_of(model).sites
    expected, twin = case.tokens(model, sites), copy.deepcopy(model)
    _promise(_equal(case.tokens(twin, sites), expected), "deepcopy", "a copy gives other features")
    for parameter in getattr(twin, ADAPTER).parameters():
        parameter.zero_()
    _promise(not _equal(case.tokens(twin, sites), expected), "deepcopy", "a copy does not use its own adapter")
    _promise(_equal(case.tokens(model, sites), expected), "deepcopy", "the original uses its copy's adapter")


@torch.no_grad()
def _save_and_load(case: _Case) -> None:
    model, other = case.wrapped(), case.bare()
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "adapter.safetensors")
        load(other, Path(folder) / "adapter.safetensors", example_inputs=case.facts["example_inputs"])
    _promise(_equal(case.run(other), case.run(model)), "save and load", "the outputs are not the same")


def _inference_mode(case: _Case) -> None:
    model = case.wrapped()
    with torch.no_grad():
        expected = case.run(model)
    with torch.inference_mode():
        _promise(_close(case.run(model), expected, 1e-5), "inference mode", "the outputs are not the same")


@torch.no_grad()
def _channels_last(case: _Case) -> bool:
    if not isinstance(case.inputs, Tensor) or case.inputs.ndim != 4:
        return False
    model: Any = case.wrapped()
    expected = case.run(model)
    got = model.to(memory_format=torch.channels_last)(case.inputs.contiguous(memory_format=torch.channels_last))
    _promise(_close(got, expected, 1e-3), "channels last", "the outputs are not the same")
    return True


def _checkpointing(case: _Case) -> bool:
    bare, model = case.bare().requires_grad_(False), case.wrapped()
    try:
        plain_output = case.run(bare)
        bare.set_grad_checkpointing(True)  # type: ignore[operator]
    except Exception:  # it has no such method, or it says, each class in its own way, that it cannot
        return False
    if not _close(case.run(bare), plain_output, 1e-4):
        return False

    def gradients() -> list[Tensor]:
        model.zero_grad()
        tokens = case.tokens(model, injection_of(model).sites)  # not the outputs: there may be dropout before a classifier
        torch.stack([each.float().square().mean() for each in tokens]).sum().backward()
        return [parameter.grad.clone() for parameter in getattr(model, ADAPTER).parameters() if parameter.grad is not None]

    model.train()
    plain = gradients()
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    again = gradients()
    _promise(len(again) == len(plain) and len(plain) > 0, "checkpointing", "gradients are lost")
    _promise(_close(again, plain, 1e-4), "checkpointing", "the gradients are not the same")
    return True


@torch.no_grad()
def _compile(case: _Case) -> bool:
    torch._dynamo.reset()
    bare = case.bare()
    try:
        if not _close(case.run(torch.compile(bare, fullgraph=True, backend="aot_eager")), case.run(bare), 1e-3):
            return False
    except Exception:  # the compiler cannot follow the bare model
        return False
    torch._dynamo.reset()
    model = case.wrapped()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        got = case.run(compiled)
    except Exception as error:
        raise BrokenPromiseError(f"compile: the wrapped model does not compile, the bare one does: {error}") from error
    _promise(_close(got, case.run(model), 1e-3), "compile", "the outputs are not the same")
    with disabled(model):
        _promise(_close(case.run(compiled), case.run(model), 1e-3), "compile", "disabled is not followed")
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
]
