"""Facts about a backbone: its blocks, their widths, layouts and prefix tokens, the images it accepts and its feature maps.

Only this package knows details of timm. `families` lists what differs between model classes and cannot be measured. `blocks` measures
the rest.
"""

from rein.backbones.blocks import BlockInfo, find_blocks, get_tokens, replace_tokens
from rein.backbones.images import InputSpec, architecture, feature_maps, input_spec, map_channels, normalization, patch_size

__all__ = [
    "BlockInfo",
    "InputSpec",
    "architecture",
    "feature_maps",
    "find_blocks",
    "get_tokens",
    "input_spec",
    "map_channels",
    "normalization",
    "patch_size",
    "replace_tokens",
]
