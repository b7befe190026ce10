"""The estimate of `rein plan` against the measured peak of training steps.

The first step makes the optimizer's state; the second one is measured, without what is allocated before it. The estimate of the same
is `gradients` and `activations` of `rein.dgss.planning.Memory`. `peak_of` names the source of the measured peak: the allocator on a
GPU, the resident memory of a fresh process on a CPU. Random weights and images; the labels have all classes.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

import torch

from benchmarks.memory import on_gpu, peak_of_process, return_freed_memory
from benchmarks.options import Options, Parts
from benchmarks.throughput import peak
from rein.dgss import planning, recipes
from rein.dgss.training.experiment import Experiment

SMALL_HEAD = {"encoder_layers": 2, "decoder_layers": 3, "channels": 64, "encoder_feedforward": 128, "decoder_feedforward": 128}
CASES = {  # title -> model, crop, images
    "pocket_vit, Rein, linear": ({"backbone": "pocket_vit", "head": "LinearHead"}, 128, 8),
    "ViT-S, frozen, linear": ({"method": "freeze", "head": "LinearHead"}, 512, 8),
    "ViT-S, Rein, linear": ({"head": "LinearHead"}, 512, 4),
    "ViT-S, Rein, FPN": ({"head": "FPNHead"}, 512, 2),
    "ViT-S, Rein, Mask2Former": ({"method_settings": {"query_dim": 256}}, 512, 1),
    "ViT-S, full, FPN": ({"method": "full", "head": "FPNHead"}, 512, 2),
    "ViT-S, full, FPN, checkpointing": ({"method": "full", "head": "FPNHead", "gradient_checkpointing": True}, 512, 2),
    "ViT-B, full, linear": ({"backbone": "vit_base_patch16_224", "method": "full", "head": "LinearHead"}, 224, 4),
}
RECIPES = ("gtav-dinov2-l-rein", "gtav-dinov2-l-full", "gtav-dinov2-l-lora", "gtav-eva02-l-rein", "gtav-dinov2-b-rein")


def parts(options: Options) -> Parts:
    """A part for each configuration."""
    for title, config in configurations(options).items():
        yield title, rows(title, config, options)


def configurations(options: Options) -> dict[str, dict]:
    """The configurations by title: the paper's recipes on a GPU, small models on a CPU."""
    if options.choose(False, False, on_gpu(options)):
        return {name: recipes.resolve(name) for name in RECIPES}
    chosen = list(CASES)[: options.choose(1, 4, len(CASES))]
    return {title: configuration(*CASES[title]) for title in chosen}


def configuration(model: dict, crop: int, batch: int) -> dict:
    """A configuration of a training step in float32."""
    section = {"backbone": "vit_small_patch16_224", "img_size": crop, "method": "rein", **model}
    if section["backbone"] == "pocket_vit":
        del section["img_size"]
    return {"model": section, "data": {"crop": crop, "batch_size": batch}, "trainer": {"precision": "32-true"}}


def rows(title: str, config: dict, options: Options) -> Iterator[dict]:
    """Estimate and measurement of one configuration."""
    step, batch = planning.step_of(config), planning.batch_of(config)
    found = step.memory(batch)
    row = {"case": title, "crop": step.crop, "batch": batch, "precision": step.precision}
    row |= {"estimated_bytes": found.gradients + found.activations}
    if on_gpu(options):
        measured = measure(config, options.device)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=return_freed_memory) as pool:
            measured = pool.submit(measure, config, options.device).result()
    row |= measured
    if measured["peak_bytes"] is not None:
        row["error_percent"] = round(100 * (row["estimated_bytes"] / measured["peak_bytes"] - 1), 2)
    yield row


def measure(config: dict, device: str) -> dict:
    """Peak memory of the second training step, in bytes."""
    step, batch = planning.step_of(config), planning.batch_of(config)
    experiment = Experiment(num_classes=planning.NUM_CLASSES, **{**config["model"], "pretrained": False, "weights": None})
    experiment.to(device)
    segmenter = experiment.segmenter.train()
    trained = [parameter for parameter in segmenter.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)  # the default on a GPU
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 3, step.crop, step.crop), generator=random, dtype=torch.uint8).to(device)
    labels = (torch.arange(step.crop**2).reshape(step.crop, step.crop) // 7 % planning.NUM_CLASSES).to(torch.uint8)
    labels = labels.expand(batch, -1, -1).contiguous().to(device)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(step.precision)

    def run() -> None:
        with torch.autocast(device, half) if half else nullcontext():
            loss = segmenter(experiment.normalize(images), labels.long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    run()
    if torch.device(device).type == "cuda":
        return {"peak_bytes": peak(run, device), "peak_of": "torch.cuda.max_memory_allocated"}
    return peak_of_process(run)
