"""Segmentation heads: feature maps (and queries) in, logits out. They know no backbone and no adapter."""

from rein.heads.base import Head
from rein.heads.fpn import FPNHead
from rein.heads.linear import LinearHead
from rein.heads.pyramid import FeaturePyramid

__all__ = ["FPNHead", "FeaturePyramid", "Head", "LinearHead"]
