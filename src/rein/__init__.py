"""Rein: turn a frozen vision transformer into a domain-general dense predictor by training about 1 % of it.

Method: Wei et al., CVPR 2024, arXiv 2312.04265.

    >>> import timm, rein
    >>> vit = timm.create_model("test_vit", num_classes=0)
    >>> rein.wrap(vit) is vit
    True
"""

from rein import heads
from rein._version import __version__
from rein.adapter import ReinAdapter
from rein.checkpoint import load, save
from rein.config import ReinConfig
from rein.errors import CheckpointError, MissingExtraError, ReinError, UnsupportedBackboneError
from rein.injection import disabled, unwrap, wrap
from rein.parameters import param_groups, summary
from rein.segmenter import Segmenter

__all__ = [
    "CheckpointError",
    "MissingExtraError",
    "ReinAdapter",
    "ReinConfig",
    "ReinError",
    "Segmenter",
    "UnsupportedBackboneError",
    "__version__",
    "disabled",
    "heads",
    "load",
    "param_groups",
    "save",
    "summary",
    "unwrap",
    "wrap",
]
