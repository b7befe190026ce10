"""`DecoderHead`: the decoders DPT, UPerNet, SegFormer and FPN of segmentation_models_pytorch as heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rein.errors import InputError
from rein.extras import require
from rein.heads.base import Head, group_count, have_one_size, resize
from rein.heads.losses import CROSS_ENTROPY, LossSetting

_PACKAGE = "segmentation_models_pytorch.decoders"


def _dpt(channels: list[int], options: dict[str, Any]) -> tuple[nn.Module, int]:
    fixed: dict[str, Any] = {"encoder_output_strides": [16] * 4, "encoder_has_prefix_tokens": False, "readout": "ignore"}
    options = fixed | options
    decoder = _class("dpt", "DPTDecoder")(encoder_out_channels=channels, **options)
    return decoder, int(options.get("fusion_channels", 256))


def _upernet(channels: list[int], options: dict[str, Any]) -> tuple[nn.Module, int]:
    decoder = _class("upernet", "UPerNetDecoder")(encoder_channels=[3, 0, *channels], **options)
    return decoder, options.get("decoder_channels", 256)


def _segformer(channels: list[int], options: dict[str, Any]) -> tuple[nn.Module, int]:
    decoder = _class("segformer", "SegformerDecoder")(encoder_channels=[3, 0, *channels], **options)
    return decoder, options.get("segmentation_channels", 256)


def _fpn(channels: list[int], options: dict[str, Any]) -> tuple[nn.Module, int]:
    decoder = _class("fpn", "FPNDecoder")(encoder_channels=[3, 0, *channels], **options)
    return decoder, decoder.out_channels


_DECODERS: dict[str, Callable[[list[int], dict[str, Any]], tuple[nn.Module, int]]] = {
    "dpt": _dpt,
    "upernet": _upernet,
    "segformer": _segformer,
    "fpn": _fpn,
}


class DecoderHead(Head):
    """A decoder of segmentation_models_pytorch over four feature maps, then dropout and a 1 x 1 classifier.

    These decoders add maps that they upsample by 2, so the head first resizes the maps: each is exactly twice as large as the next
    (DPT: all have one even size). Patch size 14 and odd sizes therefore work. Group norms replace the decoder's batch norms: they
    keep no statistics of the source domain and accept a batch of one image.

    Args:
        in_channels: channels of each of the four maps, finest first.
        num_classes: number of classes K.
        decoder: `dpt` (arXiv 2103.13413), `upernet` (arXiv 1807.10221), `segformer` (arXiv 2105.15203) or `fpn` (arXiv 1901.02446).
        dropout: probability of dropping a channel before the classifier, in training.
        options: further arguments of the decoder class; they must be JSON-serialisable.
        class_weights, loss: as in `Head`.

    Raises:
        InputError: unknown decoder, not four maps, or invalid options.
        MissingExtraError: segmentation_models_pytorch is not installed (extra `heads`).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        decoder: str = "dpt",
        dropout: float = 0.1,
        options: dict[str, Any] | None = None,
        *,
        class_weights: Sequence[float] | None = None,
        loss: LossSetting = CROSS_ENTROPY,
    ) -> None:
        settings = {"decoder": decoder, "dropout": dropout, "options": dict(options or {})}
        super().__init__(in_channels, num_classes, class_weights=class_weights, loss=loss, **settings)
        if decoder not in _DECODERS:
            raise InputError(f"decoder is {decoder!r}; expected one of {', '.join(_DECODERS)}.")
        if len(self.in_channels) != 4:
            raise InputError(f"the {decoder} decoder expects four maps, got in_channels {list(self.in_channels)}.")
        self.name = decoder
        fixed = sorted(key for key in options or {} if key.startswith("encoder_") or key in ("readout", "use_norm"))
        if fixed:
            raise InputError(f"options {', '.join(fixed)} of the {decoder} decoder are set from in_channels; leave them out.")
        if not 0 <= dropout <= 1:
            raise InputError(f"dropout is {dropout}; it must be between 0 and 1.")
        try:
            self.decoder, channels = _DECODERS[decoder](list(self.in_channels), dict(options or {}))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"the {decoder} decoder cannot be built with options {options}: {error}.") from error
        _replace_batch_norms(self.decoder)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Maps (B, C_i, h_i, w_i) -> logits (B, K, h, w), 4 to 8 times the resolution of a plain ViT's maps; ignores `queries`."""
        self.check_maps(maps)
        coarsest = [(side + 1) // 2 if have_one_size(maps) else side for side in maps[-1].shape[-2:]]
        factors = (2, 2, 2, 2) if self.name == "dpt" else (8, 4, 2, 1)
        levels = [resize(m, (coarsest[0] * f, coarsest[1] * f)) for m, f in zip(maps, factors, strict=True)]
        if self.name == "dpt":
            return self.classifier(self.dropout(self.decoder(levels, [None] * 4)))
        height, width = levels[0].shape[-2:]
        # the decoders expect the image and a half-size map first, and use only their sizes
        image = levels[0].new_empty(len(levels[0]), 0, 4 * height, 4 * width)
        half = levels[0].new_empty(len(levels[0]), 0, 2 * height, 2 * width)
        return self.classifier(self.dropout(self.decoder([image, half, *levels])))


def _replace_batch_norms(module: nn.Module) -> None:
    """Replace every batch norm by a group norm, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(group_count(child.num_features), child.num_features))
        else:
            _replace_batch_norms(child)


def _class(module: str, name: str) -> Any:
    return getattr(require(f"{_PACKAGE}.{module}.decoder", "heads"), name)
