"""Run benchmarks and keep their results as JSON.

python -m benchmarks                                   # a sample of all, some minutes: runs/bench
python -m benchmarks throughput memory --full --out benchmarks/results/<machine>
python -m benchmarks throughput memory --full --device cuda --dtype bfloat16 --out benchmarks/results/<machine>
python -m benchmarks.report                            # tables and plots again from the committed results

One file per benchmark: what it ran on, with which command, and rows. A benchmark that fails is named at the end; the others' files
stay. With --tiny only the code is tried.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path

import timm
import torch

import rein
from benchmarks.options import Options

NAMES = ("params", "throughput", "memory", "scaling", "files", "data", "recipe")


def machine(device: str) -> dict:
    """What ran: enough to compare two results, nothing that names a person or a place."""
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
    """As JSON, one row a line, replaced as a whole."""
    rows = ",\n".join("  " + json.dumps(row) for row in content["rows"])
    head = json.dumps({key: value for key, value in content.items() if key != "rows"}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(head.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    os.replace(part, path)


def run(name: str, options: Options, out: Path) -> None:
    """One benchmark: its rows are printed as they come, and written when all are there."""
    start, rows = time.perf_counter(), []
    for row in importlib.import_module(f"benchmarks.{name}").rows(options):
        rows.append(row)
        print(f"{name}: {json.dumps(row)}", flush=True)
    amount = options.choose(" --tiny", "", " --full")
    command = f"python -m benchmarks {name}{amount} --device {options.device} --dtype {str(options.dtype).removeprefix('torch.')}"
    content = {"benchmark": name, "command": command, "seconds": round(time.perf_counter() - start, 1)}
    write(out / f"{name}.json", {**content, "machine": machine(options.device), "rows": rows})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all of them without one")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--full", action="store_true", help="everything, not a sample")
    amount.add_argument("--tiny", action="store_true", help="so little that only the code is tried")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of backbone and images")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON files")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.names) - set(NAMES)):
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    try:
        kind = torch.empty(0, device=given.device).device.type
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "try.part").write_text("")
        (given.out / "try.part").unlink()
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {given.device}: {str(error).splitlines()[0]}")
    except OSError as error:
        parser.error(f"--out {given.out}: {error.strerror}; it must be a folder that can be written to")
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device {given.device}: times and memory are measured on cpu and cuda")
    options = Options(given.full, "cpu" if kind == "cpu" else given.device, getattr(torch, given.dtype), given.tiny)
    failed = []
    for name in given.names or NAMES:
        try:
            run(name, options, given.out)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
