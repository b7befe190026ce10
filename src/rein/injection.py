"""Add an adapter to a backbone in place, remove it again, and keep the backbone frozen in between.

Each block gets one forward hook; no module is subclassed, replaced or renamed. The hooks, the adapter and the saved state of the
backbone are picklable and belong to the model, so a copy of the model is complete and independent.
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
from rein.adapter import ReinAdapter
from rein.backbones import BlockInfo
from rein.config import ReinConfig
from rein.errors import InputError, WrapError
from rein.modes import modes_restored
from rein.refinement import PassCache
from rein.stagewise import StagewiseAdapter, build_adapter

Model = TypeVar("Model", bound=nn.Module)
Adapter = ReinAdapter | StagewiseAdapter

ADAPTER, INJECTION = "rein", "rein_injection"


class BlockHook:
    """Forward hook of one block: refines the patch tokens of its output and passes everything else through unchanged.

    With gradients it keeps no state between calls, because gradient checkpointing runs it twice. Without gradients, the hooks of one
    stage share a cache within a forward pass.
    """

    def __init__(self, adapter: Adapter, layer: int, info: BlockInfo, pass_cache: PassCache) -> None:
        self.adapter, self.layer, self.info, self.pass_cache = adapter, layer, info, pass_cache
        self.enabled = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "enabled": True}  # a copy made inside `disabled` would never be enabled again

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Return the block's output with refined patch tokens."""
        if not self.enabled:
            return output
        tokens = backbones.get_tokens(output, self.info)
        refined = self.adapter(tokens, self.layer, self.info.num_prefix_tokens, self.pass_cache)
        return backbones.replace_tokens(output, self.info, refined)


class Injection(nn.Module):
    """Record of what `wrap` changed in a model, to undo it. A child module of the model, without parameters.

    It is an `nn.Module` so that `model.train()` calls its `train`, which returns the frozen modules to eval mode.

    Attributes:
        blocks: the adapted blocks, one per layer of the adapter.
        hooks: one forward hook per block.
        given: facts about the backbone that the user passed to `wrap`.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, blocks: Sequence[BlockInfo], given: dict[str, Any]) -> None:
        super().__init__()
        self.blocks, self.given = tuple(blocks), given
        stages = [adapter.stage_of(layer) for layer in range(len(blocks))]
        caches = [PassCache() for _ in range(max(stages) + 1)]
        self.hooks = tuple(BlockHook(adapter, layer, info, caches[stages[layer]]) for layer, info in enumerate(blocks))
        # Modules are stored in tuples, because nn.Module does not register those as children. The handles must be kept: when they are
        # unpickled in a new process, they prevent torch from giving their ids to new hooks.
        self._handles: tuple[RemovableHandle, ...] = ()
        self._patched_blocks: tuple[nn.Module, ...] = ()
        self._requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._modes = tuple((module, module.training) for module in model.modules())
        self._shapes = [{name: p.shape for name, p in module._parameters.items() if p is not None} for module, _ in self._modes]
        self._no_weight_decay = model.__dict__.get("no_weight_decay")

    def apply_to(self, model: nn.Module) -> None:
        """Add the hooks and freeze the model; `undo` reverts both."""
        for info, hook in zip(self.blocks, self.hooks, strict=True):
            block = model.get_submodule(info.path)
            self._handles += (block.register_forward_hook(hook, prepend=True),)
            if "forward" not in block.__dict__:
                # torch.compile reuses a graph that it compiled for another model of this class (a bare one, for example) and its
                # guards ignore hooks. They do check for a `forward` on the instance, so set one to force a new graph.
                block.__dict__["forward"] = MethodType(type(block).forward, block)
                self._patched_blocks += (block,)
        model.requires_grad_(False)
        self.freeze_modes()
        model.__dict__["no_weight_decay"] = NoWeightDecay(model)

    def freeze_modes(self) -> None:
        """Set every module that existed at `wrap` and has no trainable parameter to eval mode."""
        self._freeze_resized()
        for module, _ in self._modes:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.training = False

    def _freeze_resized(self) -> None:
        """Freeze parameters that replaced a frozen one of another shape, as `set_input_size` does with position embeddings."""
        for (module, _), shapes in zip(self._modes, self._shapes, strict=True):
            for name, parameter in module._parameters.items():
                if parameter is not None and name in shapes and parameter.shape != shapes[name]:
                    parameter.requires_grad_(False)
                    shapes[name] = parameter.shape

    def train(self, mode: bool = True) -> Injection:
        """Set the mode, then freeze again. The model's `train()` calls this after its other children, which were added earlier."""
        super().train(mode)
        self.freeze_modes()
        return self

    def forward(self, x: Any) -> Any:
        """Return `x`, for models that run all their children in sequence."""
        return x

    def undo(self, model: nn.Module) -> None:
        """Remove the hooks and restore every `requires_grad` and mode."""
        for handle in self._handles:
            handle.remove()
        for block in self._patched_blocks:
            if block.__dict__.get("forward") == MethodType(type(block).forward, block):  # otherwise it was replaced after `wrap`
                del block.__dict__["forward"]
        for name, parameter in model.named_parameters():  # by name, because conversions may replace parameter objects
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        for module, training in self._modes:
            module.training = training
        if isinstance(model.__dict__.get("no_weight_decay"), NoWeightDecay):
            del model.__dict__["no_weight_decay"]
            if self._no_weight_decay is not None:
                model.__dict__["no_weight_decay"] = self._no_weight_decay


