"""All runs of a plan: each is kept as soon as it is done, and found again when the plan is run again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.generalisation import data, trial
from benchmarks.generalisation.contenders import EVERYONE, Contender
from benchmarks.generalisation.pictures import examples
from benchmarks.generalisation.plan import CHOOSING, FIRST_OF_HEAD, FIRST_OF_METHOD, FREEZE, Plan, best_rate, next_rate
from benchmarks.generalisation.trial import Rates
from rein.dgss.domains import Domains
from rein.dgss.task import DivergedError
from rein.errors import InputError
from rein.testing.models import POCKET_WEIGHTS

SHOWN = ("freeze", "rein zero-init", "full")  # whose predictions of the first seed are kept for the panel


def backbone_facts() -> dict[str, Any]:
    """Which weights: the run that made them, its step, and a digest."""
    with safe_open(POCKET_WEIGHTS, "pt") as file:
        about = json.loads(file.metadata()["about"])
    digest = hashlib.sha256(POCKET_WEIGHTS.read_bytes()).hexdigest()[:16]
    return {"name": "pocket_vit", "step": about["step"], "steps": about["steps"], "sha256": digest}


def domains(plan: Plan, seed: int, work: Path, camvid: Path | None, judged: bool = True) -> Domains:
    """The data of one seed; real frames are the same for all."""
    if plan.data == data.STREETS:
        return data.streets(seed, plan.counts, work / "data", judged)
    if camvid is None:
        raise InputError("camvid wants a folder.")
    found = data.camvid(camvid, work / "data", plan.limit)
    return found if judged else replace(found, tests={})


def settled(plan: Plan) -> dict[str, Any]:
    """What a kept run must have been made with."""
    what = {"head": plan.head, "budget": asdict(plan.budget), "counts": asdict(plan.counts), "limit": plan.limit}
    return {"backbone": backbone_facts(), **what}


def kept_at(plan: Plan, name: str, rates: Rates, seed: int, work: Path) -> Path:
    """The file of a run; predictions are beside it."""
    stem = f"{name}-{rates.head:g}-{rates.method:g}-{seed}".replace(" ", "-").replace(",", "")
    return work / plan.stem / f"{stem}.json"


def one_run(plan: Plan, name: str, rates: Rates, seed: int, work: Path, camvid: Path | None) -> dict[str, Any]:
    """Do a run, or find it kept."""
    kept, contender = kept_at(plan, name, rates, seed, work), EVERYONE[name]
    facts = {**settled(plan), "data": data.version(plan.data, camvid), "contender": contender.made_of()}
    if kept.exists():
        try:
            found = json.loads(kept.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{kept} is damaged ({error}); delete it, and it is run again.") from error
        if found["made_with"] != facts:
            raise InputError(f"{kept} was made with other settings, weights or data; give another --work.")
        return found["row"]
    torch.set_num_threads(1)
    choosing = seed == CHOOSING
    pairs = domains(plan, seed, work, camvid, judged=not choosing)
    try:
        row, segmenter = trial.run(contender, plan.head, pairs, plan.budget, rates, seed)
    except DivergedError as error:
        row = {"contender": name, "head_rate": rates.head, "rate": rates.method, "seed": seed, "validation_miou": 0.0}
        row |= {"diverged": str(error)}
        if not choosing:  # it recognises nothing
            row |= {"tuned_parameters": 0, "miou": dict.fromkeys(pairs.tests, 0.0)}
    row = {"purpose": "choose" if choosing else "judge", **row}
    kept.parent.mkdir(parents=True, exist_ok=True)
    if seed == plan.seeds[0] and name in SHOWN and "diverged" not in row:
        shown = {domain: trial.example(segmenter, pairs, domain).numpy() for domain in pairs.tests}
        np.savez_compressed(kept.with_suffix(".npz"), **shown)
    part = kept.with_suffix(f".part-{os.getpid()}")
    part.write_text(json.dumps({"made_with": facts, "row": row}), encoding="utf-8")
    os.replace(part, kept)
    return row


def prepare(plan: Plan, seed: int, work: Path, camvid: Path | None) -> None:
    """Render or read the data of a seed, so that no two processes do."""
    torch.set_num_threads(1)
    domains(plan, seed, work, camvid, judged=seed != CHOOSING)


def run_plan(plan: Plan, work: Path, camvid: Path | None, workers: int) -> list[dict[str, Any]]:
    """All runs of a plan, over several processes of one thread each.

    The head's rate is searched first, with the frozen backbone; then each method's; what a method has found is judged at once.
    """
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(),)) as pool:
        seeds = [CHOOSING, *plan.seeds] if plan.data == data.STREETS else [plan.seeds[0]]
        search = Search(plan)
        waiting: dict[Future[dict[str, Any]], None] = {}
        try:
            for ready in [pool.submit(prepare, plan, seed, work, camvid) for seed in seeds]:
                ready.result()
            while True:
                for name, rates, seed in search.due():
                    waiting[pool.submit(one_run, plan, name, rates, seed, work, camvid)] = None
                if not waiting:
                    break
                for each in wait(waiting, return_when=FIRST_COMPLETED).done:
                    del waiting[each]
                    search.take(each.result())
                    print(f"{plan.name}: {time.monotonic() - started:.0f} s, {json.dumps(each.result())}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    order = [contender.name for contender in plan.contenders]
    return sorted(
        search.rows, key=lambda row: (order.index(row["contender"]), row["purpose"], row["head_rate"], row["rate"], row["seed"])
    )


def _begin(parent: int) -> None:
    """Compute on the CPU, leave Ctrl-C to the process that started this one, and end with it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Search:
    """Which runs of a plan are due, given those that are done."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.rows = plan, list[dict[str, Any]]()
        self._asked: set[tuple[str, Rates, int]] = set()

    def take(self, row: dict[str, Any]) -> None:
        """A run is done."""
        self.rows.append(row)

    def due(self) -> list[tuple[str, Rates, int]]:
        """Contender, rates and seed of the runs that can start now; each is named once."""
        wanted = [run for contender in self.plan.contenders for run in self._of(contender)]
        new = [run for run in dict.fromkeys(wanted) if run not in self._asked]
        self._asked.update(new)
        return new

    def _of(self, contender: Contender) -> Iterator[tuple[str, Rates, int]]:
        head = None if contender.head_alone else self._found(FREEZE)
        if not contender.head_alone and head is None:
            return
        best = self._found(contender.name)
        for rate in self._to_try(contender) if best is None else ():
            yield contender.name, Rates(head or rate, rate), CHOOSING
        if best is not None:
            for seed in self.plan.seeds:
                yield contender.name, Rates(head or best, best), seed

    def _to_try(self, contender: Contender) -> tuple[float, ...]:
        first = FIRST_OF_HEAD if contender.head_alone else FIRST_OF_METHOD
        tried = self._tried(contender.name)
        if not set(first) <= set(tried):
            return first
        more = next_rate(tried)
        return () if more is None else (more,)

    def _found(self, name: str) -> float | None:
        """The best rate of a contender, once the search for it has ended."""
        contender = next(each for each in self.plan.contenders if each.name == name)
        tried = self._tried(name)
        return best_rate(tried) if tried and not self._to_try(contender) else None

    def _tried(self, name: str) -> dict[float, float]:
        done = [row for row in self.rows if row["contender"] == name and row["purpose"] == "choose"]
        return {row["rate"]: row["validation_miou"] for row in done}


def draw_examples(plan: Plan, content: dict[str, Any], work: Path, camvid: Path | None) -> Path:
    """A picture of what some contenders predict, beside the kept runs."""
    seed = plan.seeds[0]
    rates = {row["contender"]: Rates(row["head_rate"], row["rate"]) for row in content["rows"] if row["purpose"] == "judge"}
    kept = {name: kept_at(plan, name, rates[name], seed, work).with_suffix(".npz") for name in SHOWN if name in rates}
    kept = {name: file for name, file in kept.items() if file.exists()}
    path = work / plan.stem / "examples.png"
    examples(content, domains(plan, seed, work, camvid), kept, seed, path)
    return path
