"""`ReinConfig`: what to build. Frozen, validated, and the same in Python, in JSON and in the file format.

Only the standard library is imported here. The symbols m, r, q and s are those of the paper (arXiv 2312.04265).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from rein.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ReinConfig:
    """What the adapter is made of. The defaults are the authors' (2,990,081 parameters on a ViT-L).

    Args:
        num_tokens: m, learnable tokens per layer, at least 1. The first is a null slot: it takes part in the softmax and its
            column is then dropped, so a patch may match nothing.
        rank: r, rank of the tokens T = A B; `None` learns full tokens instead.
        query_dim: q, width of the queries that are linked to the tokens; `None` builds no queries and no parameters for them.
        use_softmax: similarity softmax(f T^T / sqrt(C)); with `False` the raw f T^T.
        scale_init: initial value of the learnable scale s.
        zero_init: the paper's text instead of the authors' code: W_f and b_f start at zero and s is the constant 1, so that a
            wrapped model starts equal to the bare one.
        share: one set of MLPs for all layers. With `False` (the paper's ablation) each layer has its own W_t, W_f and W_q; s is
            then the constant 1, because it can be absorbed into W_f, which starts `scale_init` times as large.

    Raises:
        InputError: a value of the wrong type or out of range.
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
                wanted = "a whole number of at least 1" + ("" if name == "num_tokens" else ", or None")
                raise InputError(f"ReinConfig.{name} is {value!r}; it must be {wanted}.")
        for name in ("use_softmax", "zero_init", "share"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"ReinConfig.{name} is {getattr(self, name)!r}; it must be True or False.")
        scale = self.scale_init
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < float("inf"):
            raise InputError(f"ReinConfig.scale_init is {scale!r}; it must be a finite number.")
        object.__setattr__(self, "scale_init", float(scale))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-safe dictionary; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReinConfig:
        """Build from `to_dict`'s dictionary.

        Raises:
            InputError: an unknown key, or a value that the constructor refuses.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(f"unknown ReinConfig keys {unknown}; known are {known}. Was the file written by a newer rein?")
        return cls(**values)

    @classmethod
    def preset(cls, name: str) -> ReinConfig:
        """The rows of the paper's ablation, each adding one idea to the row before.

        `"core"`: full tokens and MLPs of their own in every layer; `"link"`: with queries; `"share"`: MLPs shared by all
        layers; `"lowrank"`: low-rank tokens, which is the default configuration.

        Raises:
            InputError: another name.
        """
        if name not in _PRESETS:
            raise InputError(f"no preset is named {name!r}; there are {sorted(_PRESETS)}.")
        return _PRESETS[name]


_PRESETS = {
    "core": ReinConfig(rank=None, query_dim=None, share=False),
    "link": ReinConfig(rank=None, share=False),
    "share": ReinConfig(rank=None),
    "lowrank": ReinConfig(),
}
