"""Write the files of `format-2/`: an adapter, a segmenter and the numbers that they give. Run once, when the format was new.

    python tests/files/make_format_1.py

The files are committed and stay: every later version of rein must read them and give these numbers (`tests/test_versions.py`). No
number depends on a random generator, whose numbers may change with the version of torch.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import rein

FOLDER = Path(__file__).parent / "format-2"
CONFIG = rein.ReinConfig(num_tokens=5, rank=2, query_dim=8)


@torch.no_grad()
def fill(module, phase):
    """Give every parameter values of a sine wave."""
    for number, parameter in enumerate(module.parameters()):
        steps = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
        parameter.copy_(0.2 * torch.sin(0.7 * steps + number + phase))
    return module


def make_backbone():
    """A small ViT with known weights."""
    return fill(VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=0), 0.3).eval()


def make_images():
    """Images (2, 3, 16, 16)."""
    return torch.sin(0.05 * torch.arange(2 * 3 * 16 * 16, dtype=torch.float32)).reshape(2, 3, 16, 16)


def main():
    """Write the files."""
    FOLDER.mkdir()
    model = rein.wrap(make_backbone(), CONFIG)
    fill(model.rein, 0.8)
    segmenter = rein.Segmenter(
        model,
        fill(rein.heads.LinearHead(16, 3), 0.1),
        classes=["road", "sky", "car"],
        palette=[(128, 64, 128), (70, 130, 180), (0, 0, 142)],
        normalization=([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]),
    ).eval()
    segmenter.notes = {"sources": ["day"], "window": 16}
    rein.save(model, FOLDER / "adapter.safetensors")
    segmenter.save(FOLDER / "segmenter.safetensors")
    with torch.no_grad():
        numbers = {
            "features": model.forward_features(make_images()),
            "queries": model.rein.queries(),
            "logits": segmenter(make_images()),
        }
    save_file({name: tensor.contiguous() for name, tensor in numbers.items()}, FOLDER / "numbers.safetensors")


if __name__ == "__main__":
    sys.exit(main())
