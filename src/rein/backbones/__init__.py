"""What is true of a given backbone: its blocks, their widths, layouts and prefix rows, the images it takes, its maps.

The one place that knows timm facts. What differs between families is a row in `families`; everything that can be measured is
measured, in `sites`, on meta tensors, without touching weights, modes, memory or the random state.
"""

from rein.backbones.images import InputSpec, architecture, feature_maps, input_spec, map_channels, normalization, patch_size
from rein.backbones.sites import Site, find_sites, tokens_of, with_tokens

__all__ = [
    "InputSpec",
    "Site",
    "architecture",
    "feature_maps",
    "find_sites",
    "input_spec",
    "map_channels",
    "normalization",
    "patch_size",
    "tokens_of",
    "with_tokens",
]
