"""One batch, several adapters: every image is refined by its own, in one pass through the shared backbone.

Without gradients, the folded matrices of `refinement.py` are stacked, one entry per image, and applied in batched products. With
gradients, each adapter refines its images together, so that the backward pass is the adapter's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rein.errors import InputError, one_line
from rein.injection import get_injection
from rein.named_adapters import Adapter, NamedAdapters
from rein.refinement import FoldedLayer, PassCache, inner_products


@contextmanager
def routed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Context in which each image of a batch is refined by its own adapter, in one pass through the backbone.

    The outputs are those of a pass with the image's adapter alone, up to rounding. Adapters of the same `num_tokens`, `rank` and
    `use_softmax` can be in one batch. Without gradients a pass holds one C x C matrix per image. As `active`, it is a state of the
    model and not of a thread. With gradient checkpointing, call `backward` inside the context, because it runs the blocks again.

    Args:
        model: a wrapped model with named adapters.
        names: the name of the adapter for each image of the batch, B names.

    Raises:
        WrapError: the model is not wrapped.
        InputError: the adapters have no names, a name is unknown, or the adapters differ in shape. In the pass: the batch has
            another number of images than there are names.
    """
    adapters = get_injection(model).adapter
    if not isinstance(adapters, NamedAdapters):
        raise InputError(
            "this model has one adapter without a name; rein.routed expects named ones. Load them with "
            "rein.load(model, file, name=...)."
        )
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise InputError(
            f"names is {one_line(repr(names))}; expected the name of an adapter for each image, such as ['day', 'night']."
        )
    before, adapters._route = adapters._route, AdapterRoute({name: adapters[name] for name in names}, names)
    try:
        yield
    finally:
        adapters._route = before


class AdapterRoute:
    """Refines the tokens of a batch with one adapter per image.

    Args:
        adapters: the adapters by name.
        names: the name for each image.

    Attributes:
        adapters: the distinct adapters of the batch.
        index: for each image its adapter, as an index into `adapters`, (B,).

    Raises:
        InputError: the adapters differ in shape.
    """

    def __init__(self, adapters: Mapping[str, Adapter], names: Sequence[str]) -> None:
        shapes: dict[tuple[object, ...], str] = {}
        for name, adapter in adapters.items():
            config = adapter.config
            shapes.setdefault((config.num_tokens, config.rank, config.use_softmax), name)
        if len(shapes) > 1:
            listed = "; ".join(
                f"{name!r} has num_tokens={tokens}, rank={rank}, use_softmax={softmax}"
                for (tokens, rank, softmax), name in shapes.items()
            )
            raise InputError(f"the adapters differ in shape: {listed}. Pass images of each shape in a batch of its own.")
        self.adapters = tuple(adapters.values())
        numbers = [list(adapters).index(name) for name in names]
        device = next(self.adapters[0].parameters()).device
        self.index = torch.tensor(numbers, device=device)
        self._images = [(self.index == number).nonzero()[:, 0] for number in range(len(self.adapters))]
        self._order = torch.cat(self._images).argsort()  # the places of the images after those of each adapter were put together
        stages = self.adapters[0].stage_of(self.adapters[0].num_layers - 1) + 1
        self._caches = [[PassCache() for _ in range(stages)] for _ in self.adapters]
        self._weights: tuple[list[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor, layer: int, num_prefix_tokens: int) -> Tensor:
        """Refine tokens x (B, N, C) or (B, H, W, C) of one layer; arguments as for `ReinAdapter.forward`.

        Raises:
            InputError: the batch has another number of images than the route.
        """
        if len(x) != len(self.index):
            raise InputError(
                f"the batch has {len(x)} images, rein.routed got {len(self.index)} names; expected one name for each image."
            )
        if len(self.adapters) == 1:
            stage = self.adapters[0].stage_of(layer)
            refined: Tensor = self.adapters[0](x, layer, num_prefix_tokens, self._caches[0][stage])
            return refined
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if torch.is_grad_enabled() or transformed:
            parts = [
                adapter(x[images], layer, num_prefix_tokens) for adapter, images in zip(self.adapters, self._images, strict=True)
            ]
            return torch.cat(parts)[self._order]
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            return _apply_stacked(x, dtype, num_prefix_tokens, self._stack(layer, dtype, x.device))

    def _stack(self, layer: int, dtype: torch.dtype, device: torch.device) -> FoldedLayer:
        """The folded matrices of a layer with one entry per image: weight (B, C, C), and the factors with B in front."""
        folded = []
        for adapter, caches in zip(self.adapters, self._caches, strict=True):
            part, part_layer = adapter.locate(layer)
            folded.append(caches[adapter.stage_of(layer)].get(part, part_layer, dtype, device))
        weights = [each.weight for each in folded]
        # read once: another thread may run its own pass. A pass that ended early leaves them behind, so a new one begins without.
        kept = self._weights if layer else None
        if kept is not None and all(one is other for one, other in zip(kept[0], weights, strict=True)):
            weight = kept[1]  # layers that share W_f have the same weight
        else:
            weight = torch.stack(weights)[self.index]
        self._weights = None if layer + 1 == self.adapters[0].num_layers else (weights, weight)
        factors = zip(*(each.factors for each in folded), strict=True)
        return FoldedLayer(None, weight, [torch.stack(factor)[self.index] for factor in factors])


def _apply_stacked(x: Tensor, dtype: torch.dtype, num_prefix_tokens: int, folded: FoldedLayer) -> Tensor:
    """As `refinement.apply_folded`, with matrices of its own for each image. Autograd must not record this."""
    *inner, values = folded.factors
    tokens = x.reshape(len(x), -1, x.shape[-1])
    features = tokens.to(dtype)
    same = dtype == x.dtype  # otherwise the products would round the residual to the autocast dtype
    coefficients = inner_products(features, inner)[-1] if inner else None  # None with the raw similarity: its factor is the bias
    if same:
        out = tokens + values[:, None] if coefficients is None else torch.baddbmm(tokens, coefficients, values)
        out.baddbmm_(features, folded.weight.mT)
    else:
        delta = values[:, None] if coefficients is None else coefficients @ values
        out = tokens + torch.baddbmm(delta, features, folded.weight.mT)
    out = out.to(x.dtype).reshape(x.shape)
    if num_prefix_tokens:
        out[..., :num_prefix_tokens, :] = x[..., :num_prefix_tokens, :]
    return out
