"""VPT-deep: learnable prompt tokens at the input of every block.

Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119. Written from the paper. Block l sees [prefix, P_l, patches]; the rows
that come out at the prompts' places are dropped, and block l + 1 gets prompts of its own (equations 6 and 7).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rein import backbones
from rein.backbones import Site
from rein.dgss.methods.frozen import Frozen, adapter_dtype, block_sites, check_count, check_number, rehearse
from rein.errors import UnsupportedBackboneError


class Prompts(nn.Module):
    """The prompt tokens of all blocks.

    Args:
        num_layers: L.
        num_tokens: m, per layer.
        width: C.
        patch: pixels of a patch, height times width, P^2 in the bound of the initial values.
        dropout: of the prompts.

    Attributes:
        prompts: (L, m, C), uniform in +-sqrt(6 / (3 P^2 + C)) as the paper's code has them.
    """

    def __init__(self, num_layers: int, num_tokens: int, width: int, patch: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(num_layers, num_tokens, width))
        self.dropout = nn.Dropout(dropout)
        bound = math.sqrt(6 / (3 * patch + width))
        nn.init.uniform_(self.prompts, -bound, bound)

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """The prompts: like Rein's tokens they are not decayed (`rein.param_groups`)."""
        return [self.prompts]

    def forward(self, layer: int, batch: int) -> Tensor:
        """The prompts of a layer for every image, (B, m, C)."""
        prompts: Tensor = self.dropout(self.prompts[layer].expand(batch, -1, -1))
        return prompts


class PromptHooks:
    """Hooks of one block. They keep no state between calls, since under gradient checkpointing they run twice."""

    def __init__(self, prompts: Prompts, layer: int, site: Site) -> None:
        self.prompts, self.layer, self.site = prompts, layer, site

    def insert(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the block: (B, N, C) -> (B, N + m, C), the prompts between prefix and patches."""
        known = {"rope", "is_causal"}
        others = [name for name, value in kwargs.items() if name not in known and value is not None]
        rope = kwargs.get("rope")
        if len(args) != 1 or others or not isinstance(rope, Tensor | None):
            got = others or (["rope"] if len(args) == 1 else [f"{len(args)} positional arguments"])
            raise UnsupportedBackboneError(
                f"vpt cannot add prompts to block {self.site.path!r}, whose attention goes by the tokens' places: it is given "
                f"{', '.join(got)}."
            )
        (tokens,) = args
        prompts = self.prompts(self.layer, len(tokens)).to(tokens.dtype)
        if rope is not None:
            kwargs = {**kwargs, "rope": _unrotated(rope, prompts.shape[1])}
        prefix = self.site.num_prefix_tokens
        return (torch.cat((tokens[:, :prefix], prompts, tokens[:, prefix:]), 1),), kwargs

    def remove(self, block: nn.Module, args: Any, output: Tensor) -> Tensor:
        """After the block: (B, N + m, C) -> (B, N, C)."""
        prefix, count = self.site.num_prefix_tokens, self.prompts.prompts.shape[1]
        return torch.cat((output[:, :prefix], output[:, prefix + count :]), 1)


def _unrotated(rope: Tensor, count: int) -> Tensor:
    """Rotary embeddings [sin, cos] (..., N, D) with `count` rows of angle 0 before the patches: prompts have no place in the image.

    Rotation by 0 is exact, and so the attention need not know that there are prompts.
    """
    sin, cos = rope.new_zeros(*rope.shape[:-2], count, rope.shape[-1]).chunk(2, -1)
    return torch.cat((torch.cat((sin, cos + 1), -1), rope), -2)


def install(backbone: nn.Module, *, num_tokens: int = 150, dropout: float = 0.0) -> None:
    """Give every block `num_tokens` prompts; they are `backbone.vpt`.

    Raises:
        InputError: a setting that cannot be.
        UnsupportedBackboneError: blocks that are not global attention over tokens (B, N, C), or whose attention has a bias for every
            pair of places, so that it cannot take more tokens.
    """
    check_count("vpt", "num_tokens", num_tokens)
    check_number("vpt", "dropout", dropout, below=1)
    sites = block_sites(backbone, "vpt")
    name, widths = backbones.architecture(backbone), {site.width for site in sites}
    if len(widths) > 1 or any(site.layout != "NLC" for site in sites):
        raise UnsupportedBackboneError(
            f"vpt wants blocks with global attention over tokens (B, N, C) of one width; those of {name} give "
            f"{', '.join(sorted({site.layout for site in sites}))} of widths {sorted(widths)}."
        )
    height, width = backbones.patch_size(backbone)
    prompts = Prompts(len(sites), num_tokens, widths.pop(), height * width, dropout)
    prompts.to(next(backbone.get_submodule(sites[0].path).parameters()).device, adapter_dtype(backbone))

    def try_on(twin: nn.Module) -> None:
        for site in sites:
            _check_takes_any_count(twin.get_submodule(site.path), site, name)
        _hook(twin, Prompts(len(sites), num_tokens, sites[0].width, patch=1).to("meta"), sites)

    rehearse(backbone, "vpt", try_on)
    modules = list(backbone.modules())
    backbone.requires_grad_(False)
    handles = _hook(backbone, prompts, sites)
    backbone.vpt = prompts
    prompts.train(backbone.training)
    Frozen(backbone, modules, handles).attach()


def _hook(backbone: nn.Module, prompts: Prompts, sites: list[Site]) -> list[Any]:
    handles: list[Any] = []
    for layer, site in enumerate(sites):
        block, hooks = backbone.get_submodule(site.path), PromptHooks(prompts, layer, site)
        # nearest to the block: other hooks see its tokens as without prompts
        handles.append(block.register_forward_pre_hook(hooks.insert, with_kwargs=True))
        handles.append(block.register_forward_hook(hooks.remove, prepend=True))
    return handles


@torch.no_grad()
def _check_takes_any_count(block: nn.Module, site: Site, name: str) -> None:
    """Run a weightless block on a number of tokens that is no grid: relative positions, windows and token mixing do not take it."""
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)
    tokens = torch.empty(2, site.num_prefix_tokens + 7, site.width, dtype=dtype, device="meta")
    try:
        output = block(tokens)
        problem = None if output.shape == tokens.shape else f"it makes {tuple(output.shape)} of {tuple(tokens.shape)}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise UnsupportedBackboneError(
            f"vpt adds tokens to the input of every block, and block {site.path!r} of {name} does not take more tokens than the "
            f"image has ({problem})."
        )
