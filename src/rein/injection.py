"""Add an adapter to a backbone in place, remove it again, and keep the backbone frozen in between.

Each block gets one forward hook; no module is subclassed, replaced or renamed. The hooks, the adapter and the saved state of the
backbone are picklable and belong to the model, so a copy of the model is complete and independent. Only the backbone that contains
the blocks is frozen, not the other parts of a model. What peft injected into the backbone stays as it was.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rein import backbones, other_adapters
from rein.backbones import BlockInfo
from rein.config import ReinConfig
from rein.errors import InputError, WrapError, one_line
from rein.modes import modes_restored, restore_modes
from rein.named_adapters import DEFAULT, Adapter, NamedAdapters, adapters_in_use, check_name
from rein.refinement import PassCache
from rein.stagewise import build_adapter

Model = TypeVar("Model", bound=nn.Module)

ADAPTER, INJECTION = "rein", "rein_injection"
_DISABLING = threading.Lock()  # of the module, because a lock on a model could not be copied


class BlockHook:
    """Forward hook of one block: refines the patch tokens of its output and passes everything else through unchanged.

    With gradients it keeps no state between calls, because gradient checkpointing runs it twice. Without gradients, the hooks of one
    stage share a cache within a forward pass.
    """

    def __init__(self, adapter: Adapter | NamedAdapters, layer: int, info: BlockInfo, pass_cache: PassCache) -> None:
        self.adapter, self.layer, self.info, self.pass_cache = adapter, layer, info, pass_cache
        self.enabled = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "enabled": True}  # a copy made inside `disabled` would never be enabled again

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Return the block's output with refined patch tokens."""
        if not self.enabled:
            return output
        if torch.is_grad_enabled() and self.adapter.training and not torch.compiler.is_compiling():
            warn_if_frozen_by_peft(self.adapter, block)
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
        backbones: module names of the frozen backbones in the model; "" is the model itself.
        disabled_by: number of `disabled` contexts that are open, in all threads.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter | NamedAdapters, blocks: Sequence[BlockInfo], given: dict[str, Any]
    ) -> None:
        super().__init__()
        self.blocks, self.given, self.disabled_by = tuple(blocks), given, 0
        self.backbones = tuple(backbones.enclosing_backbones(model, [info.path for info in blocks]))
        stages = [adapter.stage_of(layer) for layer in range(len(blocks))]
        caches = [PassCache() for _ in range(max(stages) + 1)]
        self.hooks = tuple(BlockHook(adapter, layer, info, caches[stages[layer]]) for layer, info in enumerate(blocks))
        # Modules are stored in tuples, because nn.Module does not register those as children. The handles must be kept: when they are
        # unpickled in a new process, they prevent torch from giving their ids to new hooks.
        self._handles: tuple[RemovableHandle, ...] = ()
        self._patched_blocks: tuple[nn.Module, ...] = ()
        self._requires_grad = {name: parameter.requires_grad for name, parameter in self._parameters_to_freeze(model)}
        self._modes = tuple((module, module.training) for module in model.modules())
        added = {id(module) for module in other_adapters.added_modules(model)}
        inside = chain.from_iterable(model.get_submodule(path).modules() for path in self.backbones)
        self._frozen = tuple(module for module in inside if id(module) not in added)
        self._shapes = [{name: p.shape for name, p in module._parameters.items() if p is not None} for module in self._frozen]
        self._no_weight_decay = model.__dict__.get("no_weight_decay")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "disabled_by": 0}  # as the hooks

    def __prepare_scriptable__(self) -> Any:
        """Refuse `torch.jit.script`, which calls this method on every module of a model."""
        raise WrapError(
            "torch.jit.script was called on a wrapped model, and TorchScript cannot compile the hooks of its blocks; expected a bare "
            "model. Use torch.export or torch.compile, or call rein.unwrap(model) first."
        )

    def _parameters_to_freeze(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the backbones with their names in `model`, except those that peft has frozen or trains."""
        for path in self.backbones:
            backbone = model.get_submodule(path)
            others = other_adapters.parameters(model, backbone)
            for name, parameter in backbone.named_parameters(path, remove_duplicate=False):
                if id(parameter) not in others:
                    yield name, parameter

    def unfrozen(self, model: nn.Module) -> list[str]:
        """Names of the parameters that `apply_to` has frozen and that train again."""
        parameters = self._parameters_to_freeze(model)  # since then with those of the adapter
        return [name for name, parameter in parameters if name in self._requires_grad and parameter.requires_grad]

    def apply_to(self, model: nn.Module) -> None:
        """Add the hooks and the adapter, and freeze the backbones; `undo` reverts it."""
        for info, hook in zip(self.blocks, self.hooks, strict=True):
            block = model.get_submodule(info.path)
            self._handles += (block.register_forward_hook(hook, prepend=True),)
            if "forward" not in block.__dict__:
                # torch.compile reuses a graph that it compiled for another model of this class (a bare one, for example) and its
                # guards ignore hooks. They do check for a `forward` on the instance, so set one to force a new graph.
                self._patched_blocks += (block,)
                block.__dict__["forward"] = MethodType(type(block).forward, block)
        for _, parameter in self._parameters_to_freeze(model):
            parameter.requires_grad_(False)
        self.freeze_modes()
        model.__dict__["no_weight_decay"] = NoWeightDecay(model)
        setattr(model, ADAPTER, self.hooks[0].adapter)
        setattr(model, INJECTION, self)

    def freeze_modes(self) -> None:
        """Set every module of the backbones that existed at `wrap` and has no trainable parameter to eval mode."""
        self._freeze_resized()
        for module in self._frozen:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.training = False

    def _freeze_resized(self) -> None:
        """Freeze parameters that replaced a frozen one of another shape, as `set_input_size` does with position embeddings."""
        for module, shapes in zip(self._frozen, self._shapes, strict=True):
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

    def disable(self, by: int) -> None:
        """Open (`by=1`) or close (`by=-1`) a `disabled` context: the hooks refine while none is open."""
        with _DISABLING:  # contexts of several threads may overlap
            self.disabled_by += by
            for hook in self.hooks:
                hook.enabled = not self.disabled_by

    @property
    def adapter(self) -> Adapter | NamedAdapters:
        """The adapter that the hooks use, `model.rein`."""
        return self.hooks[0].adapter

    def replace_adapter(self, model: nn.Module, adapter: Adapter | NamedAdapters) -> None:
        """Let the hooks use another adapter, which becomes `model.rein`."""
        before = self.adapter
        try:
            for hook in self.hooks:
                hook.adapter = adapter
            model._modules[ADAPTER] = adapter
        except BaseException:  # Ctrl-C included
            for hook in self.hooks:
                hook.adapter = before
            model._modules[ADAPTER] = before
            raise

    def undo(self, model: nn.Module) -> None:
        """Remove what `apply_to` added, and restore every `requires_grad` and mode, except for parameters that peft has frozen since.

        After an interrupt, a second call completes it.
        """
        for handle in self._handles:
            handle.remove()
        for block in self._patched_blocks:
            if block.__dict__.get("forward") == MethodType(type(block).forward, block):  # otherwise it was replaced after `wrap`
                del block.__dict__["forward"]
        restore_modes(self._modes)
        for name, parameter in self._parameters_to_freeze(model):  # by name, because conversions may replace parameter objects
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        if isinstance(model.__dict__.get("no_weight_decay"), NoWeightDecay):
            if self._no_weight_decay is None:
                del model.__dict__["no_weight_decay"]
            else:
                model.__dict__["no_weight_decay"] = self._no_weight_decay
        for name in (ADAPTER, INJECTION):
            model._modules.pop(name, None)


def warn_if_frozen_by_peft(adapter: Adapter | NamedAdapters, model: nn.Module) -> None:
    """Warn if parameters of the adapter are frozen while those of peft inside `model` train: peft freezes all other parameters."""
    if any(next(each.parameters()).requires_grad for each in adapters_in_use(adapter)):  # tokens; peft may leave biases trainable
        return
    if any(parameter.requires_grad for module in other_adapters.added_modules(model) for parameter in module.parameters()):
        warnings.warn(
            "parameters of the adapter of rein.wrap are frozen, but those of peft in the same model train; peft freezes every other "
            "parameter when it is injected. To train both, call model.rein.requires_grad_(True) before you build the optimizer.",
            stacklevel=2,
        )


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
    name: str | None = None,
    blocks: Sequence[str | nn.Module] | None = None,
    num_prefix_tokens: int | None = None,
    example_inputs: Any = None,
) -> Model:
    """Freeze the backbone in `model` and add an adapter that refines the output of each block, in place.

    The backbone is `model`, or the timm model inside it. Afterwards the backbone is frozen and the adapter `model.rein` trains. Other
    parts of `model` (a decoder, a detector's head) stay as they were; `rein.summary` says what trains and what is frozen. The frozen
    part stays deterministic in training mode: no dropout, no drop path, and normalisation statistics do not change. Layers that you
    attach or unfreeze later train as usual, but dropout and drop path that existed before stay off. If `wrap` raises an error, the
    model is unchanged.

    Adapters that peft injected into the backbone before `wrap` stay as they were and train beside the adapter. If peft is injected
    after `wrap`, it freezes the adapter: call `model.rein.requires_grad_(True)` to train both. A warning says so if you forget it.
    Save the adapter with `rein.save`, not with peft's `modules_to_save`, which trains a copy that the blocks do not use.

    The adapter is initialised from torch's global random state, on the device of the blocks, in float32 (float64 in a float64 model).
    A block that runs several times in one forward pass is one layer. Call `wrap` before `torch.compile`. Use non-reentrant gradient
    checkpointing (timm's default): the reentrant kind gives an adapter in a frozen backbone no gradients.

    With `name`, a wrapped model gets another adapter for the same blocks, which is not active yet. `model.rein` is then a
    `NamedAdapters`; an adapter that was there without a name is called "default". The other arguments but `config` must be left out.

    Args:
        model: a timm model of a known family, or a model that contains one; with `blocks`, any model whose blocks return tokens
            (B, N, C) or feature maps.
        config: configuration of the adapter; the default is the authors' (`ReinConfig()`).
        name: name of the adapter, for models with several. None: the model has one adapter, `model.rein`.
        blocks: the blocks or their module names, in the order in which they run, for models that rein does not know. They
            determine what is frozen: the timm model that contains them, or else the base model of a Hugging Face model with a head,
            or else the smallest module that holds the blocks and all parameters that were registered before them. `rein.summary`
            names it.
        num_prefix_tokens: number of leading rows (class token, registers) that are not patches and pass through unchanged, for models
            where it cannot be measured.
        example_inputs: inputs of the model, if it does not take an image (B, C, H, W): a tensor, a tuple of positional or a
            dictionary of keyword arguments. Only shapes and dtypes are used, on meta tensors. The rows whose number does not depend
            on the image size are assumed to come first.

    Returns:
        `model` itself.

    Raises:
        UnsupportedBackboneError: a fact about the backbone is missing; the message says how to pass it.
        WrapError: the model is already wrapped or compiled, has an adapter of this name, or inference mode is on.
        InputError: an argument has the wrong type, or `name` is no name of an adapter.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"rein.wrap expects a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(config, ReinConfig | None):
        raise InputError(f"config is {config!r}; expected a rein.ReinConfig.")
    _refuse_inference_mode()
    if name is not None and is_wrapped(model):
        if any(argument is not None for argument in (blocks, num_prefix_tokens, example_inputs)):
            raise InputError(
                f"blocks, num_prefix_tokens or example_inputs were given for adapter {one_line(repr(name))} of a wrapped model; "
                "expected none, because all adapters of a model refine the same blocks. Leave them out."
            )
        refuse_taken_name(model, name)
        add_adapter(model, name, new_adapter(model, get_injection(model).blocks, config or ReinConfig()))
        return model
    _refuse_wrapped(model)
    _refuse_compiled(model)
    if name is not None:
        check_name(name)
    infos = backbones.find_blocks(model, blocks, num_prefix_tokens, example_inputs)
    adapter = new_adapter(model, infos, config or ReinConfig())
    given = {} if num_prefix_tokens is None else {"num_prefix_tokens": num_prefix_tokens}
    injection = Injection(model, adapter if name is None else NamedAdapters({name: adapter}, active=name), infos, given)
    injection.adapter.train(model.training)
    try:
        injection.apply_to(model)
        return model
    except BaseException:  # Ctrl-C included
        injection.undo(model)
        raise


def new_adapter(model: nn.Module, blocks: Sequence[BlockInfo], config: ReinConfig) -> Adapter:
    """A new adapter for the blocks of a model, in its mode, on their device, in float32 (float64 in a float64 model).

    Raises:
        WrapError: inference mode is on.
    """
    _refuse_inference_mode()
    first_block = model.get_submodule(blocks[0].path)
    reference = next(chain(first_block.parameters(), model.parameters()), torch.empty(0))
    adapter = build_adapter([block.width for block in blocks], config, patch_size=backbones.patch_size(model)[0])
    adapter.to(reference.device, torch.float64 if reference.dtype == torch.float64 else torch.float32)
    return adapter.train(model.training)


def add_adapter(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Add an adapter to a wrapped model under a name. The active adapter stays active; one without a name becomes "default"."""
    injection = get_injection(model)
    if isinstance(injection.adapter, NamedAdapters):
        injection.adapter.add_module(name, adapter)
    else:
        named = NamedAdapters({DEFAULT: injection.adapter, name: adapter}, active=DEFAULT)
        named.training = injection.adapter.training
        injection.replace_adapter(_owner(model, injection), named)


def find_adapter(model: nn.Module, name: str | None = None) -> Adapter | None:
    """The adapter of this name in a wrapped model, or None; without a name, the active one or the only one.

    Raises:
        InputError: `name` is no name of an adapter.
    """
    adapter = get_injection(model).adapter
    if name is not None:
        check_name(name)
    if not isinstance(adapter, NamedAdapters):
        return adapter if name in (None, DEFAULT) else None
    if name is not None and name not in adapter:
        return None
    return adapter[name or adapter.active_name]


def get_adapter(model: nn.Module, name: str | None = None) -> Adapter:
    """As `find_adapter`, but an adapter that does not exist is an error.

    Raises:
        WrapError: the model is not wrapped.
        InputError: no adapter has this name.
    """
    found = find_adapter(model, name)
    if found is not None:
        return found
    adapter = get_injection(model).adapter
    if isinstance(adapter, NamedAdapters):
        return adapter[str(name)]  # raises an InputError that lists the names
    raise InputError(
        f"no adapter is named {one_line(repr(name))}; this model has one adapter without a name. Leave the name out."
    )


def refuse_taken_name(model: nn.Module, name: str) -> None:
    """Raise WrapError if a wrapped model has an adapter of this name."""
    if find_adapter(model, name) is not None:
        raise WrapError(
            f"this {type(model).__name__} already has an adapter named {one_line(repr(name))}; rein.load(model, file, name=...) "
            "replaces its values, model.rein.delete removes it. Or choose another name."
        )


def unwrap(model: Model) -> Model:
    """Remove the adapter, or all named ones, and restore every `requires_grad` and mode to its value before `wrap`.

    To keep the adapter, save it or hold a reference to `model.rein` before this call.

    Returns:
        `model` itself.

    Raises:
        WrapError: the model is not wrapped, or this is called inside `disabled`.
    """
    injection = get_injection(model)
    if injection.disabled_by:
        raise WrapError("rein.unwrap was called inside rein.disabled; leave that context first.")
    if isinstance(injection.adapter, NamedAdapters):
        injection.adapter.refuse_route("unwrap")
    owner = _owner(model, injection)
    try:
        injection.undo(owner)
    except BaseException:  # Ctrl-C in the middle
        injection.undo(owner)
        raise
    return model


def _owner(model: nn.Module, injection: Injection) -> nn.Module:
    """The wrapped model in `model`: a PeftModel or a compiled model forwards the attributes of the wrapped model inside it."""
    return next(module for module in model.modules() if module._modules.get(INJECTION) is injection)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Context in which the model returns exactly the bare backbone's outputs. It may be nested.

    It is a state of the model and not of a thread: every block that runs while such a context is open in any thread returns the bare
    output. A pass of another thread that is under way when the context opens or closes refines some of its blocks only.

    On exit, every `requires_grad` and mode is restored to its value on entry.

    Raises:
        WrapError: the model is not wrapped.
    """
    injection = get_injection(model)
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with modes_restored(model):
        injection.disable(1)
        try:
            yield
        finally:
            injection.disable(-1)
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
        for name, module in model.named_modules():
            if INJECTION in module._modules:
                raise WrapError(f"this {type(model).__name__} is not wrapped, but its {name} is; pass its .{name}.")
        raise WrapError(f"this {type(model).__name__} is not wrapped; call rein.wrap(model) first.")
    adapter = getattr(model, ADAPTER, None)
    if adapter is not injection.adapter:
        raise WrapError(
            f"model.{ADAPTER} was replaced by a {type(adapter).__name__}; expected the adapter of rein.wrap, which the blocks use. "
            f"To change the adapter's values, use rein.load; call peft without modules_to_save=[{ADAPTER!r}]."
        )
    return injection


def is_wrapped(model: Any) -> bool:
    """Whether `wrap` was called on this module itself."""
    return isinstance(getattr(model, INJECTION, None), Injection)


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise WrapError(
            "rein.wrap was called inside torch.inference_mode(), where an adapter could not be trained; call it outside."
        )


def _refuse_wrapped(model: nn.Module) -> None:
    if is_wrapped(model):
        raise WrapError(
            f"this {type(model).__name__} is already wrapped; rein.load(model, file) replaces its adapter, "
            "rein.wrap(model, config, name=...) adds another, rein.unwrap(model) removes it."
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
