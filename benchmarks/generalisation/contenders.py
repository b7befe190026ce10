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
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    about: str = ""
    scheduled: bool = False

    @property
    def head_alone(self) -> bool:
        """Whether nothing in the backbone trains."""
        return self.method == "freeze"

    def facts(self) -> dict[str, Any]:
        """The settings that the results depend on."""
        facts = {"method": self.method, "settings": dict(self.settings), "pretrained": self.pretrained}
        return {**facts, "scheduled": True} if self.scheduled else facts


# Without the query link, unless stated. The authors' s = 0.001 is the default; the paper's text starts with W_f = 0 and has no s.
QUERY_DIM = 64
_REIN = {"query_dim": None}
_TEXT = {**_REIN, "zero_init": True}

CONTENDERS = (
    Contender("freeze", "freeze", about="the head alone"),
    Contender("full", "full", about="every weight"),
    Contender("lora", "lora", about="rank 8 updates of query and value projections"),
    Contender("vpt", "vpt", about="150 prompt tokens in every block"),
    Contender("adaptformer", "adaptformer", about="a bottleneck of 64 beside every MLP"),
    Contender("rein", "rein", _REIN, about="the authors' initialisation: random W_f, s = 0.001"),
    Contender("rein zero-init", "rein", _TEXT, about="the paper's text: W_f = 0, no s"),
)
ABLATIONS = (
    Contender("rein core", "rein-core", _TEXT, about="full tokens, separate MLPs in every layer"),
    Contender("rein share", "rein-share", _TEXT, about="full tokens, shared MLPs"),
    Contender("rein m=25 r=4", "rein", {**_TEXT, "num_tokens": 25, "rank": 4}, about="fewer tokens, lower rank"),
    Contender("rein no tokens", "rein", {**_TEXT, "num_tokens": 1, "rank": 1}, about="the shared linear layer alone"),
    Contender(
        "rein s=0.1", "rein", {**_REIN, "scale_init": 0.1}, about="the authors' initialisation with a scale 100 times as large"
    ),
    Contender("rein raw", "rein", {**_TEXT, "use_softmax": False}, about="similarity without softmax"),
    Contender("rein late", "rein", {**_TEXT, "blocks": [4, 5, 6, 7]}, about="in the last half of the blocks only"),
)
LINKED = Contender("rein linked", "rein", {**_TEXT, "query_dim": QUERY_DIM}, about="the head's queries linked to the tokens")
CONTROLS = (
    Contender("freeze, random weights", "freeze", pretrained=False, about="a head on random features"),
    Contender("full, random weights", "full", pretrained=False, about="training from scratch"),
)
_LORA, _REIN_ZERO_INIT = (next(each for each in CONTENDERS if each.name == name) for name in ("lora", "rein zero-init"))
UNSCHEDULED = (
    _REIN_ZERO_INIT,
    _LORA,
    Contender("dora", "lora", {"dora": True}, about="lora with learnable norms of the updated rows"),
    Contender("soma", "soma", about="the 16 smallest singular components of every matrix in the last two thirds of the blocks"),
)
SCHEDULED = tuple(
    replace(each, name=f"{each.name}, scheduled", about="the same with average and annealed decay", scheduled=True)
    for each in UNSCHEDULED
)
EVERYONE = {contender.name: contender for contender in (*CONTENDERS, *ABLATIONS, LINKED, *CONTROLS, *UNSCHEDULED, *SCHEDULED)}
