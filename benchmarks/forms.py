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
    patches = {"patch_size": 16} if "patch14" in name and size % 14 else {}  # as the paper does
    try:
        model = timm.create_model(name, img_size=size, num_classes=0, **patches)
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


class _Product(nn.Module):
    """A product of every token with a C x C matrix, added to the tokens: what no exact form of Rein after a block can do without."""

    def __init__(self, like: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(like.shape[-1], like.shape[-1], device=like.device, dtype=like.dtype))

    def forward(self, module: nn.Module, inputs: object, tokens: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(tokens, tokens, self.weight.expand(len(tokens), -1, -1))


def _one_product(model: nn.Module) -> nn.Module:
    """The measured ceiling: the bare backbone with one C x C product per block, whose matrices train."""
    like = next(iter(model.blocks.parameters())).new_empty(1, model.embed_dim)
    model.products = nn.ModuleList(_Product(like) for _ in model.blocks)
    for block, product in zip(model.blocks, model.products, strict=True):
        block.register_forward_hook(product)
    return model


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "one product": _one_product,
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
