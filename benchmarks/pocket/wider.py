"""Does the order of the methods hold with a wider backbone, more steps and the paper's head?

python -m benchmarks.pocket.wider --device cuda --out benchmarks/results/MACHINE    # resumes a stopped run
python -m benchmarks.pocket.wider --tiny                                            # only tries the code

Pretrains timm's `vit_small_patch8_224` (21.5 M parameters, ten times those of `pocket_vit`) on 1,500 generated pairs, probes it, and
compares the methods with it: every method under a linear head, and those of the plan `mask2former` with 2,000 steps.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch

from benchmarks.generalisation.__main__ import main as generalise
from benchmarks.options import check_device
from benchmarks.pocket import encoders, pretrain, probe

ENCODER = "vit_small_patch8_224"
PAIRS = 1_500  # gave `pocket_vit` the probe of 24,000 within 0.1 points, up to step 2,000
STEPS = 2_000  # of a run of the comparison under the paper's head


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; what is finished is not repeated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="keep what is needed to resume in this folder; default: runs/wider, or runs/wider-tiny"
    )
    parser.add_argument("--out", type=Path, help="write the results to this folder; default: --work. Not used with --tiny")
    parser.add_argument("--device", default="cpu", help="pretrain and compare on cpu, cuda or cuda:N")
    parser.add_argument("--workers", type=int, help="set the number of processes of the comparison")
    parser.add_argument("--tiny", action="store_true", help="only try the code, at toy size")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers {options.workers}; expected at least 1")
    work = options.work or Path("runs/wider-tiny" if options.tiny else "runs/wider")
    out = work if options.tiny else options.out or work
    out.mkdir(parents=True, exist_ok=True)
    device, tiny = ["--device", options.device], ["--tiny"] if options.tiny else []
    weights, probed = work / "wider.safetensors", work / "wider-probe.json"  # together, so that they fit each other
    if not weights.exists():
        amount = ["--images", "4", "--batch", "2", "--steps", "2"] if options.tiny else ["--images", str(PAIRS)]
        pretrain.main(["--work", str(work), "--encoder", ENCODER, "--threads", str(os.cpu_count()), *device, *amount])
        pretrain.main(["--work", str(work), "--export", "--to", str(weights)])
        if options.device != "cpu":
            torch.cuda.empty_cache()
    print(f"{weights}: {encoders.about(weights)}", flush=True)
    if not probed.exists():
        probe.main(["--weights", str(weights), "--out", str(probed), *device, *tiny])
    if out != work:
        shutil.copy(probed, out)
    common = ["--weights", str(weights), "--work", str(work), *device]
    common += [] if options.workers is None else ["--workers", str(options.workers)]
    if options.tiny:
        return generalise(["streets", "mask2former", *tiny, *common])
    common += ["--out", str(out)]
    return generalise(["streets", *common]) or generalise(["mask2former", "--steps", str(STEPS), *common])


if __name__ == "__main__":
    raise SystemExit(main())
