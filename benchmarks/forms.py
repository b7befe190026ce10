"""The forms that are compared: one frozen backbone, bare, refined in the published way and in rein's, and tuned by peers.

Every form of one backbone begins with the same weights, which are random: speed and memory do not depend on them.
"""

import copy
from collections.abc import Callable

import timm
import torch
from torch import nn

import rein
from benchmarks import published
from rein.dgss import methods


def backbone(name: str, size: int) -> nn.Module:
    """A bare backbone for images of size x size, frozen, without a classifier."""
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, img_size=size, num_classes=0)
    except TypeError:  # convolutional ones take any size
        model = timm.create_model(name, num_classes=0)
    return model.requires_grad_(False).eval()


def _merged(model: nn.Module) -> nn.Module:
    """LoRA with its updates added to the weights, as it is deployed: it cannot be trained on."""
    methods.apply("lora", model)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    return model.requires_grad_(False)


def _peer(method: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: methods.apply(method, model)


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(rein.wrap(model))


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "published": published.wrap,
    "rein": rein.wrap,
    "bare compiled": torch.compile,
    "rein compiled": _compiled,
    "lora": _peer("lora"),
    "lora merged": _merged,
    "vpt": _peer("vpt"),
    "adaptformer": _peer("adaptformer"),
    "full": _peer("full"),
}
DEPLOYED = ("lora merged",)  # forms that are not for training


def build(form: str, bare: nn.Module) -> nn.Module:
    """A copy of a bare backbone in one of `FORMS`."""
    return FORMS[form](copy.deepcopy(bare))
