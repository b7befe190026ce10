"""Pretrain `rein.testing.pocket_vit`, or a wider encoder, from a seed.

python -m benchmarks.pocket.pretrain --work FOLDER             # renders the pool, then trains; resumes a stopped run
python -m benchmarks.pocket.pretrain --work FOLDER --export    # writes the weights of the last checkpoint into the package
python -m benchmarks.pocket.pretrain --work FOLDER --encoder vit_small_patch8_224 --images 1500 --device cuda

Needs only the extra `train`: `pip install -e '.[train]'` in a clone. Labels are never read.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file

from benchmarks.options import check_device
from benchmarks.pocket import encoders
from benchmarks.pocket.masked import MaskedAutoencoder
from benchmarks.pocket.pool import make_pool
from benchmarks.pocket.views import crops, relight
from rein.errors import ReinError
from rein.testing.models import POCKET, POCKET_WEIGHTS

SIZES = ((128, 128), (96, 192))  # sizes of the crops, which alternate from step to step
PEAK_RATE, WARM_UP, WEIGHT_DECAY = 1e-3, 0.05, 0.05
SEEN_BY_DAY = 0.3  # share of the crops that the encoder sees by day, too
MOMENTUM, FIRST_MOMENTUM, FIRST_STEPS = 0.996, 0.99, 100  # of the teacher


def build(seed: int, encoder: str = POCKET, device: str = "cpu") -> tuple[MaskedAutoencoder, torch.optim.Optimizer]:
    """Build the model with random weights, which do not depend on the device, and its optimizer."""
    torch.manual_seed(seed)
    model = MaskedAutoencoder(encoders.build(encoder)).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int) -> float:
    """Cosine decay to zero, times a linear warm-up."""
    done = (step + 1) / steps
    return PEAK_RATE * min(1.0, done / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))


def train_step(
    model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, pool: np.ndarray, step: int, options: argparse.Namespace
) -> float:
    """Run one step and return the loss. Its random numbers depend only on the seed and the step, not on the device."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_000_007 + step)
    chosen = torch.randint(len(pool), (options.batch,), generator=generator)
    pairs = torch.from_numpy(np.stack([pool[number] for number in chosen.tolist()]))
    day, other = crops(pairs, SIZES[step % len(SIZES)], generator).split(3, 1)
    seen = torch.where(torch.rand(len(day), 1, 1, 1, generator=generator) < SEEN_BY_DAY, day, other)
    loss = model(relight(seen, generator).to(options.device), day.to(options.device), generator)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, options.steps)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([parameter for parameter in model.parameters() if parameter.requires_grad], 1.0)
    optimizer.step()
    model.update_teacher(FIRST_MOMENTUM if step < FIRST_STEPS else MOMENTUM)
    return loss.item()


def train(options: argparse.Namespace) -> None:
    """Train up to `options.steps`; resume from the last checkpoint, if there is one."""
    facts = {name: getattr(options, name) for name in ("encoder", "seed", "images", "batch", "steps", "device")}
    model, optimizer = build(options.seed, options.encoder, options.device)  # may refuse, so before the pool, which takes long
    pool = make_pool(options.work / f"pool-{options.seed}.npy", options.images, options.seed, options.threads)
    checkpoint = options.work / "checkpoint.pt"
    first, losses, started = 0, [], time.process_time()
    if checkpoint.exists():
        found = torch.load(checkpoint, weights_only=True, map_location="cpu")
        if found["facts"] != facts:
            raise SystemExit(f"{checkpoint} belongs to another run, {found['facts']}; expected {facts}. Choose another --work.")
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        first, started = found["step"], started - found["seconds"]
    last = min(options.steps, options.stop or options.steps)
    for step in range(first, last):
        losses.append(train_step(model, optimizer, pool, step, options))
        if (step + 1) % options.every == 0 or step + 1 == last:
            seconds = time.process_time() - started
            print(
                f"step {step + 1} of {options.steps}: loss {np.mean(losses):.4f}, {seconds:.0f} s of processor time", flush=True
            )
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": seconds}
            torch.save(state | {"facts": facts}, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            losses.clear()
        if options.keep and (step + 1) % options.keep == 0:
            encoder = {name: tensor.half().cpu() for name, tensor in model.encoder.state_dict().items()}
            torch.save({"encoder": encoder, "step": step + 1, "facts": facts}, options.work / f"step-{step + 1}.pt")


def export(work: Path, to: Path) -> None:
    """Write the encoder of the last checkpoint in float16; the header says which run made it."""
    if not (work / "checkpoint.pt").exists():
        raise SystemExit(f"{work} has no checkpoint.pt. Pretrain first, without --export.")
    found = torch.load(work / "checkpoint.pt", weights_only=True, map_location="cpu")
    encoder = found["facts"]["encoder"]
    if to == POCKET_WEIGHTS and encoder != POCKET:
        raise SystemExit(f"these are weights of {encoder}, not of {POCKET}. Export them to another file with --to.")
    if to == POCKET_WEIGHTS and found["step"] < found["facts"]["steps"]:
        raise SystemExit(
            f"the run is at step {found['step']} of {found['facts']['steps']}. Finish it, or export to another file with --to."
        )
    prefix = "encoder."
    tensors = {
        name.removeprefix(prefix): tensor.half().contiguous()
        for name, tensor in found["model"].items()
        if name.startswith(prefix)
    }
    about = {
        "what": f"{encoder}: a timm VisionTransformer, pretrained without labels on generated street scenes",
        "made_by": "benchmarks/pocket/pretrain.py",
        "license": "Apache-2.0",
        **found["facts"],
        "step": found["step"],
        "timm": timm.__version__,
        "torch": torch.__version__,
    }
    save_file(tensors, to, {"about": json.dumps(about)})  # one entry, since the order of several entries in the file is random
    print(f"{to}: {to.stat().st_size:,} bytes, step {found['step']} of {found['facts']['steps']}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keep the pool (4.7 GB) and the checkpoint in this folder")
    parser.add_argument("--export", action="store_true", help="write the weights of the last checkpoint and exit")
    parser.add_argument("--to", type=Path, help="write the exported weights to this file; default: the package's")
    parser.add_argument(
        "--encoder",
        default=POCKET,
        metavar="NAME",
        help="pretrain this VisionTransformer of timm with a class token; default: pocket_vit",
    )
    parser.add_argument("--device", default="cpu", help="train on cpu, cuda or cuda:N; images are prepared on the CPU")
    parser.add_argument("--images", type=int, default=24_000, help="set the number of pairs in the pool")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--stop", type=int, help="stop after this step; the schedule is still that of --steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--every", type=int, default=100, help="set the number of steps between checkpoints")
    parser.add_argument("--keep", type=int, metavar="N", help="also keep the encoder of every N-th step, for the probe's curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    for name in ("images", "steps", "stop", "batch", "every", "keep", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}; expected at least 1")
    if options.to and not options.export:
        parser.error("--to names the file of --export. Pass both")
    check_device(parser, options.device)
    torch.set_num_threads(options.threads)
    if options.export:
        export(options.work, options.to or POCKET_WEIGHTS)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        train(options)
    except (ReinError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
