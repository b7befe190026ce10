"""Domain generalisation: train each method on clear day only, and evaluate it on day and on unseen domains.

python -m benchmarks.generalisation streets --out benchmarks/results/MACHINE
python -m benchmarks.generalisation camvid --camvid FOLDER --out benchmarks/results/MACHINE
python -m benchmarks.generalisation mask2former --weights FILE --steps 2000 --device cuda
python -m benchmarks.generalisation --tiny                      # tries the code only: runs/generalisation-tiny

Every run is a recipe that `rein fit` and `rein test` execute. All methods have the same backbone (`rein.testing.pocket_vit`, or that
of --weights), the same head, the same number of steps and the same crops in the same order. The head's learning rate is found with
the frozen backbone, then each method's rate, on held-out SOURCE pairs of a seed that is not reported. Targets are evaluated once, at
the end.

Finished runs are kept in --work. The same command resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.__main__ import machine, write
from benchmarks.generalisation import data
from benchmarks.generalisation.plan import PLANS, lengthened, tiny
from benchmarks.generalisation.runs import draw_examples, run_plan, settings_of
from benchmarks.generalisation.tables import as_text
from benchmarks.options import check_device
from benchmarks.pocket import encoders
from rein.errors import InputError
from rein.testing.models import POCKET

BY_BLOCKS = "ablations"  # the plan that names blocks of pocket_vit
ON_GPU = 4  # processes that share a GPU; each has memory of its own there


def _encoder(parser: argparse.ArgumentParser, weights: Path) -> str:
    """Name of the encoder of an exported file."""
    try:
        return encoders.about(weights)["encoder"]
    except InputError as error:
        parser.error(f"--weights: {error}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.generalisation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    described = "; ".join(f"{plan.name!r}: {plan.about}" for plan in PLANS.values())
    parser.add_argument(
        "plans", nargs="*", metavar="PLAN", help=f"run only these. {described}. Default: all, camvid only with --camvid"
    )
    parser.add_argument(
        "--camvid", type=Path, metavar="FOLDER", help="read CamVid from this folder, which holds day_train, day_val and dusk_test"
    )
    parser.add_argument(
        "--work", type=Path, help="keep finished runs in this folder; default: runs/generalisation, or runs/generalisation-tiny"
    )
    parser.add_argument("--out", type=Path, help="write the results to this folder; default: --work")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="use this backbone, which benchmarks.pocket.pretrain exported; default: pocket_vit",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="train each run for N steps, and choose the rates with such runs")
    parser.add_argument("--device", default="cpu", help="train on cpu, cuda or cuda:N")
    parser.add_argument(
        "--workers",
        type=int,
        help=f"set the number of processes of one thread each; default: one for each core, {ON_GPU} with a GPU",
    )
    parser.add_argument("--tiny", action="store_true", help="only try the code, at toy size")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.plans if name not in PLANS]:
        parser.error(f"unknown plan {unknown[0]!r}; expected one of {', '.join(map(repr, PLANS))}")
    other = options.weights is not None and _encoder(parser, options.weights) != POCKET
    if other and BY_BLOCKS in options.plans:
        parser.error(f"the plan {BY_BLOCKS} names blocks of {POCKET}. Name other plans, or leave out --weights")
    fitting = {name: plan for name, plan in PLANS.items() if not (other and name == BY_BLOCKS)}
    names = options.plans or [name for name, plan in fitting.items() if plan.data != data.CAMVID or options.camvid]
    if options.camvid is None and any(PLANS[name].data == data.CAMVID for name in names):
        parser.error("camvid needs the folder of its frames. Pass --camvid FOLDER")
    if options.tiny and options.out:
        parser.error("--tiny gives no results to keep; leave out --out")
    for name in ("workers", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}; expected at least 1")
    if options.tiny and options.steps:
        parser.error("--tiny chooses the number of steps; leave out --steps")
    kind = check_device(parser, options.device)
    workers = options.workers or (os.cpu_count() or 1 if kind == "cpu" else ON_GPU)
    work = options.work or Path("runs/generalisation-tiny" if options.tiny else "runs/generalisation")
    for folder in (work, options.out or work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # found before the work
            parser.error(f"cannot make the folder {folder}: {error.strerror}")
    for name in names:
        plan = replace(PLANS[name], weights=options.weights, device=options.device)
        plan = tiny(plan) if options.tiny else lengthened(plan, options.steps) if options.steps else plan
        try:
            rows = run_plan(plan, work, options.camvid, workers)
        except InputError as error:
            print(f"benchmarks.generalisation: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(
                f"benchmarks.generalisation: interrupted; finished runs are in {work}; the same command resumes",
                file=sys.stderr,
            )
            return 130
        given = [repr(name) if " " in name else name] + (["--camvid FOLDER"] if plan.data == data.CAMVID else [])
        given += ["--weights FILE"] if options.weights else []
        given += [
            f"--{key} {value}"
            for key, value in (("steps", options.steps), ("device", options.device))
            if value not in (None, "cpu")
        ]
        content = {
            "benchmark": plan.benchmark,
            "command": " ".join(["python -m benchmarks.generalisation", *given, *(["--tiny"] if options.tiny else [])]),
            "fit_cpu_seconds": round(sum(row["fit_cpu_seconds"] for row in rows if "fit_cpu_seconds" in row)),
            "machine": machine(options.device) | {"threads": 1, "processes": workers},
            "about": plan.about,
            "source": "day",
            **settings_of(plan),
            "data": data.version(plan.data, options.camvid),
            "contenders": {contender.name: contender.facts() for contender in plan.contenders},
            "rows": rows,
        }
        path = (options.out or work) / f"{plan.benchmark}.json"
        write(path, content)
        picture = draw_examples(plan, content, work)
        print(f"{as_text(content)}\n{path}\n{picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
