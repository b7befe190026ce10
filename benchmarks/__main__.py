"""Run benchmarks and write their results as JSON.

python -m benchmarks                                   # a sample of every benchmark, some minutes: runs/bench
python -m benchmarks throughput memory --full --out benchmarks/results/<machine>
python -m benchmarks throughput memory --full --device cuda --dtype bfloat16 --out benchmarks/results/<machine> --resume
python -m benchmarks.report                            # tables and plots from the committed results

Each benchmark writes one file: its command, its machine and its rows. A benchmark that fails writes none and is named at the end; the
others still run. With --resume, finished parts of an interrupted run are kept in NAME.parts.json, and the same command goes on after
them.
"""

import argparse
import gc
import importlib
import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import timm
import torch

import rein
from benchmarks.options import Options, Parts, check_device

NAMES = ("params", "throughput", "memory", "plan", "scaling", "routing", "files", "data", "recipe", "depth", "int8")


def machine(device: str) -> dict:
    """Hardware and versions, to compare results; nothing that identifies a person or a place."""
    facts = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    facts |= {"torch": torch.__version__, "timm": timm.__version__, "rein": rein.__version__}
    if torch.device(device).type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(path: Path, content: dict) -> None:
    """Write JSON with one row per line; the file is replaced at once."""
    rows = ",\n".join("  " + json.dumps(row) for row in content["rows"])
    head = json.dumps({key: value for key, value in content.items() if key != "rows"}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(head.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    os.replace(part, path)


def parts_of(name: str, options: Options) -> Parts:
    """The parts of a benchmark: title -> rows, which are measured when they are taken."""
    module = importlib.import_module(f"benchmarks.{name}")
    return module.parts(options) if hasattr(module, "parts") else iter([("all", module.rows(options))])


def rows_of(name: str, options: Options) -> Iterator[dict]:
    """All rows of a benchmark."""
    return chain.from_iterable(rows for _, rows in parts_of(name, options))


class OutOfTimeError(Exception):
    """The time that was given is over, and not everything is measured."""


def run(name: str, options: Options, out: Path, resume: bool = False, deadline: float = math.inf) -> None:
    """Run one benchmark: print each row when it is measured, and write all rows at the end.

    Args:
        name: name of the benchmark.
        options: its options.
        out: folder of the results.
        resume: keep every finished part, and use those that an earlier run of the same command on the same machine kept.
        deadline: start no part after this time of `time.monotonic`.

    Raises:
        OutOfTimeError: the deadline is over. With `resume`, the finished parts are kept.
    """
    amount = options.choose(" --tiny", "", " --full")
    command = f"python -m benchmarks {name}{amount} --device {options.device} --dtype {str(options.dtype).removeprefix('torch.')}"
    content = {"benchmark": name, "command": command, "machine": machine(options.device)}
    path, kept = out / f"{name}.json", out / f"{name}.parts.json"
    if resume and path.exists() and not kept.exists() and _same(json.loads(path.read_text(encoding="utf-8")), content):
        print(f"{name}: {path} is finished; delete it to measure it again", flush=True)
        return
    found = json.loads(kept.read_text(encoding="utf-8")) if resume and kept.exists() else {}
    seconds, rows = (found["seconds"], found["rows"]) if _same(found, content) else (0.0, [])
    done = {row["part"] for row in rows}
    for title, measured in parts_of(name, options):
        if title in done:
            continue
        if time.monotonic() > deadline:
            raise OutOfTimeError
        start = time.perf_counter()
        for row in measured:
            rows.append({"part": title, "row": row})
            print(f"{name}: {json.dumps(row)}", flush=True)
        seconds += time.perf_counter() - start
        gc.collect()
        if resume:
            write(kept, {**content, "seconds": seconds, "rows": rows})
    write(path, {**content, "seconds": round(seconds, 1), "rows": [row["row"] for row in rows]})
    kept.unlink(missing_ok=True)


def _same(found: dict, content: dict) -> bool:
    return all(found.get(key) == value for key, value in content.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"run only these of {', '.join(NAMES)}; default: all")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--full", action="store_true", help="run everything instead of a sample")
    amount.add_argument("--tiny", action="store_true", help="only try the code, at toy size")
    parser.add_argument("--device", default="cpu", help="run on cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="set the dtype of backbone and images"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="write the JSON files to this folder")
    parser.add_argument("--resume", action="store_true", help="keep finished parts, and go on after those of an interrupted run")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N", help="start no part after N minutes; exits with 3"
    )
    parsed = parser.parse_args(arguments)
    if unknown := sorted(set(parsed.names) - set(NAMES)):
        parser.error(f"unknown benchmark {', '.join(unknown)}; expected {', '.join(NAMES)}")
    kind = check_device(parser, parsed.device)
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
        (parsed.out / "try.part").write_text("")
        (parsed.out / "try.part").unlink()
    except OSError as error:
        parser.error(f"--out {parsed.out}: {error.strerror}; expected a folder that can be written to")
    options = Options(parsed.full, "cpu" if kind == "cpu" else parsed.device, getattr(torch, parsed.dtype), parsed.tiny)
    failed, deadline = [], time.monotonic() + 60 * parsed.minutes
    for name in parsed.names or NAMES:
        try:
            run(name, options, parsed.out, parsed.resume, deadline)
        except OutOfTimeError:
            again = "the same command goes on" if parsed.resume else "with --resume, it would have kept its finished parts"
            print(f"{name} is not finished after {parsed.minutes:g} minutes; {again}", file=sys.stderr)
            return 3
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
