"""The plans: which contenders are compared, on which data and budget."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from benchmarks.generalisation.contenders import ABLATIONS, CONTENDERS, CONTROLS, EVERYONE, LINKED, Contender
from benchmarks.generalisation.data import CAMVID, STREETS, Counts
from benchmarks.generalisation.trial import Budget

# Learning rates. A search starts with three and continues while the best one is the lowest or the highest so far. The head's rate is found
# with the frozen backbone and serves every contender; a method's rate is that of what it trains in the backbone.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FIRST_OF_HEAD, FIRST_OF_METHOD = (3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3)
FREEZE = "freeze"  # a part of every plan
CHOOSING = 900  # seed with which rates are chosen; it is not reported


@dataclass(frozen=True)
class Plan:
    """One table.

    Attributes:
        name: name of the table and its file.
        data: `streets` or `camvid`.
        contenders: its rows.
        head: one of `trial.HEADS`.
        budget: length of every run.
        counts: numbers of streets.
        seeds: seeds that are reported; each has streets, head, crops and order of its own.
        limit: at most this many frames of each kind of CamVid.
        about: what the table is there to show.
    """

    name: str
    data: str
    contenders: tuple[Contender, ...]
    head: str = "linear"
    budget: Budget = field(default_factory=Budget)
    counts: Counts = field(default_factory=Counts)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    limit: int | None = None
    about: str = ""

    @property
    def stem(self) -> str:
        """Its name in file names."""
        return self.name.replace(" ", "-")

    @property
    def benchmark(self) -> str:
        """What its results are called."""
        return f"generalisation-{self.stem}"


PLANS = {
    plan.name: plan
    for plan in (
        Plan("streets", STREETS, (*CONTENDERS, *ABLATIONS, *CONTROLS), about="generated streets, every method and ablation"),
        Plan("camvid", CAMVID, CONTENDERS, about="real frames, day to dusk"),
        Plan(
            "query link",
            STREETS,
            (EVERYONE[FREEZE], EVERYONE["rein zero-init"], LINKED),
            head="mask2former",
            budget=Budget(steps=300),
            about="the paper's head, small, with and without the link from tokens to queries",
        ),
    )
}


def tiny(plan: Plan) -> Plan:
    """The same at a size that only tries the code."""
    return replace(
        plan,
        contenders=plan.contenders[:2],
        budget=Budget(steps=2, batch=2, crop=32),
        counts=Counts(4, 2, 2),
        seeds=(0, 1),
        limit=4,
    )


def next_rate(found: dict[float, float]) -> float | None:
    """The rate to try next, or None when the best has a worse neighbour, or no neighbour, on either side.

    Args:
        found: rate -> mIoU on the source's validation pairs, of the first three at least.
    """
    place = RATES.index(best_rate(found))
    for neighbour in (place - 1, place + 1):
        if 0 <= neighbour < len(RATES) and RATES[neighbour] not in found:
            return RATES[neighbour]
    return None


def best_rate(found: dict[float, float]) -> float:
    """The rate with the highest mIoU; the smaller of equals."""
    return max(sorted(found), key=found.__getitem__)
