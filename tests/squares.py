"""Images of coloured squares for detection and panoptic segmentation, and the code blocks of docs/other-tasks.md."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parent.parent / "docs/other-tasks.md"
COLOURS = {1: (0.9, 0.2, 0.1), 2: (0.1, 0.3, 0.9)}


def run_block(word):
    """Run the Python block of the page that has this word, and return its names."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if word in block)
    names = {}
    exec(compile(code, PAGE.name, "exec"), names)
    return names


def squares(count, generator):
    """Images (3, 64, 64) of one coloured square each, with box and class."""
    images, targets = [], []
    for number in range(count):
        left, top = torch.randint(0, 36, (2,), generator=generator).tolist()
        label = 1 + number % 2
        image = torch.full((3, 64, 64), 0.5) + 0.02 * torch.randn(3, 64, 64, generator=generator)
        image[:, top : top + 24, left : left + 24] = torch.tensor(COLOURS[label])[:, None, None]
        images.append(image.clamp(0, 1))
        targets.append({"boxes": torch.tensor([[left, top, left + 24, top + 24]]).float(), "labels": torch.tensor([label])})
    return images, targets
