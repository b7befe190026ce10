"""Does the order of the methods hold with a wider backbone, more steps and the paper's head?

python -m benchmarks.pocket.wider --device cuda --out benchmarks/results/MACHINE    # resumes a stopped run
python -m benchmarks.pocket.wider --tiny                                            # only tries the code

Pretrains timm's `vit_small_patch8_224` (21.5 M parameters, ten times those of `pocket_vit`) on generated pairs as `pocket_vit`,
probes it, and compares the methods with it: every method under a linear head, and those of the plan `mask2former` with 2,000 steps.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.generalisation.__main__ import main as generalise
from benchmarks.pocket import pretrain, probe

ENCODER = "vit_small_patch8_224"
PAIRS = 1_500  # give pocket_vit the same probe as 24,000
STEPS = 2_000  # of a run of the comparison under the paper's head


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="keep what is needed to resume in this folder; default: runs/wider, or runs/wider-tiny"
    )
    parser.add_argument("--out", type=Path, help="write the results to this folder; default: --work. Not used with --tiny")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="set the device of pretraining and comparison")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="set the number of processes, for the comparison and for rendering"
    )
    parser.add_argument("--tiny", action="store_true", help="only try the code, at toy size")
    options = parser.parse_args(arguments)
    work = options.work or Path("runs/wider-tiny" if options.tiny else "runs/wider")
    out = work if options.tiny else options.out or work
    weights = work / "wider.safetensors"
    amount = ["--images", "4", "--batch", "2", "--steps", "2"] if options.tiny else ["--images", str(PAIRS)]
    where = ["--work", str(work), "--encoder", ENCODER, "--device", options.device, "--threads", str(options.workers)]
    pretrain.main([*where, *amount])
    pretrain.main(["--work", str(work), "--export", "--to", str(weights)])
    out.mkdir(parents=True, exist_ok=True)
    probe.main(["--weights", str(weights), "--out", str(out / "wider-probe.json"), *(["--tiny"] if options.tiny else [])])
    common = ["--weights", str(weights), "--device", options.device, "--workers", str(options.workers), "--work", str(work)]
    if options.tiny:
        return generalise(["streets", "mask2former", "--tiny", *common])
    return generalise(["streets", *common, "--out", str(out)]) or generalise(
        ["mask2former", "--steps", str(STEPS), *common, "--out", str(out)]
    )


if __name__ == "__main__":
    raise SystemExit(main())
