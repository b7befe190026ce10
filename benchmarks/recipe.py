"""The paper's cost table: a training step and an inference with the Mask2Former head, by method.

The authors trained DINOv2-L with crops of 512 and batches of 4 for 40,000 steps. Full fine-tuning took 11.2 h and 14.7 GB, Rein 9.5 h
and 10.0 GB (arXiv 2312.04265). A step here is the forward pass, the loss with matching, the backward pass and AdamW.
`hours_of_40000_steps` is 40,000 times its median. In half precision, autocast keeps the weights in float32; the loss is not scaled.
"""

import contextlib
from collections.abc import Iterator

import timm
import torch

import rein
from benchmarks import summary, timing
from benchmarks.options import Options, Parts
from benchmarks.throughput import peak
from rein.dgss import methods

STEPS = 40_000
METHODS = ("full", "freeze", "rein")
PAPER = {"full": {"paper_hours": 11.2, "paper_gigabytes": 14.7}, "rein": {"paper_hours": 9.5, "paper_gigabytes": 10.0}}

# backbone, side in pixels, images, repeats, settings of the head
TINY = [("test_vit", 64, 1, 1, {"channels": 64, "decoder_layers": 3, "encoder_layers": 1, "num_points": 64})]
SAMPLE = [("vit_small_patch14_dinov2", 256, 1, 3, {})]
FULL_CPU = [("vit_small_patch14_dinov2", 512, 1, 5, {})]
FULL_GPU = [
    (f"vit_{name}_patch14_dinov2", size, batch, 20, {})
    for name in ("large", "base", "small")
    for size, batch in ((512, 4), (1024, 1), (512, 1))
]


def segmenter(name: str, size: int, method: str, settings: dict) -> rein.Segmenter:
    """A backbone with patch size 16, adapted by a method, with the paper's head."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, patch_size=16, img_size=size, num_classes=0)
    width, depth = backbone.embed_dim, len(backbone.blocks)
    linked = {"query_dim": settings.get("channels", 256)} if method == "rein" else {}
    methods.apply(method, backbone, **linked)
    if not linked:
        settings = {"num_queries": 100, **settings}
    head = rein.heads.Mask2FormerHead([width] * 4, num_classes=19, **settings)
    indices = [max(0, (depth * (number + 1)) // 4 - 1) for number in range(4)]
    return rein.Segmenter(backbone, head, indices=indices)


def parts(options: Options) -> Parts:
    for name, size, batch, repeats, settings in options.choose(TINY, SAMPLE, FULL_CPU if options.device == "cpu" else FULL_GPU):
        for method in METHODS:
            yield (
                f"{name}, {size} pixels, {batch} images, {method}",
                measure(name, size, batch, repeats, settings, method, options),
            )


def measure(name: str, size: int, batch: int, repeats: int, settings: dict, method: str, options: Options) -> Iterator[dict]:
    """A row for the training step, and one for inference."""
    images = torch.randn(batch, 3, size, size, device=options.device)
    labels = torch.randint(0, 19, (batch, size, size), device=options.device)
    model = segmenter(name, size, method, settings).to(options.device)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    half = options.dtype != torch.float32
    precision = torch.autocast(torch.device(options.device).type, options.dtype) if half else contextlib.nullcontext()

    def train():
        model.train()
        with precision:
            loss = model(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def infer():
        model.eval()
        with precision, torch.no_grad():
            model(images)

    for step, run in (("training", train), ("inference", infer)):
        times = timing.interleaved({method: run}, repeats, options.device)[method]
        row = {"model": name, "size": size, "batch": batch, "method": method, "step": step, "repeats": repeats}
        seconds = summary.median(times)
        row |= {"seconds": seconds, "seconds_quartiles": summary.quartiles(times, 4)}
        row |= {"images_per_second": round(batch / seconds, 3)}
        if step == "training":
            row["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            row["hours_of_40000_steps"] = round(STEPS * seconds / 3600, 2)
            if (name, size, batch) == ("vit_large_patch14_dinov2", 512, 4):
                row |= PAPER.get(method, {})
        if options.device != "cpu":
            row["peak_bytes"] = peak(run, options.device) + torch.cuda.memory_allocated(options.device)
        yield row
