"""Put an adapter into a backbone in place, take it out again, and keep the backbone frozen in between.

Each block gets one forward hook; nothing is subclassed, replaced or renamed. Hooks, adapter and book-keeping are plain picklable
objects that hang on the model itself, so a copy of the model is complete and independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rein import backbones
from rein.adapter import OnePass, ReinAdapter, StagewiseAdapter, build_adapter
from rein.backbones import Site
from rein.config import ReinConfig
from rein.errors import InputError, WrapError
from rein.modes import modes_restored

Model = TypeVar("Model", bound=nn.Module)
Adapter = ReinAdapter | StagewiseAdapter

ADAPTER, INJECTION = "rein", "rein_injection"


class BlockHook:
    """Forward hook of one block: refines the patch tokens of its output and passes everything else through.

    It keeps no state between calls, since under gradient checkpointing it runs twice; only without gradients do the hooks of a model
    share what one pass prepares.
    """

    def __init__(self, adapter: Adapter, layer: int, site: Site, one_pass: OnePass) -> None:
        self.adapter, self.layer, self.site, self.one_pass = adapter, layer, site, one_pass
        self.enabled = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "enabled": True}  # a copy made inside `disabled` has nobody to enable it again

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        """The block's output, refined."""
        if not self.enabled:
            return output
        tokens = backbones.tokens_of(output, self.site)
        refined = self.adapter(tokens, self.layer, self.site.num_prefix_tokens, self.one_pass)
        return backbones.with_tokens(output, self.site, refined)


class Injection(nn.Module):
    """What `wrap` did to a model, and how to undo it. A child of the model without parameters.

    It is a module because `train()` is told to modules: whenever the model's mode changes, what is frozen goes back to eval mode.

    Attributes:
        sites: where the adapter acts, in the order of its layers.
        hooks: one per site.
        given: facts that the user gave and that were not measured.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, sites: Sequence[Site], given: dict[str, Any]) -> None:
        super().__init__()
        self.sites, self.given = tuple(sites), given
        stages = [adapter.stage_of(layer) for layer in range(len(sites))]
        passes = [OnePass() for _ in range(max(stages) + 1)]
        self.hooks = tuple(BlockHook(adapter, layer, site, passes[stages[layer]]) for layer, site in enumerate(sites))
        # Modules are held in tuples, which nn.Module does not register. The handles must be kept: unpickled in a fresh process,
        # they keep torch from giving their numbers to hooks that are added there.
        self._handles: tuple[RemovableHandle, ...] = ()
        self._told_apart: tuple[nn.Module, ...] = ()
        self._requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._modes = tuple((module, module.training) for module in model.modules())
        self._shapes = [{name: p.shape for name, p in module._parameters.items() if p is not None} for module, _ in self._modes]
        self._no_weight_decay = model.__dict__.get("no_weight_decay")

    def apply_to(self, model: nn.Module) -> None:
        """Add the hooks and freeze; `undo` is the way back."""
        for site, hook in zip(self.sites, self.hooks, strict=True):
            block = model.get_submodule(site.path)
            self._handles += (block.register_forward_hook(hook, prepend=True),)
            if "forward" not in block.__dict__:
                # torch.compile does not look at hooks when it asks whether a program that it made for another model of this class
                # fits, a bare one perhaps; it does look whether `forward` is the instance's own
                block.__dict__["forward"] = MethodType(type(block).forward, block)
                self._told_apart += (block,)
        model.requires_grad_(False)
        self.freeze_modes()
        model.__dict__["no_weight_decay"] = NoWeightDecay(model)

    def freeze_modes(self) -> None:
        """Eval mode for every module that was there at `wrap` and holds nothing that trains."""
        self._freeze_resized()
        for module, _ in self._modes:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.training = False

    def _freeze_resized(self) -> None:
        """Freeze what was put in place of frozen parameters in another size, as `set_input_size` does with position embeddings."""
        for (module, _), shapes in zip(self._modes, self._shapes, strict=True):
            for name, parameter in module._parameters.items():
                if parameter is not None and name in shapes and parameter.shape != shapes[name]:
                    parameter.requires_grad_(False)
                    shapes[name] = parameter.shape

    def train(self, mode: bool = True) -> Injection:
        """Called by the model's own `train()`, after the children that were there before."""
        super().train(mode)
        self.freeze_modes()
        return self

    def forward(self, x: Any) -> Any:
        """`x`, for models that run all their children in turn."""
        return x

    def undo(self, model: nn.Module) -> None:
        """Remove the hooks and give back every `requires_grad` and mode as found."""
        for handle in self._handles:
            handle.remove()
        for block in self._told_apart:
            if block.__dict__.get("forward") == MethodType(type(block).forward, block):  # else somebody put another there since
                del block.__dict__["forward"]
        for name, parameter in model.named_parameters():  # by name: conversions may have put other objects in their places
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        for module, training in self._modes:
            module.training = training
        if isinstance(model.__dict__.get("no_weight_decay"), NoWeightDecay):
            del model.__dict__["no_weight_decay"]
            if self._no_weight_decay is not None:
                model.__dict__["no_weight_decay"] = self._no_weight_decay


