"""Execution of a plan's runs. Finished runs are kept, and read when the plan is run again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.generalisation import data, trial
from benchmarks.generalisation.contenders import EVERYONE as CONTENDERS_BY_NAME
from benchmarks.generalisation.contenders import Contender
from benchmarks.generalisation.plan import CHOOSING, FIRST_OF_HEAD, FREEZE, Plan, best_rate, next_rate
from benchmarks.generalisation.trial import Rates
from benchmarks.pocket import encoders
from rein.dgss.evaluation.comparison import compare
from rein.dgss.training.task import DivergedError
from rein.errors import InputError
from rein.testing.models import POCKET_WEIGHTS

SHOWN = ("freeze", "full", "rein")  # contenders in the picture of examples


def backbone_facts(weights: Path | None = None) -> dict[str, Any]:
    """The backbone and its weights: step of their pretraining, and a digest."""
    path = weights or POCKET_WEIGHTS
    about = encoders.about(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return {"name": about["encoder"], "step": about["step"], "steps": about["steps"], "sha256": digest}


def data_section(plan: Plan, seed: int, work: Path, camvid: Path | None, targets: bool = True) -> dict[str, Any]:
    """The `data` section of a recipe for one seed; real frames are the same for all seeds."""
    if plan.data == data.STREETS:
        return data.streets(seed, plan.counts, work / "data", targets)
    if camvid is None:
        raise InputError("the folder of CamVid is missing. Pass it with --camvid FOLDER.")
    return data.camvid(camvid, work / "data", plan.limit, targets)


def settings_of(plan: Plan, seed: int = 0) -> dict[str, Any]:
    """Settings on which the results of a seed of a plan depend."""
    budget = plan.budget_of(seed)
    what = {"head": plan.head, "budget": asdict(budget), "counts": asdict(plan.counts), "limit": plan.limit}
    what |= {} if plan.device == "cpu" else {"device": plan.device}
    return {"backbone": backbone_facts(plan.weights), **what}


def run_folder(plan: Plan, name: str, rates: Rates, seed: int, work: Path) -> Path:
    """The folder of a run, which holds `row.json` if the run is finished. Plans share the runs that they have in common."""
    stem = f"{name}-{rates.head:g}-{rates.method:g}-{seed}".replace(" ", "-").replace(",", "")
    backbone = "" if plan.weights is None else f"-{plan.weights.stem}"
    return work / f"{plan.data}-{plan.head}-{plan.budget_of(seed).steps}{backbone}" / stem


def one_run(plan: Plan, name: str, rates: Rates, seed: int, work: Path, camvid: Path | None) -> dict[str, Any]:
    """Execute a run, or read its figures if it is finished."""
    contender = CONTENDERS_BY_NAME[name]
    facts = {**settings_of(plan, seed), "data": data.version(plan.data, camvid), "contender": contender.facts()}
    folder = run_folder(plan, name, rates, seed, work)
    finished = folder / "row.json"
    if finished.exists():
        try:
            found = json.loads(finished.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{finished} is damaged ({error}). Delete it to repeat the run.") from error
        if found["facts"] != facts:
            raise InputError(f"{finished} was made with other settings, weights or data. Choose another --work.")
        return found["row"]
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    choosing = seed == CHOOSING
    section = data_section(plan, seed, work, camvid, targets=not choosing)
    config = trial.configuration(
        contender, plan.head, section, plan.budget_of(seed), rates, seed, folder, plan.weights, plan.device
    )
    row = {"purpose": "choose" if choosing else "evaluate", "contender": name}
    row |= {"head_rate": rates.head, "rate": rates.method, "seed": seed}
    try:
        row |= trial.run(config)
    except DivergedError as error:
        row |= {"validation_miou": 0.0, "diverged": str(error)}
        if not choosing:  # such a model recognises nothing
            row |= {"tuned_parameters": 0, "miou": {domain["title"]: 0.0 for domain in section["targets"]}}
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # hundreds of runs would fill the disk
    part = folder / "row.part"
    part.write_text(json.dumps({"facts": facts, "row": row}), encoding="utf-8")
    os.replace(part, finished)
    return row


def prepare(plan: Plan, seed: int, work: Path, camvid: Path | None) -> None:
    """Render or read the data of a seed, once for all processes."""
    torch.set_num_threads(1)
    data_section(plan, seed, work, camvid, targets=seed != CHOOSING)


def run_plan(plan: Plan, work: Path, camvid: Path | None, workers: int) -> list[dict[str, Any]]:
    """Execute all runs of a plan in several processes of one thread each.

    The head's rate is found first, with the frozen backbone, then each method's rate. A method is evaluated when its rate is found.
    """
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(), plan.device)) as pool:
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
                    search.add(each.result())
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


def _begin(parent: int, device: str) -> None:
    """Start a worker process: see the CPU alone if that is the device, leave Ctrl-C to the parent process, and end when it ends."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Search:
    """Search for rates: which runs of a plan can start, given the finished ones."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.rows = plan, list[dict[str, Any]]()
        self._returned: set[tuple[str, Rates, int]] = set()

    def add(self, row: dict[str, Any]) -> None:
        """Add a finished run."""
        self.rows.append(row)

    def due(self) -> list[tuple[str, Rates, int]]:
        """Contender, rates and seed of the runs that can start now; each is returned once."""
        wanted = [run for contender in self.plan.contenders for run in self._of(contender)]
        new = [run for run in dict.fromkeys(wanted) if run not in self._returned]
        self._returned.update(new)
        return new

    def _of(self, contender: Contender) -> Iterator[tuple[str, Rates, int]]:
        head = None if contender.head_alone else self._best(FREEZE)
        if not contender.head_alone and head is None:
            return
        best = self._best(contender.name)
        for rate in self._to_try(contender) if best is None else ():
            yield contender.name, Rates(head or rate, rate), CHOOSING
        if best is not None:
            for seed in self.plan.seeds:
                yield contender.name, Rates(head or best, best), seed

    def _to_try(self, contender: Contender) -> tuple[float, ...]:
        first = FIRST_OF_HEAD if contender.head_alone else self.plan.first
        tried = self._tried(contender.name)
        if not set(first) <= set(tried):
            return first
        more = next_rate(tried)
        return () if more is None else (more,)

    def _best(self, name: str) -> float | None:
        """The best rate of a contender, or None while its search goes on."""
        contender = next(each for each in self.plan.contenders if each.name == name)
        tried = self._tried(name)
        return best_rate(tried) if tried and not self._to_try(contender) else None

    def _tried(self, name: str) -> dict[float, float]:
        done = [row for row in self.rows if row["contender"] == name and row["purpose"] == "choose"]
        return {row["rate"]: row["validation_miou"] for row in done}


def draw_examples(plan: Plan, content: dict[str, Any], work: Path) -> Path | None:
    """Draw predictions of the contenders in `SHOWN` for the first seed; returns the picture, or None if none of them is finished."""
    rates = {row["contender"]: Rates(row["head_rate"], row["rate"]) for row in content["rows"] if row["purpose"] == "evaluate"}
    folders = {name: run_folder(plan, name, rates[name], plan.seeds[0], work) for name in SHOWN if name in rates}
    folders = {name: folder for name, folder in folders.items() if (folder / "test" / "results.json").exists()}
    if not folders:
        return None
    out = work / plan.benchmark.replace("generalisation", "examples", 1)
    compare(list(folders.values()), out, list(folders))
    return out / "panel.png"
