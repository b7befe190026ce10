"""Facts about a backbone: its blocks, their widths, layouts and prefix tokens, the images it accepts and its feature maps.

Only this package knows details of timm. `families` lists what differs between model classes and cannot be measured. `blocks` measures
the rest.
"""

from rein.backbones import facts
from rein.backbones.blocks import BlockInfo, find_blocks, get_tokens, replace_tokens
from rein.backbones.families import enclosing_backbones
from rein.backbones.images import InputSpec, architecture, feature_maps, input_spec, map_channels, normalization, patch_size
from rein.backbones.maps import BlockMaps, TimmMaps, find_maps

__all__ = [
    "BlockInfo",
    "BlockMaps",
    "InputSpec",
    "TimmMaps",
    "architecture",
    "enclosing_backbones",
    "facts",
    "feature_maps",
    "find_blocks",
    "find_maps",
    "get_tokens",
    "input_spec",
    "map_channels",
    "normalization",
    "patch_size",
    "replace_tokens",
]
