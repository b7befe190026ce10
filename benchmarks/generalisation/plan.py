"""The plans: which contenders are compared, on which data and budget."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.generalisation.contenders import (
    ABLATIONS,
    CONTENDERS,
    CONTROLS,
    CORE,
    EVERYONE,
    FAST_LINKED,
    FREE,
    LINKED,
    SCHEDULED,
    UNSCHEDULED,
    Contender,
)
from benchmarks.generalisation.data import CAMVID, STREETS, Counts
from benchmarks.generalisation.trial import Budget

# Learning rates. A search starts with the first ones and continues while the best one is the lowest or the highest so far. The head's
# rate is found with the frozen backbone and applies to every contender. A method's rate applies to what it trains in the backbone.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FIRST_OF_HEAD, FIRST_OF_METHOD = (3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FEWER = (1e-3, 3e-3, 1e-2)  # the best rates of most methods in the plan `streets`
FREEZE = "freeze"  # contender that every plan contains
CHOOSING = 900  # seed of the runs that choose rates; not reported


@dataclass(frozen=True)
class Plan:
    """One table.

    Attributes:
        name: name of the table and its file.
        data: `streets` or `camvid`.
        contenders: rows of the table.
        head: one of `trial.HEADS`.
        budget: length of every run.
        choosing: length of the runs that choose rates, where it differs.
        counts: numbers of streets.
        seeds: reported seeds, each with different streets, head weights, crops and order.
        first: rates with which the search of a method starts.
        limit: maximum number of CamVid frames of each kind.
        about: what the table shows.
        weights: file of another backbone, which `benchmarks.pocket.pretrain` exported.
        device: `cpu`, `cuda` or `cuda:N`.
    """

    name: str
    data: str
    contenders: tuple[Contender, ...]
    head: str = "linear"
    budget: Budget = field(default_factory=Budget)
    choosing: Budget | None = None
    counts: Counts = field(default_factory=Counts)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    first: tuple[float, ...] = FIRST_OF_METHOD
    limit: int | None = None
    about: str = ""
    weights: Path | None = None
    device: str = "cpu"

    @property
    def stem(self) -> str:
        """The plan's name in file names."""
        return self.name.replace(" ", "-")

    def budget_of(self, seed: int) -> Budget:
        """Length of the runs of a seed."""
        return self.choosing or self.budget if seed == CHOOSING else self.budget

    @property
    def benchmark(self) -> str:
        """Name of the results."""
        return f"generalisation-{self.stem}" + ("" if self.weights is None else f"-{self.weights.stem}")


def _named(*names: str) -> tuple[Contender, ...]:
    return tuple(EVERYONE[name] for name in names)


PLANS = {
    plan.name: plan
    for plan in (
        Plan("streets", STREETS, (*CONTENDERS, CORE, *CONTROLS), about="generated streets, every method"),
        Plan(
            "ablations",
            STREETS,
            (*_named(FREEZE, "rein", "rein zero-init"), CORE, *ABLATIONS),
            first=FEWER,
            about="generated streets, what might widen Rein's gain: its scale, the rate of its tokens, its blocks",
        ),
        Plan(
            "schedules",
            STREETS,
            (EVERYONE[FREEZE], *UNSCHEDULED, *SCHEDULED),
            about="Rein, LoRA, DoRA and SoMA, each with and without the weight average and the annealed decay of SoMA's recipes",
        ),
        Plan(
            "long",
            STREETS,
            _named(FREEZE, "full", "rein"),
            budget=Budget(steps=2000),
            choosing=Budget(),
            about="generated streets, five times as many steps, with the rates of 400 steps",
        ),
        Plan(
            "fpn",
            STREETS,
            _named(FREEZE, "full", "lora", "rein"),
            head="fpn",
            first=FEWER,
            about="generated streets, a small FPN head",
        ),
        Plan(
            "mask2former",
            STREETS,
            (*_named(FREEZE, "full", "lora"), LINKED, FAST_LINKED, FREE),
            head="mask2former",
            about="generated streets, the paper's head, small, with and without the link from tokens to queries",
        ),
        Plan(
            "camvid",
            CAMVID,
            _named(FREEZE, "full", "lora", "adaptformer", "rein"),
            first=FEWER,
            about="real frames, day to dusk",
        ),
    )
}


def lengthened(plan: Plan, steps: int) -> Plan:
    """The plan with runs of another length, for which the rates are chosen anew."""
    about = f"the plan {plan.name} with {steps} steps, for which the rates are chosen"
    return replace(plan, name=f"{plan.name} {steps} steps", budget=replace(plan.budget, steps=steps), choosing=None, about=about)


def tiny(plan: Plan) -> Plan:
    """The plan at toy size, to try the code."""
    return replace(
        plan,
        contenders=plan.contenders[:2],
        budget=Budget(steps=2, batch=2, crop=32),
        choosing=None,
        first=FEWER,
        counts=Counts(4, 2, 2),
        seeds=(0, 1),
        limit=4,
    )


def next_rate(found: dict[float, float]) -> float | None:
    """The rate to try next, or None if both neighbours of the best rate were tried; the first and the last rate have only one.

    Args:
        found: rate -> mIoU on the source's validation pairs; holds at least the first rates.
    """
    best = RATES.index(best_rate(found))
    for neighbour in (best - 1, best + 1):
        if 0 <= neighbour < len(RATES) and RATES[neighbour] not in found:
            return RATES[neighbour]
    return None


def best_rate(found: dict[float, float]) -> float:
    """The rate with the highest mIoU; the smallest one of a tie."""
    return max(sorted(found), key=found.__getitem__)
