"""The compared methods, which tune the same backbone under the same decode head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: name of the row.
        method: one of `rein.dgss.methods.METHODS`.
        settings: settings of the method.
        pretrained: use the backbone's pretrained weights; otherwise random ones.
        about: what the row shows.
        scheduled: average the weights and anneal the weight decay, as in the recipes of SoMA.
        token_factor: learning rate of Rein's tokens, as a multiple of that of the rest of the adapter.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    about: str = ""
    scheduled: bool = False
    token_factor: float = 1.0

    @property
    def head_alone(self) -> bool:
        """Whether nothing in the backbone trains."""
        return self.method == "freeze"

    def facts(self) -> dict[str, Any]:
        """The settings that the results depend on."""
        facts = {"method": self.method, "settings": dict(self.settings), "pretrained": self.pretrained}
        facts |= {"scheduled": True} if self.scheduled else {}
        return facts if self.token_factor == 1 else {**facts, "token_factor": self.token_factor}


QUERY_DIM = 64  # of the small Mask2Former head
# The authors' s = 0.001 is the default; the paper's text starts with W_f = 0 and has no s.
_TEXT = {"query_dim": None, "zero_init": True}
_FREE = {"query_dim": None}

CONTENDERS = (
    Contender("freeze", "freeze", about="the head alone"),
    Contender("full", "full", about="every weight"),
    Contender("lora", "lora", about="rank 8 updates of query and value projections"),
    Contender("vpt", "vpt", about="150 prompt tokens in every block"),
    Contender("adaptformer", "adaptformer", about="a bottleneck of 64 beside every MLP"),
    Contender(
        "rein", "rein", about="the default, as rein.wrap(vit) gives it: the authors' initialisation, random W_f and s = 0.001"
    ),
    Contender("rein zero-init", "rein", _TEXT, about="the paper's text: W_f = 0, no s"),
)
CORE = Contender("rein core", "rein-core", _TEXT, about="full tokens, separate MLPs in every layer")
ABLATIONS = (
    Contender(
        "rein s=0.1", "rein", {**_FREE, "scale_init": 0.1}, about="the authors' initialisation with a scale 100 times as large"
    ),
    Contender("rein fast tokens", "rein", _TEXT, token_factor=10, about="ten times the rate for the tokens"),
    Contender("rein late", "rein", {**_TEXT, "blocks": [4, 5, 6, 7]}, about="in the last half of the blocks only"),
)
LINKED = Contender(
    "rein linked", "rein", {"query_dim": QUERY_DIM}, about="the head's queries linked to the tokens, as in the paper"
)
FAST_LINKED = Contender(
    "rein linked, fast tokens",
    "rein",
    {"query_dim": QUERY_DIM},
    token_factor=10,
    about="linked, with ten times the rate for the tokens",
)
FREE = Contender("rein free", "rein", _FREE, about="the head's queries of its own")
CONTROLS = (
    Contender("freeze, random weights", "freeze", pretrained=False, about="a head on random features"),
    Contender("full, random weights", "full", pretrained=False, about="training from scratch"),
)
_LORA, _REIN = (next(each for each in CONTENDERS if each.name == name) for name in ("lora", "rein"))
UNSCHEDULED = (
    _REIN,
    _LORA,
    Contender("dora", "lora", {"dora": True}, about="lora with learnable norms of the updated rows"),
    Contender("soma", "soma", about="the 16 smallest singular components of every matrix in the last two thirds of the blocks"),
)
SCHEDULED = tuple(
    replace(each, name=f"{each.name}, scheduled", about="the same with average and annealed decay", scheduled=True)
    for each in UNSCHEDULED
)
EVERYONE = {
    each.name: each for each in (*CONTENDERS, CORE, *ABLATIONS, LINKED, FAST_LINKED, FREE, *CONTROLS, *UNSCHEDULED, *SCHEDULED)
}
