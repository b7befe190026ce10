"""Who takes part: ways to tune the same backbone under the same head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import rein
from rein import backbones
from rein.dgss import methods
from rein.testing import pocket_vit


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: of the row.
        method: one of `rein.dgss.methods.METHODS`.
        settings: of the method.
        blocks: where Rein refines, as a part of the depth, from and to.
        pretrained: whether the backbone has its weights, or random ones.
        about: what it is there to show.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[float, float] = (0, 1)
    pretrained: bool = True
    about: str = ""

    @property
    def head_alone(self) -> bool:
        """Whether nothing in the backbone trains."""
        return self.method == "freeze"

    def made_of(self) -> dict[str, Any]:
        """Everything that its results depend on."""
        where = {"blocks": list(self.blocks), "pretrained": self.pretrained}
        return {"method": self.method, "settings": dict(self.settings), **where}

    def backbone(self) -> nn.Module:
        """A tuned `pocket_vit`; random weights are drawn from torch's random state."""
        vit = pocket_vit(self.pretrained)
        if self.blocks == (0, 1):
            return methods.apply(self.method, vit, **self.settings)
        sites = backbones.find_sites(vit)
        first, last = (round(part * len(sites)) for part in self.blocks)
        return rein.wrap(vit, rein.ReinConfig(**self.settings), blocks=[site.path for site in sites[first:last]])


# No query link but where it is asked for. The authors' s = 0.001 is the default; the paper's text has W_f = 0 at the start, and no s.
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
    Contender("rein core", "rein-core", _TEXT, about="full tokens, MLPs of their own in every layer"),
    Contender("rein share", "rein-share", _TEXT, about="full tokens, shared MLPs"),
    Contender("rein m=25 r=4", "rein", {**_TEXT, "num_tokens": 25, "rank": 4}, about="fewer tokens, lower rank"),
    Contender("rein no tokens", "rein", {**_TEXT, "num_tokens": 1, "rank": 1}, about="the shared linear layer alone"),
    Contender("rein s=0.1", "rein", {**_REIN, "scale_init": 0.1}, about="the authors' initialisation, a hundred times the scale"),
    Contender("rein raw", "rein", {**_TEXT, "use_softmax": False}, about="similarity without softmax"),
    Contender("rein late", "rein", _TEXT, blocks=(0.5, 1), about="in the last half of the blocks only"),
)
LINKED = Contender("rein linked", "rein", {**_TEXT, "query_dim": QUERY_DIM}, about="the head's queries linked to the tokens")
CONTROLS = (
    Contender("freeze, random weights", "freeze", pretrained=False, about="what the head makes of random features"),
    Contender("full, random weights", "full", pretrained=False, about="training from scratch"),
)
EVERYONE = {contender.name: contender for contender in (*CONTENDERS, *ABLATIONS, LINKED, *CONTROLS)}