class NoWeightDecay:
    """Stands for a wrapped model's method `no_weight_decay`, which timm's optimizers ask: the adapter's tokens and s are added."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.bare = model, model.__dict__.get("no_weight_decay")

    def __call__(self) -> set[str]:
        """Names of parameters that are not to decay."""
        own = getattr(type(self.model), "no_weight_decay", None)
        names = set(self.bare() if self.bare is not None else own(self.model) if own is not None else ())
        spared = {id(parameter) for parameter in getattr(self.model, ADAPTER).no_decay_parameters()}
        return names | {name for name, parameter in self.model.named_parameters() if id(parameter) in spared}


def wrap(
    model: Model,
    config: ReinConfig | None = None,
    *,
    blocks: Sequence[str | nn.Module] | None = None,
    num_prefix_tokens: int | None = None,
    example_inputs: Any = None,
) -> Model:
    """Freeze `model` and let an adapter refine the output of each of its blocks, in place.

    Afterwards only `model.rein`, a `ReinAdapter`, trains, and `model.train()` leaves the frozen part deterministic: no dropout, no
    drop path, normalisation statistics untouched. Layers that are attached later, or unfrozen, train as usual, but dropout and drop
    path that were there stay off. The adapter is
    initialised from torch's global random state, on the blocks' device, in float32 (float64 in a float64 model).

    A block that runs several times in one pass is one layer. Wrap before `torch.compile`. Of the two kinds of gradient checkpointing
    only the non-reentrant one, timm's default, gives an adapter in a frozen backbone its gradients.

    Args:
        model: a timm model of a known family, or a model that holds one; with `blocks`, any model whose blocks give tokens (B, N, C)
            or maps.
        config: what to build; the default is the authors' (`ReinConfig()`).
        blocks: the blocks or their names in the order in which they run, where they are not known.
        num_prefix_tokens: rows before the patch tokens that pass through untouched, where they cannot be measured.
        example_inputs: what the model is called with, where that is not an image (B, C, H, W): a tensor, a tuple of positional or a
            dictionary of keyword arguments. Only shapes and dtypes are used, on meta tensors. Whatever of a block's rows does not
            grow with the image is taken to come first.

    Returns:
        `model` itself.

    Raises:
        UnsupportedBackboneError: a fact about the backbone is missing; the message says how to give it.
        WrapError: the model is wrapped already, or compiled, or this is inference mode.
        InputError: an argument of the wrong type. In every case the model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"rein.wrap wants a torch.nn.Module; got {type(model).__name__}.")
    if not isinstance(config, ReinConfig | None):
        raise InputError(f"config is {config!r}; it must be a rein.ReinConfig.")
    if torch.is_inference_mode_enabled():
        raise WrapError("an adapter that is made inside torch.inference_mode() could not be trained; call rein.wrap outside.")
    _refuse_wrapped(model)
    _refuse_compiled(model)
    sites = backbones.find_sites(model, blocks, num_prefix_tokens, example_inputs)
    block = model.get_submodule(sites[0].path)
    reference = next(chain(block.parameters(), model.parameters()), torch.empty(0))
    adapter = build_adapter([site.width for site in sites], config or ReinConfig(), patch_size=backbones.patch_size(model)[0])
    adapter.to(reference.device, torch.float64 if reference.dtype == torch.float64 else torch.float32)
    given = {} if num_prefix_tokens is None else {"num_prefix_tokens": num_prefix_tokens}
    injection = Injection(model, adapter, sites, given)
    adapter.train(model.training)
    try:
        injection.apply_to(model)
        setattr(model, ADAPTER, adapter)
        setattr(model, INJECTION, injection)
    except BaseException:  # Ctrl-C included
        injection.undo(model)
        for name in (ADAPTER, INJECTION):
            if hasattr(model, name):
                delattr(model, name)
        raise
    return model


