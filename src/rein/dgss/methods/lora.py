"""LoRA on the query and value projections, and DoRA, through peft.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685: W x + (alpha / r) B A x, B zero at the
start. Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv 2402.09353: the lengths of the updated rows of W
train besides. Timm's attention mostly has one layer `qkv` for three projections; that is first split, so that each can be tuned by
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rein import backbones
from rein.dgss.methods.frozen import Frozen, adapter_dtype, block_sites, check_count, check_number, rehearse
from rein.errors import InputError, UnsupportedBackboneError
from rein.extras import require

EXTRA = "peers"
_PARTS = ("q", "k", "v")


class SplitProjection(nn.Module):
    """Three layers in the place of one: (..., C) -> (..., q + k + v).

    The values are those of the fused layer to rounding: three products may sum in another order than one.

    Args:
        fused: a layer whose output is [q, k, v], each a third.
        biases: of q, k and v where they are kept apart from the layer; None where it has its own or none.
    """

    def __init__(self, fused: nn.Linear, biases: Sequence[Tensor | None] | None = None) -> None:
        super().__init__()
        weights = fused.weight.detach().chunk(3)
        biases = biases if biases is not None else [None] * 3 if fused.bias is None else fused.bias.detach().chunk(3)
        parts = [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        self.q, self.k, self.v = parts

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        return torch.cat((self.q(x), self.k(x), self.v(x)), -1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def install(
    backbone: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Sequence[str] = ("q", "v"),
    dora: bool = False,
) -> None:
    """Give the projections `targets`, of q, k and v, low-rank updates; with `dora`, learned lengths of the updated rows too.

    Raises:
        InputError: a setting that cannot be.
        UnsupportedBackboneError: a block without attention whose projections are known.
        MissingExtraError: peft is not installed.
    """
    check_count("lora", "rank", rank)
    check_number("lora", "alpha", alpha)
    check_number("lora", "dropout", dropout, below=1)
    if isinstance(targets, str) or not targets or not set(targets) <= set(_PARTS):
        raise InputError(f"lora: targets is {targets!r}; it must be a list of one or more of {', '.join(_PARTS)}.")
    if type(dora) is not bool:
        raise InputError(f"lora: dora is {dora!r}; it must be true or false.")
    peft = require("peft", EXTRA)
    paths = [site.path for site in block_sites(backbone, "lora")]
    for path in dict.fromkeys(paths):
        if not any(_attentions(backbone.get_submodule(path))):
            raise UnsupportedBackboneError(
                f"lora tunes projections of attention, qkv or q_proj and v_proj; block {path!r} of "
                f"{backbones.architecture(backbone)} has none."
            )
    rehearse(backbone, "lora", lambda twin: _split(twin, paths))
    modules = list(backbone.modules())
    names = [f"{attention}.{part}" for attention, parts in _split(backbone, paths).items() for part in parts]
    wanted = [name for name in names if name.rpartition(".")[2][0] in targets]
    training = backbone.training
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=wanted,
        bias="none",
        init_lora_weights=True,
        use_dora=dora,
    )
    peft.inject_adapter_in_model(config, backbone)
    for parameter in backbone.parameters():
        if parameter.requires_grad:  # peft made them like the weights beside them
            parameter.data = parameter.data.to(adapter_dtype(backbone))
    backbone.train(training)
    Frozen(backbone, modules).attach()


def _attentions(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of a block that project to q, k and v, with their paths in it."""
    for path, module in block.named_modules():
        fused, *apart = (getattr(module, name, None) for name in ("qkv", "q_proj", "k_proj", "v_proj"))
        if isinstance(fused, nn.Linear):
            proj = getattr(module, "proj", None)
            width = proj.in_features if isinstance(proj, nn.Linear) else None
            if fused.out_features != 3 * (width or 0) or getattr(module, "head_first", False):
                raise UnsupportedBackboneError(
                    f"lora must know which outputs of {path}.qkv are q, k and v; in a {type(module).__name__} they are no three "
                    f"equal parts: it gives {fused.out_features}, the attention is {width} wide."
                )
            yield path, module
        elif all(isinstance(layer, nn.Linear) for layer in apart):
            yield path, module


def _split(backbone: nn.Module, paths: list[str]) -> dict[str, list[str]]:
    """Split every fused projection; the paths of what holds the projections, with their names there."""
    found: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        for inner, attention in list(_attentions(backbone.get_submodule(path))):
            where = f"{path}.{inner}" if inner else path
            if not isinstance(getattr(attention, "qkv", None), nn.Linear):
                found[where] = ["q_proj", "k_proj", "v_proj"]
                continue
            biases = None
            if getattr(attention, "q_bias", None) is not None:
                # some attention adds biases that it holds itself; without them it calls the layer, as it must be called here
                biases = (attention.q_bias, None, attention.v_bias)
                attention.q_bias = attention.v_bias = None
            attention.qkv = SplitProjection(attention.qkv, biases)
            found[f"{where}.qkv"] = ["q", "k", "v"]
    return found
