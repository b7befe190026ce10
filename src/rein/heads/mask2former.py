"""`Mask2FormerHead`: the decode head of the Rein paper, with queries from the adapter's tokens.

Sources: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022, arXiv 2112.01527. Equations 8
to 10 of the Rein paper, arXiv 2312.04265, compute the queries from the tokens. Pixel decoder, masked-attention decoder, matcher and
losses come from the transformers library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rein.errors import InputError
from rein.extras import require
from rein.heads.base import IGNORE_LABEL, Head, Size
from rein.heads.masks import Instances, Panoptic, instance_inference, panoptic_inference, semantic_inference
from rein.heads.pyramid import FeaturePyramid

_MAX_COUNT = 1_000_000  # a file must not make a head ask for terabytes
_NUM_LEVELS = 3  # levels of both attentions; the pixel decoder adds the fourth and finest map by an FPN step


class Mask2FormerHead(Head):
    """Multi-scale deformable pixel decoder and masked-attention decoder over four feature maps.

    The adapter's queries (m, q) are the query position embeddings, and a linear layer maps them to the query features. With
    `num_queries`, the head learns both instead. `Segmenter` calls `learn_queries` if the backbone has no queries.

    Args:
        in_channels: channels of each of the four maps, finest first. `FeaturePyramid` resizes maps of equal size.
        num_classes: number of classes K; the classifier has one more output for "no object".
        channels: width of all layers, and width q of the queries; a multiple of 32, at least 64.
        num_queries: number of learned queries; None uses the queries of the adapter.
        encoder_layers: number of layers of the pixel decoder.
        encoder_feedforward: hidden width of their MLPs.
        decoder_layers: number of layers of the masked-attention decoder; layer l attends to level l modulo 3.
        decoder_feedforward: hidden width of their MLPs.
        attention_heads: number of heads in both attentions.
        num_points: number of points per mask at which the mask losses are computed.
        oversample: number of candidates per point; the most uncertain candidates are used.
        importance: share of the points chosen by uncertainty; the others are uniformly random.
        weights: weights of classification, binary cross-entropy and dice, in loss and matching.
        no_object_weight: weight of "no object" in the cross-entropy.
        project_levels: insert a 1 x 1 convolution between the levels of the pixel decoder and the masked attention.
        class_weights: weight of each class in the cross-entropy of the classification, beside `no_object_weight`; None means 1.

    Raises:
        InputError: not four maps, or a setting out of range.
        MissingExtraError: transformers or scipy is not installed (extra `mask2former`).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 256,
        num_queries: int | None = None,
        encoder_layers: int = 6,
        encoder_feedforward: int = 1024,
        decoder_layers: int = 9,
        decoder_feedforward: int = 2048,
        attention_heads: int = 8,
        num_points: int = 12544,
        oversample: float = 3.0,
        importance: float = 0.75,
        weights: Sequence[float] = (2.0, 5.0, 5.0),
        no_object_weight: float = 0.1,
        project_levels: bool = False,
        *,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        settings = {
            key: value for key, value in locals().items() if key not in ("self", "in_channels", "num_classes", "__class__")
        }
        super().__init__(in_channels, num_classes, **{**settings, "weights": list(weights)})
        numbers = [weight for weight in weights if isinstance(weight, int | float) and weight >= 0]
        if len(self.in_channels) != _NUM_LEVELS + 1 or len(numbers) != 3 or len(weights) != 3:
            raise InputError(
                f"Mask2FormerHead expects four maps and three weights of at least 0, got in_channels {list(self.in_channels)} and "
                f"weights {list(weights)}."
            )
        counts = {"attention_heads": attention_heads, "encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
        counts |= {
            "num_points": num_points,
            "encoder_feedforward": encoder_feedforward,
            "decoder_feedforward": decoder_feedforward,
        }
        for name, value in counts.items():
            if type(value) is not int or not 1 <= value <= _MAX_COUNT:
                raise InputError(f"{name} is {value!r}; it must be an integer from 1 to {_MAX_COUNT:,}.")
        if channels < 64 or channels % 32 or channels % attention_heads:  # the library's group norms have 32 groups
            raise InputError(
                f"channels is {channels}; it must be at least 64 and a multiple of 32 and of attention_heads={attention_heads}."
            )
        if oversample < 1 or not 0 <= importance <= 1 or no_object_weight < 0:
            raise InputError(
                f"oversample {oversample} must be at least 1, importance {importance} between 0 and 1, no_object_weight "
                f"{no_object_weight} at least 0."
            )
        require("scipy", "mask2former")
        library: Any = require("transformers.models.mask2former.modeling_mask2former", "mask2former")
        config = library.Mask2FormerConfig(
            feature_size=channels,
            mask_feature_size=channels,
            hidden_dim=channels,
            encoder_feedforward_dim=encoder_feedforward,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers + 1,  # the library counts the prediction before the first layer
            num_attention_heads=attention_heads,
            dim_feedforward=decoder_feedforward,
            dropout=0.0,
            train_num_points=num_points,
            oversample_ratio=oversample,
            importance_sample_ratio=importance,
            class_weight=weights[0],
            mask_weight=weights[1],
            dice_weight=weights[2],
            no_object_weight=no_object_weight,
            num_labels=num_classes,
        )
        self.channels = channels
        self.pyramid = FeaturePyramid()
        self.pixel_decoder = library.Mask2FormerPixelDecoder(config, feature_channels=list(self.in_channels))
        self.decoder = library.Mask2FormerMaskedAttentionDecoder(config)
        self.position_embedding = library.Mask2FormerSinePositionEmbedding(channels // 2, normalize=True)
        self.level_embed = nn.Embedding(_NUM_LEVELS, channels)
        self.class_predictor = nn.Linear(channels, num_classes + 1)
        self.query_features: nn.Module = nn.Linear(channels, channels)
        self.criterion = library.Mask2FormerLoss(config, {})  # its terms are weighted in `_loss_terms`
        # a constant that follows from the settings: keep it out of the files
        weights_of_classes = self.criterion.empty_weight.detach().clone()
        if self.pixel_loss.class_weights is not None:
            weights_of_classes[:-1] = self.pixel_loss.class_weights
        self.criterion.register_buffer("empty_weight", weights_of_classes, persistent=False)
        self.level_projections = nn.ModuleList(
            nn.Conv2d(channels, channels, 1) if project_levels else nn.Identity() for _ in range(_NUM_LEVELS)
        )
        self._initialize()
        if num_queries is not None:
            self.learn_queries(num_queries)

    @property
    def uses_queries(self) -> bool:
        """Whether the queries come from the adapter."""
        return self.settings["num_queries"] is None

    @property
    def query_dim(self) -> int | None:
        """`channels` if the queries come from the adapter, else None."""
        return self.channels if self.uses_queries else None

    def learn_queries(self, num_queries: int = 100) -> None:
        """Replace the adapter's queries by `num_queries` learned positions and features.

        Raises:
            InputError: `num_queries` is not an integer of at least 1.
        """
        if isinstance(num_queries, bool) or not isinstance(num_queries, int) or num_queries < 1:
            raise InputError(f"num_queries is {num_queries!r}; it must be an integer of at least 1.")
        self.query_features = nn.Embedding(num_queries, self.channels).to(self.class_predictor.weight)
        self.query_positions = nn.Embedding(num_queries, self.channels).to(self.class_predictor.weight)
        self.settings["num_queries"] = num_queries

    @torch.no_grad()
    def _initialize(self) -> None:
        """Initialise as the authors of Mask2Former do; the library does this only for its complete models."""
        for parameter in [*self.pixel_decoder.encoder.parameters(), *self.decoder.layers.parameters()]:
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for projection in self.pixel_decoder.input_projections:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for name, module in self.pixel_decoder.named_children():
            for part in module.modules():
                if isinstance(part, nn.Conv2d) and name != "input_projections":
                    nn.init.kaiming_uniform_(part.weight, a=1)
                    if part.bias is not None:
                        nn.init.zeros_(part.bias)
        nn.init.normal_(self.pixel_decoder.level_embed)
        for layer in self.pixel_decoder.encoder.layers:
            attention = layer.self_attn
            for part in (attention.sampling_offsets, attention.attention_weights):
                nn.init.zeros_(part.weight)
            for part in (attention.attention_weights, attention.value_proj, attention.output_proj):
                nn.init.zeros_(part.bias)
            attention.sampling_offsets.bias.copy_(_initial_offsets(attention.n_heads, attention.n_levels, attention.n_points))

    def _decode(self, maps: Sequence[Tensor], queries: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield class logits (B, m, K + 1) and mask logits (B, m, h, w) before the first decoder layer and after each layer."""
        self.check_maps(maps)
        positions, features = self._query_embeddings(queries)
        pixels = self.pixel_decoder(self.pyramid(maps), output_hidden_states=False, output_attentions=False, return_dict=True)
        levels = pixels.multi_scale_features[:_NUM_LEVELS]  # coarsest first
        decoded = self.decoder(
            inputs_embeds=features[:, None].expand(-1, len(maps[0]), -1),
            query_position_embeddings=positions[:, None].expand(-1, len(maps[0]), -1),
            multi_stage_positional_embeddings=[
                self.position_embedding(level.shape, level.device, level.dtype).flatten(2).permute(2, 0, 1) for level in levels
            ],
            encoder_hidden_states=[
                (project(level).flatten(2) + embed[:, None]).permute(2, 0, 1)
                for level, project, embed in zip(levels, self.level_projections, self.level_embed.weight, strict=True)
            ],
            pixel_embeddings=pixels.mask_features,
            feature_size_list=[level.shape[-2:] for level in levels],
            output_hidden_states=False,
            output_attentions=False,
            return_dict=True,
        )
        for state, masks in zip(decoded.intermediate_hidden_states, decoded.masks_queries_logits, strict=True):
            yield self.class_predictor(state.transpose(0, 1)), masks

    def _query_embeddings(self, queries: Tensor | None) -> tuple[Tensor, Tensor]:
        """Query position embeddings (m, C) and query features (m, C)."""
        if isinstance(self.query_features, nn.Embedding):
            return self.query_positions.weight, self.query_features.weight
        if queries is None:
            raise InputError(
                "this Mask2FormerHead requires an adapter's queries, got None; pass queries, or build the head with num_queries=100."
            )
        if queries.ndim != 2 or queries.shape[1] != self.channels:
            raise InputError(
                f"queries have shape {tuple(queries.shape)}, expected (m, {self.channels}), the head's channels. Build the adapter "
                f"with ReinConfig(query_dim={self.channels}), or the head with channels={queries.shape[-1]}."
            )
        return queries, self.query_features(queries)

    def _decode_last(self, maps: Sequence[Tensor], queries: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class logits and mask logits after the last decoder layer."""
        *_, last = self._decode(maps, queries)
        return last

    def forward(self, maps: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Semantic scores (B, K, h, w) at the size of the masks: class times mask probability, summed over the queries."""
        classes, masks = self._decode_last(maps, queries)
        return semantic_inference(classes, masks, (masks.shape[-2], masks.shape[-1]))

    def predict(self, maps: Sequence[Tensor], size: Size, queries: Tensor | None = None) -> Tensor:
        """Semantic scores (B, K, H, W) at `size`; mask logits are resized, not probabilities."""
        return semantic_inference(*self._decode_last(maps, queries), size)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Semantic scores as shares of their sum over the classes; they are not logits."""
        return logits / logits.sum(1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)

    def instances(self, maps: Sequence[Tensor], size: Size, queries: Tensor | None = None, limit: int = 100) -> list[Instances]:
        """Return the `limit` best (query, class) pairs of each image as instances at `size` = (H, W)."""
        return instance_inference(*self._decode_last(maps, queries), size, limit)

    def panoptic(
        self,
        maps: Sequence[Tensor],
        size: Size,
        queries: Tensor | None = None,
        things: Sequence[int] | None = None,
        score_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
    ) -> list[Panoptic]:
        """Return the panoptic segments of each image at `size` = (H, W); settings as in `heads.masks.panoptic_inference`."""
        return panoptic_inference(*self._decode_last(maps, queries), size, things, score_threshold, overlap_threshold)

    def loss(self, maps: Sequence[Tensor], labels: Tensor, queries: Tensor | None = None) -> Tensor:
        """Compute the set-prediction loss, summed over the predictions of all decoder layers (deep supervision).

        Each class that an image contains is one target mask. As in the authors' code, an image with only 255 takes part: its queries
        are "no object" in the classification, and it counts as one mask in the mean over the masks.

        Args:
            maps: as in `forward`.
            labels: (B, H, W), integers below K; 255 marks pixels of no mask.
            queries: as in `forward`.

        Returns:
            A scalar; zero, with zero gradients, if every label is 255 and `no_object_weight` is 0.
        """
        return torch.stack(list(self._loss_terms(maps, labels, queries).values())).sum()

    def _loss_terms(self, maps: Sequence[Tensor], labels: Tensor, queries: Tensor | None) -> dict[str, Tensor]:
        """The weighted terms of the loss: `loss_cross_entropy`, `loss_mask` and `loss_dice` of the last prediction, and the same
        with the suffix `_i` for prediction i of `_decode`.
        """
        present = [each.unique() for each in labels]
        return self.loss_terms(maps, labels, queries, [classes[classes != IGNORE_LABEL].long() for classes in present])

    def loss_terms(
        self, maps: Sequence[Tensor], labels: Tensor, queries: Tensor | None, present: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The terms of `loss` for given classes of each image, on fake tensors, too, which have no values to find them in.

        Args:
            maps: as in `loss`.
            labels: as in `loss`.
            queries: as in `loss`.
            present: the classes of each image, in increasing order.
        """
        # the library samples points and matches masks in float32
        predictions = [(classes.float(), masks.float()) for classes, masks in self._decode(maps, queries)]
        self.criterion.empty_weight = self.criterion.empty_weight.float()
        if self.settings["no_object_weight"] == 0 and not any(map(len, present)):  # the weighted mean of weights that are all 0
            return {"none": sum(((c.sum() + m.sum()) * 0 for c, m in predictions), labels.new_zeros((), dtype=torch.float32))}
        targets = [(image == classes[:, None, None]).float() for image, classes in zip(labels, present, strict=True)]
        with torch.autocast(labels.device.type, enabled=False):  # matching needs float32
            *earlier, (classes, masks) = predictions
            losses: dict[str, Tensor] = self.criterion(
                masks, classes, targets, present, [{"masks_queries_logits": m, "class_queries_logits": c} for c, m in earlier]
            )
        # the library divides the mask terms by the number of masks; in the authors' code an image without labels counts as one
        masks_share = sum(map(len, present)) / sum(max(len(each), 1) for each in present)
        class_weight, mask_weight, dice_weight = self.settings["weights"]
        weights = {"cross_entropy": class_weight, "mask": mask_weight * masks_share, "dice": dice_weight * masks_share}
        return {name: next(w for key, w in weights.items() if key in name) * loss for name, loss in losses.items()}


def _initial_offsets(heads: int, levels: int, points: int) -> Tensor:
    """Initial sampling offsets of Deformable DETR: one direction per head, with point p at a distance of p + 1 pixels."""
    angles = torch.arange(heads) * (2 * math.pi / heads)
    directions = torch.stack((angles.cos(), angles.sin()), -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, points + 1)
    return (directions[:, None, None] * steps[:, None]).expand(heads, levels, points, 2).reshape(-1)
