"""Several adapters on one backbone, each with a name. One of them refines at a time, or each image has its own (`rein.routed`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

from torch import Tensor, nn

from rein.adapter import ReinAdapter
from rein.config import ReinConfig
from rein.errors import InputError, WrapError, one_line
from rein.refinement import PassCache
from rein.stagewise import StagewiseAdapter

Adapter = ReinAdapter | StagewiseAdapter
DEFAULT = "default"  # the name that an adapter without a name gets beside named ones


class Route(Protocol):
    """What `NamedAdapters` needs of `rein.routing`: refines tokens as an adapter does, with several of them."""

    adapters: tuple[Adapter, ...]

    def __call__(self, x: Tensor, layer: int, num_prefix_tokens: int) -> Tensor:
        """Refine the tokens of one layer."""


class NamedAdapters(nn.Module):
    """The adapters of a model by name; `model.rein` once one of them has a name.

    `config`, `queries()` and the refinement are those of the active adapter. `names` lists all, `model.rein[name]` is one of them,
    and its tensors have the keys `rein.NAME.` + key in the model's state dict. Which adapter is active is a state of the model and
    not of a thread. It does not change any `requires_grad`: an adapter that is not active gets no gradients, so an optimizer leaves
    it as it is.

    With gradient checkpointing, call `backward` while the same adapter is active, because it runs the blocks again.

    Args:
        adapters: the adapters by name, for the same layers.
        active: name of the one that refines.
    """

    _active: Adapter

    def __init__(self, adapters: Mapping[str, Adapter], active: str) -> None:
        super().__init__()
        for name, adapter in adapters.items():
            self.add_module(check_name(name), adapter)
        self._route: Route | None = None
        self.activate(active)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **{key: value for key, value in self.__dict__.items() if key != "_last"},
            "_route": None,
        }  # a copy made inside `rein.routed` would never leave it

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they were added."""
        return tuple(self._modules)

    @property
    def active_name(self) -> str:
        """The name of the active adapter."""
        return next(name for name, adapter in self._modules.items() if adapter is self._active)

    @property
    def is_routed(self) -> bool:
        """Whether each image has its own adapter, inside `rein.routed`."""
        return self._route is not None

    @property
    def in_use(self) -> tuple[Adapter, ...]:
        """The adapters that the next pass uses: the active one, or inside `rein.routed` those of its images."""
        return (self._active,) if self._route is None else self._route.adapters

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> Adapter:
        """The adapter of this name.

        Raises:
            InputError: there is none.
        """
        if name not in self:
            raise InputError(
                f"no adapter is named {one_line(repr(name))}; this model has {', '.join(map(repr, self.names))}. "
                "Add it with rein.load(model, file, name=...) or rein.wrap(model, config, name=...)."
            )
        return cast(Adapter, self._modules[name])

    def activate(self, name: str) -> None:
        """Let the adapter of this name refine every image from now on. Compiled code stays valid for adapters of the same shapes.

        Raises:
            InputError: no adapter has this name.
            WrapError: this is called inside `rein.routed`.
        """
        adapter = self[name]
        self.refuse_route("activate")
        # In __dict__, because nn.Module would register it twice. It is the module and not its name: torch.compile would make
        # a program for each name, but reads the parameters of modules when a program starts.
        self.__dict__["_active"] = adapter

    @contextmanager
    def active(self, name: str) -> Iterator[None]:
        """Context in which the adapter of this name is active. On exit, the one before is active again, unless it was deleted.

        Raises:
            InputError, WrapError: as `activate`.
        """
        before = self._active
        self.activate(name)
        try:
            yield
        finally:
            if before in self._modules.values():
                self.__dict__["_active"] = before

    def delete(self, name: str) -> None:
        """Remove the adapter of this name. Save it first with `rein.save(model, file, name=...)` to keep it.

        Raises:
            InputError: no adapter has this name, or it is the active one.
            WrapError: this is called inside `rein.routed`.
        """
        adapter = self[name]
        self.refuse_route("delete")
        if adapter is self._active:
            raise InputError(
                f"adapter {one_line(repr(name))} is active and cannot be deleted; call activate with another name first, or "
                "rein.unwrap(model) to remove all adapters."
            )
        del self._modules[name]

    def refuse_route(self, method: str) -> None:
        """Raise WrapError inside `rein.routed`."""
        if self._route is not None:
            raise WrapError(f"{method} was called inside rein.routed; leave that context first.")

    @property
    def config(self) -> ReinConfig:
        """The configuration of the active adapter."""
        return self._active.config

    @property
    def num_layers(self) -> int:
        """L, over all stages."""
        return self._active.num_layers

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of every layer, (L,)."""
        return self._active.widths

    def stage_of(self, layer: int) -> int:
        """Index of the stage that contains `layer`, both from 0."""
        return self._active.stage_of(layer)

    def queries(self) -> Tensor:
        """The queries of the active adapter, (m, q).

        Raises:
            InputError: the active adapter has none.
            WrapError: this is called inside `rein.routed`, where each image has its own.
        """
        if self._route is not None:
            raise WrapError(
                "queries was called inside rein.routed, where each image has the queries of its own adapter; expected one adapter "
                "for the batch. Call model.rein[name].queries() for each name, or use a decode head without queries."
            )
        return self._active.queries()

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """The parameters without weight decay in the authors' recipe: the tokens and s of every adapter."""
        return [parameter for name in self for parameter in self[name].no_decay_parameters()]

    def forward(
        self, x: Tensor, layer: int | None = None, num_prefix_tokens: int = 0, pass_cache: PassCache | None = None
    ) -> Tensor:
        """As `ReinAdapter.forward` of the active adapter; inside `rein.routed`, of each image's own."""
        if self._route is not None and layer is not None:
            return self._route(x, layer, num_prefix_tokens)
        return cast(Tensor, self._active(x, layer, num_prefix_tokens, pass_cache))

    def extra_repr(self) -> str:
        return f"active={self.active_name!r}"


def check_name(name: object) -> str:
    """Return `name` if an adapter may have it.

    Raises:
        InputError: it is not a text, or it could not be a part of a key in a state dict.
    """
    if not isinstance(name, str) or not name.isprintable() or name[:1] in ("", "_") or "." in name:
        raise InputError(
            f"name is {one_line(repr(name))}; expected a text without a dot that does not begin with an underscore. Pass a name such "
            "as 'night'."
        )
    if hasattr(NamedAdapters, name) or name == "training":
        raise InputError(
            f"name is {name!r}, which is an attribute of every module; expected another one. Pass a name such as 'night'."
        )
    return name


def adapters_in_use(adapter: Adapter | NamedAdapters) -> tuple[Adapter, ...]:
    """The adapters that the next pass of a model uses, given its `model.rein`."""
    return adapter.in_use if isinstance(adapter, NamedAdapters) else (adapter,)
