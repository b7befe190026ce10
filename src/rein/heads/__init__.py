"""Decode heads: from feature maps (and queries) to logits of a segmentation, or to depth. Independent of backbones and adapters."""

from rein.heads.base import Head
from rein.heads.decoder import DecoderHead
from rein.heads.depth import DepthHead
from rein.heads.fpn import FPNHead
from rein.heads.linear import LinearHead
from rein.heads.mask2former import Mask2FormerHead
from rein.heads.masks import Instances, Panoptic
from rein.heads.pyramid import FeaturePyramid

__all__ = [
    "DecoderHead",
    "DepthHead",
    "FPNHead",
    "FeaturePyramid",
    "Head",
    "Instances",
    "LinearHead",
    "Mask2FormerHead",
    "Panoptic",
]
