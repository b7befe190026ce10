"""For other projects' tests: `check_backbone` says whether a backbone is safe with rein; `tiny_vit` and `pocket_vit` are backbones
without downloads, the first with random weights and quick, the second with pretrained ones.

Nothing here needs a test framework: a broken promise is an exception that names it.
"""

from rein.testing.models import pocket_vit, tiny_vit
from rein.testing.promises import BrokenPromiseError, check_backbone

__all__ = ["BrokenPromiseError", "check_backbone", "pocket_vit", "tiny_vit"]
