"""The forms that are compared: one frozen backbone, bare, with the published refinement, with rein, and with other tuning methods.

All forms of a backbone have the same random weights: speed and memory do not depend on them.
"""

import copy
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import nn

import rein
from benchmarks import published
from rein.dgss import methods


def backbone(name: str, size: int) -> nn.Module:
    """A frozen bare backbone without a classifier, for images of size x size."""
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, img_size=size, num_classes=0)
    except TypeError:  # convolutional backbones have no img_size and accept any size
        model = timm.create_model(name, num_classes=0)
    return model.requires_grad_(False).eval()


def _merged(model: nn.Module) -> nn.Module:
    """LoRA with its updates merged into the weights, as it is deployed; it cannot be trained."""
    methods.apply("lora", model)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    return model.requires_grad_(False)


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(rein.wrap(model))


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "published": published.wrap,
    "rein": rein.wrap,
    "bare compiled": torch.compile,
    "rein compiled": _compiled,
    "lora": partial(methods.apply, "lora"),
    "lora merged": _merged,
    "vpt": partial(methods.apply, "vpt"),
    "adaptformer": partial(methods.apply, "adaptformer"),
    "full": partial(methods.apply, "full"),
}
DEPLOYED = ("lora merged",)  # forms for inference only


def build(form: str, bare: nn.Module) -> nn.Module:
    """A copy of a bare backbone in one of `FORMS`."""
    return FORMS[form](copy.deepcopy(bare))