def unwrap(model: Model) -> Model:
    """Take the adapter out: the bare backbone again, with every `requires_grad` and mode as `wrap` found them.

    Returns:
        `model` itself. Keep `model.rein`, or save it, before if it is still wanted.

    Raises:
        WrapError: the model is not wrapped, or this is called inside `disabled`.
    """
    injection = injection_of(model)
    if not all(hook.enabled for hook in injection.hooks):
        raise WrapError("rein.unwrap was called inside rein.disabled; leave that first.")
    injection.undo(model)
    delattr(model, ADAPTER)
    delattr(model, INJECTION)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model gives the bare backbone's outputs, bit for bit, in every thread. May be nested.

    On leaving, every `requires_grad` and mode is again as it was on entering.

    Raises:
        WrapError: the model is not wrapped.
    """
    hooks = injection_of(model).hooks
    found = [hook.enabled for hook in hooks]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with modes_restored(model):
        for hook in hooks:
            hook.enabled = False
        try:
            yield
        finally:
            for hook, enabled in zip(hooks, found, strict=True):
                hook.enabled = enabled
            for parameter, required in requires_grad:
                if parameter.requires_grad != required:
                    parameter.requires_grad_(required)


def injection_of(model: nn.Module) -> Injection:
    """The book-keeping of a wrapped model.

    Raises:
        WrapError: the model is not wrapped.
    """
    injection = getattr(model, INJECTION, None)
    if not isinstance(injection, Injection):
        if is_wrapped(getattr(model, "backbone", model)):
            raise WrapError(f"this {type(model).__name__} is not wrapped, its backbone is: pass its .backbone.")
        raise WrapError(f"this {type(model).__name__} is not wrapped; call rein.wrap(model) first.")
    return injection


def is_wrapped(model: Any) -> bool:
    """Whether `wrap` was called on this very module."""
    return isinstance(getattr(model, INJECTION, None), Injection)


def _refuse_wrapped(model: nn.Module) -> None:
    if is_wrapped(model):
        raise WrapError(
            f"this {type(model).__name__} is wrapped already; rein.load(model, file) exchanges its adapter, "
            "rein.unwrap(model) takes it out."
        )
    for name, module in model.named_modules():
        if any(isinstance(hook, BlockHook) for hook in module._forward_hooks.values()):
            raise WrapError(f"block {name!r} is wrapped already, through another module; rein.unwrap that one first.")
    if hasattr(model, ADAPTER):
        raise WrapError(f"this {type(model).__name__} has an attribute {ADAPTER!r}, which wrap would overwrite; rename it first.")


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            what = f"its module {name!r}" if name else "this model"
            raise WrapError(
                f"{what} is compiled already, and hooks that are added to a compiled module are ignored; "
                "call rein.wrap(model) before torch.compile(model)."
            )
