"""`ReinConfig`: configuration of the adapter, with the same fields in Python, in JSON and in the adapter file.

This module imports the standard library only. The symbols m, r, q and s are the paper's (arXiv 2312.04265).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from rein.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ReinConfig:
    """Configuration of the adapter, immutable and validated. The defaults are the authors' (2,990,081 parameters on a ViT-L).

    Args:
        num_tokens: m, number of learnable tokens per layer, at least 1. The first token is a null slot: it is part of the
            softmax but has no value, so a patch can match no token.
        rank: r, rank of the tokens T = A B. `None` learns full tokens T.
        query_dim: q, width of the queries that are computed from the tokens. `None` builds no queries.
        use_softmax: use the similarity softmax(f T^T / sqrt(C)). `False` uses the raw f T^T.
        scale_init: initial value of the learnable scale s.
        zero_init: follow the paper's text instead of the authors' code: W_f and b_f start at zero and s is the constant 1. A
            wrapped model then starts equal to the bare model.
        share: share the MLPs between all layers. With `False` (the paper's ablation) each layer has its own W_t, W_f and W_q, and
            s is the constant 1. W_f then starts `scale_init` times as large.

    Raises:
        InputError: a value has the wrong type or is out of range.
    """

    num_tokens: int = 100
    rank: int | None = 16
    query_dim: int | None = 256
    use_softmax: bool = True
    scale_init: float = 1e-3
    zero_init: bool = False
    share: bool = True

    def __post_init__(self) -> None:
        for name in ("num_tokens", "rank", "query_dim"):
            value = getattr(self, name)
            if value is None and name != "num_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                expected = "a whole number of at least 1" + ("" if name == "num_tokens" else ", or None")
                raise InputError(f"ReinConfig.{name} is {value!r}; it must be {expected}.")
        for name in ("use_softmax", "zero_init", "share"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"ReinConfig.{name} is {getattr(self, name)!r}; it must be True or False.")
        scale = self.scale_init
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < float("inf"):
            raise InputError(f"ReinConfig.scale_init is {scale!r}; it must be a finite number.")
        object.__setattr__(self, "scale_init", float(scale))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that JSON can store. `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReinConfig:
        """Build a configuration from the dictionary of `to_dict`.

        Raises:
            InputError: a key is unknown or a value is invalid.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(
                f"unknown ReinConfig keys {unknown}; known keys are {known}. If a newer version of rein wrote them, upgrade rein."
            )
        return cls(**values)

    @classmethod
    def preset(cls, name: str) -> ReinConfig:
        """A configuration of the paper's ablation. Each one adds a component to the previous one.

        `"core"`: full tokens, and separate MLPs in every layer; `"link"`: also queries; `"share"`: MLPs shared by all layers;
        `"lowrank"`: low-rank tokens, the default configuration.

        Raises:
            InputError: there is no preset of this name.
        """
        if name not in _PRESETS:
            raise InputError(f"no preset is named {name!r}; choose one of {sorted(_PRESETS)}.")
        return _PRESETS[name]


_PRESETS = {
    "core": ReinConfig(rank=None, query_dim=None, share=False),
    "link": ReinConfig(rank=None, share=False),
    "share": ReinConfig(rank=None),
    "lowrank": ReinConfig(),
}
