"""LoRA on the query and value projections, and DoRA, through peft.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685: W x + (alpha / r) B A x, where B is
initially zero. Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv 2402.09353: the norms of the rows of the
updated W train too. Most attention layers of timm compute q, k and v in one linear layer `qkv`. It is first split into three,
so that each projection can be tuned alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rein import backbones
from rein.dgss.methods.common import (
    adapter_dtype,
    attentions,
    check_count,
    check_number,
    check_setting,
    replace_module,
    token_blocks,
)
from rein.dgss.methods.dry_run import dry_run
from rein.dgss.methods.frozen import FrozenModules
from rein.errors import UnsupportedBackboneError
from rein.extras import require

EXTRA = "peers"
_PROJECTIONS = ("q", "k", "v")


class SplitProjection(nn.Module):
    """Replaces a fused projection by three linear layers: (..., C) -> (..., q + k + v).

    The output equals that of the fused layer up to rounding, because three matrix products may sum in another order than one.

    Args:
        fused: a layer whose output is [q, k, v], three parts of equal width.
        biases: biases of q, k and v, if the attention stores them outside the layer; None uses those of the layer, if any.
    """

    def __init__(self, fused: nn.Linear, biases: Sequence[Tensor | None] | None = None) -> None:
        super().__init__()
        self.outside = biases is not None
        weights = fused.weight.detach().chunk(3)
        biases = biases if biases is not None else [None] * 3 if fused.bias is None else fused.bias.detach().chunk(3)
        layers = [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        self.q, self.k, self.v = layers

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., q + k + v)."""
        return torch.cat((self.q(x), self.k(x), self.v(x)), -1)

    def fused(self) -> nn.Linear:
        """One layer again, without the biases that the attention stores."""
        layers = (self.q, self.k, self.v)
        bias = None if self.outside or self.q.bias is None else torch.cat([layer.bias for layer in layers])
        return _linear(torch.cat([layer.weight for layer in layers]), bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def inject(
    backbone: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Sequence[str] = ("q", "v"),
    dora: bool = False,
) -> None:
    """Freeze the backbone and add low-rank updates to its projections `targets`, a selection of q, k and v.

    With `dora`, the norms of the rows of the updated weights train too.

    Raises:
        InputError: a setting is invalid.
        UnsupportedBackboneError: a block has no attention with known projections.
        MissingExtraError: peft is not installed.
    """
    check_count("lora", "rank", rank)
    check_number("lora", "alpha", alpha)
    check_number("lora", "dropout", dropout, below=1)
    valid = not isinstance(targets, str) and bool(targets) and set(targets) <= set(_PROJECTIONS)
    check_setting("lora", "targets", targets, valid, f"a list of one or more of {', '.join(_PROJECTIONS)}")
    check_setting("lora", "dora", dora, type(dora) is bool, "true or false")
    peft = require("peft", EXTRA)
    paths = [info.path for info in token_blocks(backbone, "lora")]
    for path in dict.fromkeys(paths):
        if not any(attentions(backbone.get_submodule(path), "lora")):
            raise UnsupportedBackboneError(
                f"block {path!r} of {backbones.architecture(backbone)} has no attention projection; lora expects linear layers qkv, "
                "or q_proj, k_proj and v_proj. Choose another backbone or method."
            )
    dry_run(backbone, "lora", lambda model: _split(model, paths))
    modules = list(backbone.modules())
    names = [f"{parent}.{layer}" for parent, layers in _split(backbone, paths).items() for layer in layers]
    training = backbone.training
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[name for name in names if name.rpartition(".")[2][0] in targets],
        bias="none",
        init_lora_weights=True,
        use_dora=dora,
    )
    peft.inject_adapter_in_model(config, backbone)
    for parameter in backbone.parameters():
        if parameter.requires_grad:  # peft creates them in the dtype of the frozen weights
            parameter.data = parameter.data.to(adapter_dtype(backbone))
    backbone.train(training)
    FrozenModules(backbone, modules).attach()


def _split(backbone: nn.Module, paths: list[str]) -> dict[str, list[str]]:
    """Split every fused projection.

    Returns:
        The names of the layers for q, k and v, keyed by the path of their parent module.
    """
    found: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        for inner, attention in list(attentions(backbone.get_submodule(path), "lora")):
            parent = f"{path}.{inner}" if inner else path
            if not isinstance(getattr(attention, "qkv", None), nn.Linear):
                found[parent] = ["q_proj", "k_proj", "v_proj"]
                continue
            biases = None
            if getattr(attention, "q_bias", None) is not None:
                # such attention adds these biases itself, in or after `qkv`; without them it just calls `qkv`
                biases = (attention.q_bias, None, attention.v_bias)
                attention.q_bias = attention.v_bias = None
            attention.qkv = SplitProjection(attention.qkv, biases)
            found[f"{parent}.qkv"] = ["q", "k", "v"]
    return found


@torch.no_grad()
def merge(backbone: nn.Module) -> bool:
    """Add the updates to the frozen weights and undo `inject`; returns whether there were any."""
    adapted = {path: layer for path, layer in backbone.named_modules() if hasattr(layer, "lora_A")}
    for path, layer in adapted.items():
        peft_layer: Any = layer
        peft_layer.merge(safe_merge=True)
        replace_module(backbone, path, peft_layer.get_base_layer())
    for path, split in list(backbone.named_modules()):
        if isinstance(split, SplitProjection):
            if split.outside:
                attention: Any = backbone.get_submodule(path.rpartition(".")[0])
                attention.q_bias, attention.v_bias = split.q.bias, split.v.bias
            replace_module(backbone, path, split.fused())
    if adapted:
        backbone.__dict__.pop("peft_config", None)
    return bool(adapted)