class NoWeightDecay:
    """Replaces `no_weight_decay` of a wrapped model, which timm's optimizers call: adds the adapter's tokens and scale s."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.bare = model, model.__dict__.get("no_weight_decay")

    def __call__(self) -> set[str]:
        """Return the names of the parameters without weight decay."""
        method = getattr(type(self.model), "no_weight_decay", None)
        names = set(self.bare() if self.bare is not None else method(self.model) if method is not None else ())
        no_decay = {id(parameter) for parameter in getattr(self.model, ADAPTER).no_decay_parameters()}
        return names | {name for name, parameter in self.model.named_parameters() if id(parameter) in no_decay}


def wrap(
    model: Model,
    config: ReinConfig | None = None,
    *,
    blocks: Sequence[str | nn.Module] | None = None,
    num_prefix_tokens: int | None = None,
    example_inputs: Any = None,
) -> Model:
    """Freeze `model` and add an adapter that refines the output of each block, in place.

    Afterwards only the adapter `model.rein` trains. The frozen part stays deterministic in training mode: no dropout, no drop path,
    and normalisation statistics do not change. Layers that you attach or unfreeze later train as usual, but dropout and drop path
    that existed before stay off. If `wrap` raises an error, the model is unchanged.

    The adapter is initialised from torch's global random state, on the device of the blocks, in float32 (float64 in a float64 model).
    A block that runs several times in one forward pass is one layer. Call `wrap` before `torch.compile`. Use non-reentrant gradient
    checkpointing (timm's default): the reentrant kind gives an adapter in a frozen backbone no gradients.

    Args:
        model: a timm model of a known family, or a model that contains one; with `blocks`, any model whose blocks return tokens
            (B, N, C) or feature maps.
        config: configuration of the adapter; the default is the authors' (`ReinConfig()`).
        blocks: the blocks or their module names, in the order in which they run, for models that rein does not know.
        num_prefix_tokens: number of leading rows (class token, registers) that are not patches and pass through unchanged, for models
            where it cannot be measured.
        example_inputs: inputs of the model, if it does not take an image (B, C, H, W): a tensor, a tuple of positional or a
            dictionary of keyword arguments. Only shapes and dtypes are used, on meta tensors. The rows whose number does not depend
            on the image size are assumed to come first.

    Returns:
        `model` itself.

    Raises:
        UnsupportedBackboneError: a fact about the backbone is missing; the message says how to pass it.
        WrapError: the model is already wrapped or compiled, or inference mode is on.
        InputError: an argument has the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"rein.wrap expects a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(config, ReinConfig | None):
        raise InputError(f"config is {config!r}; expected a rein.ReinConfig.")
    if torch.is_inference_mode_enabled():
        raise WrapError(
            "rein.wrap was called inside torch.inference_mode(), where an adapter could not be trained; call it outside."
        )
    _refuse_wrapped(model)
    _refuse_compiled(model)
    infos = backbones.find_blocks(model, blocks, num_prefix_tokens, example_inputs)
    first_block = model.get_submodule(infos[0].path)
    reference = next(chain(first_block.parameters(), model.parameters()), torch.empty(0))
    adapter = build_adapter([info.width for info in infos], config or ReinConfig(), patch_size=backbones.patch_size(model)[0])
    adapter.to(reference.device, torch.float64 if reference.dtype == torch.float64 else torch.float32)
    given = {} if num_prefix_tokens is None else {"num_prefix_tokens": num_prefix_tokens}
    injection = Injection(model, adapter, infos, given)
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
    """Remove the adapter and restore every `requires_grad` and mode to its value before `wrap`.

    To keep the adapter, save it or hold a reference to `model.rein` before this call.

    Returns:
        `model` itself.

    Raises:
        WrapError: the model is not wrapped, or this is called inside `disabled`.
    """
    injection = get_injection(model)
    if not all(hook.enabled for hook in injection.hooks):
        raise WrapError("rein.unwrap was called inside rein.disabled; leave that context first.")
    injection.undo(model)
    delattr(model, ADAPTER)
    delattr(model, INJECTION)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Context in which the model returns exactly the bare backbone's outputs, in every thread. It may be nested.

    On exit, every `requires_grad` and mode is restored to its value on entry.

    Raises:
        WrapError: the model is not wrapped.
    """
    hooks = get_injection(model).hooks
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


def get_injection(model: nn.Module) -> Injection:
    """The record that `wrap` left on a model.

    Raises:
        WrapError: the model is not wrapped.
    """
    injection = getattr(model, INJECTION, None)
    if not isinstance(injection, Injection):
        if is_wrapped(getattr(model, "backbone", model)):
            raise WrapError(f"this {type(model).__name__} is not wrapped, but its backbone is; pass its .backbone.")
        raise WrapError(f"this {type(model).__name__} is not wrapped; call rein.wrap(model) first.")
    return injection


def is_wrapped(model: Any) -> bool:
    """Whether `wrap` was called on this module itself."""
    return isinstance(getattr(model, INJECTION, None), Injection)


def _refuse_wrapped(model: nn.Module) -> None:
    if is_wrapped(model):
        raise WrapError(
            f"this {type(model).__name__} is already wrapped; rein.load(model, file) replaces its adapter, "
            "rein.unwrap(model) removes it."
        )
    for name, module in model.named_modules():
        if any(isinstance(hook, BlockHook) for hook in module._forward_hooks.values()):
            raise WrapError(f"block {name!r} is already wrapped through another module; call rein.unwrap on that module first.")
    if hasattr(model, ADAPTER):
        raise WrapError(
            f"this {type(model).__name__} has an attribute {ADAPTER!r}, which rein.wrap would overwrite; rename it first."
        )


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            compiled = f"module {name!r}" if name else f"this {type(model).__name__}"
            raise WrapError(
                f"{compiled} is already compiled, and a compiled module ignores new hooks; "
                "call rein.wrap(model) before torch.compile(model)."
            )
