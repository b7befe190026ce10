"""VPT-deep: learnable prompt tokens in the input of every block.

Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119. Written from the paper. The input of block l is
[prefix, P_l, patches]. The output tokens at the positions of the prompts are discarded, and block l + 1 gets its own prompts
(equations 6 and 7).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rein import backbones
from rein.backbones import BlockInfo
from rein.dgss.methods.common import adapter_dtype, check_count, check_number, token_blocks
from rein.dgss.methods.dry_run import dry_run
from rein.dgss.methods.frozen import FrozenModules
from rein.errors import UnsupportedBackboneError


class Prompts(nn.Module):
    """The prompt tokens of all blocks.

    Args:
        num_layers: L.
        num_tokens: m, per layer.
        width: C.
        patch: height times width of a patch in pixels, P^2 in the bound of the initial values.
        dropout: dropout rate of the prompts.

    Attributes:
        prompts: (L, m, C), initially uniform in +-sqrt(6 / (3 P^2 + C)), as in the paper's code.
    """

    def __init__(self, num_layers: int, num_tokens: int, width: int, patch: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(num_layers, num_tokens, width))
        self.dropout = nn.Dropout(dropout)
        bound = math.sqrt(6 / (3 * patch + width))
        nn.init.uniform_(self.prompts, -bound, bound)

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """The prompts. Like Rein's tokens, they have no weight decay (`rein.param_groups`)."""
        return [self.prompts]

    def forward(self, layer: int, batch: int) -> Tensor:
        """The prompts of one layer, repeated for every image, (B, m, C)."""
        prompts: Tensor = self.dropout(self.prompts[layer].expand(batch, -1, -1))
        return prompts


class PromptHooks:
    """Forward hooks of one block. They keep no state between calls, because gradient checkpointing runs them twice."""

    def __init__(self, prompts: Prompts, layer: int, info: BlockInfo) -> None:
        self.prompts, self.layer, self.info = prompts, layer, info

    def insert(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the block: insert the prompts between prefix and patches, (B, N, C) -> (B, N + m, C)."""
        known = {"rope", "is_causal"}
        others = [name for name, value in kwargs.items() if name not in known and value is not None]
        rope = kwargs.get("rope")
        if len(args) != 1 or others or not isinstance(rope, Tensor | None):
            got = others or (["rope"] if len(args) == 1 else [f"{len(args)} positional arguments"])
            raise UnsupportedBackboneError(
                f"block {self.info.path!r} receives {', '.join(got)}, so its attention depends on the positions of the tokens; vpt "
                "expects blocks that receive only tokens, and rope as a tensor. Choose another backbone or method."
            )
        (tokens,) = args
        prompts = self.prompts(self.layer, len(tokens)).to(tokens.dtype)
        if rope is not None:
            kwargs = {**kwargs, "rope": _pad_rope(rope, prompts.shape[1])}
        prefix = self.info.num_prefix_tokens
        return (torch.cat((tokens[:, :prefix], prompts, tokens[:, prefix:]), 1),), kwargs

    def remove(self, block: nn.Module, args: Any, output: Tensor) -> Tensor:
        """After the block: remove the prompts, (B, N + m, C) -> (B, N, C)."""
        prefix, count = self.info.num_prefix_tokens, self.prompts.prompts.shape[1]
        return torch.cat((output[:, :prefix], output[:, prefix + count :]), 1)


def _pad_rope(rope: Tensor, count: int) -> Tensor:
    """Rotary embeddings [sin, cos] (..., N, D) with `count` rows of angle 0 before the patches.

    Prompts have no position in the image. A rotation by 0 is exact, so the attention treats prompts as unrotated tokens.
    """
    sin, cos = rope.new_zeros(*rope.shape[:-2], count, rope.shape[-1]).chunk(2, -1)
    return torch.cat((torch.cat((sin, cos + 1), -1), rope), -2)


def inject(backbone: nn.Module, *, num_tokens: int = 150, dropout: float = 0.0) -> None:
    """Freeze the backbone and give every block `num_tokens` prompts, as `backbone.vpt`.

    Raises:
        InputError: a setting is invalid.
        UnsupportedBackboneError: the blocks are not global attention over tokens (B, N, C), or their attention has a bias per pair of
            positions and therefore accepts no extra tokens.
    """
    check_count("vpt", "num_tokens", num_tokens)
    check_number("vpt", "dropout", dropout, below=1)
    infos = token_blocks(backbone, "vpt")
    name, widths = backbones.architecture(backbone), {info.width for info in infos}
    if len(widths) > 1 or any(info.layout != "NLC" for info in infos):
        raise UnsupportedBackboneError(
            f"the blocks of {name} return {', '.join(sorted({info.layout for info in infos}))} of widths {sorted(widths)}; "
            "vpt expects blocks with global attention over tokens (B, N, C) of one width. Choose another backbone or method."
        )
    height, width = backbones.patch_size(backbone)
    prompts = Prompts(len(infos), num_tokens, widths.pop(), height * width, dropout)
    prompts.to(next(backbone.get_submodule(infos[0].path).parameters()).device, adapter_dtype(backbone))

    def change(model: nn.Module) -> None:
        for info in infos:
            _check_accepts_extra_tokens(model.get_submodule(info.path), info, name)
        _register_hooks(model, Prompts(len(infos), num_tokens, infos[0].width, patch=1).to("meta"), infos)

    dry_run(backbone, "vpt", change)
    modules = list(backbone.modules())
    backbone.requires_grad_(False)
    handles = _register_hooks(backbone, prompts, infos)
    backbone.vpt = prompts
    prompts.train(backbone.training)
    FrozenModules(backbone, modules, handles).attach()


def _register_hooks(backbone: nn.Module, prompts: Prompts, infos: list[BlockInfo]) -> list[RemovableHandle]:
    handles = []
    for layer, info in enumerate(infos):
        block, hooks = backbone.get_submodule(info.path), PromptHooks(prompts, layer, info)
        # the last pre-hook and the first forward hook: other hooks see the block's tokens without prompts
        handles.append(block.register_forward_pre_hook(hooks.insert, with_kwargs=True))
        handles.append(block.register_forward_hook(hooks.remove, prepend=True))
    return handles


@torch.no_grad()
def _check_accepts_extra_tokens(block: nn.Module, info: BlockInfo, name: str) -> None:
    """Run a block of a meta model on 7 patch tokens, which form no grid.

    Blocks with relative positions, windows or token mixing fail on them.
    """
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)
    tokens = torch.empty(2, info.num_prefix_tokens + 7, info.width, dtype=dtype, device="meta")
    try:
        output = block(tokens)
        problem = None if output.shape == tokens.shape else f"{tuple(tokens.shape)} becomes {tuple(output.shape)}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise UnsupportedBackboneError(
            f"block {info.path!r} of {name} does not accept extra tokens ({problem}); vpt expects blocks that accept any number of "
            "tokens, because it adds prompts to their input. Choose another backbone or method."
        )
