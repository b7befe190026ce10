"""int8 weights of the frozen backbone (torchao, weight only): size, speed, and what they cost in mIoU on the demo's domains.

The segmenters are those of `rein demo`: Rein on pocket_vit with a linear head, trained on generated clear days. Each is evaluated on
every domain with its weights in float32, and again with the frozen ones in int8. Forms of the speed rows: eager PyTorch and
onnxruntime, each with both kinds of weights.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor

import rein
from benchmarks import summary, timing
from benchmarks.options import Options
from rein.dgss import commands, demo, recipes
from rein.export import export_segmenter, quantize_backbone
from rein.testing import pocket_vit

CLASSES = 19


def rows(options: Options) -> Iterator[dict]:
    """Size and speed for each backbone; mIoU of every seed and domain."""
    if options.device != "cpu":
        raise ValueError(f"device is {options.device}; expected cpu, because onnxruntime and torch are compared there.")
    for name, size in options.choose(
        [("pocket_vit", 32)], [("pocket_vit", 128)], [("pocket_vit", 128), ("vit_small_patch16_224", 224)]
    ):
        yield from speed_rows(name, size, options.choose(1, 5, 15))
    for seed in range(options.choose(1, 1, 3)):
        yield from quality_rows(seed, options.choose(2, 100, 400), options.choose(8, 80, 160))


def speed_rows(name: str, size: int, repeats: int) -> Iterator[dict]:
    """Bytes of the backbone's weights, and seconds for one image, with each kind of weights."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, size, size)
    runs: dict[str, Callable[[], object]] = {}
    stored, files = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("float32", "int8"):
            backbone = rein.wrap(pocket_vit() if name == "pocket_vit" else timm.create_model(name, num_classes=0))
            segmenter = rein.Segmenter(backbone, rein.heads.LinearHead([backbone.embed_dim], CLASSES)).eval()
            if kind == "int8":
                quantize_backbone(segmenter)
            frozen = [parameter for parameter in backbone.parameters() if not parameter.requires_grad]
            stored[kind] = sum(sum(part.nbytes for part in stored_tensors(parameter)) for parameter in frozen)
            path = Path(folder) / f"{kind}.onnx"
            files[kind] = export_segmenter(segmenter, path, size=(size, size)).bytes
            runs[f"eager {kind}"] = eager(segmenter, images)
            runs[f"onnxruntime {kind}"] = onnx(path, images.numpy())
        for kind in stored:
            yield {"measure": "size", "model": name, "weights": kind, "frozen_bytes": stored[kind], "onnx_bytes": files[kind]}
        found = timing.interleaved(runs, repeats)
        for form, times in found.items():
            row = {"measure": "speed", "model": name, "size": size, "form": form, "repeats": repeats}
            cost = timing.cost_percent(times, found[f"{form.split()[0]} float32"])
            row |= {"seconds": summary.median(times), "seconds_quartiles": summary.quartiles(times, 5)}
            yield {**row, "cost_percent_quartiles": summary.quartiles(cost)}


def stored_tensors(parameter: Tensor) -> list[Tensor]:
    """The tensors that are stored for a parameter: those of its int8 form, or itself."""
    names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
    return [getattr(parameter, name) for name in names] or [parameter]


def eager(segmenter: rein.Segmenter, images: Tensor) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return segmenter(images)

    return run


def onnx(path: Path, images: np.ndarray) -> Callable[[], object]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its idle threads would slow eager PyTorch down
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": images})


def quality_rows(seed: int, steps: int, scenes: int) -> Iterator[dict]:
    """MIoU in per cent of one trained segmenter on each target, with each kind of weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = demo.configurations(demo.Options(out=Path(folder), steps=steps, scenes=scenes, seed=seed, full=False))["rein"]
        text = recipes.to_yaml({**config, "out": folder}, "a run of benchmarks.int8")
        commands.run(["fit", "--config", text], quiet=True)
        tested = commands.run(["test", "--config", text], quiet=True)
        model, found = tested.model, {}
        for kind in ("float32", "int8"):
            if kind == "int8":
                quantize_backbone(model.segmenter)
                tested.trainer.test(model, datamodule=tested.datamodule, verbose=False)
            found[kind] = [100 * model.confusions[index].mean_iou() for index in sorted(model.confusions)]
        for index, domain in enumerate(config["data"]["targets"]):
            row = {"measure": "mIoU", "seed": seed, "steps": steps, "domain": domain["title"]}
            yield {**row, **{kind: round(values[index], 3) for kind, values in found.items()}}
