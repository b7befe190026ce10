"""Methods of tuning a backbone under one interface: full, frozen, Rein with its ablations, LoRA, DoRA, SoMA, VPT and AdaptFormer.

`apply` changes a bare timm backbone in place, and `merge` makes it a bare one again if the method can be merged. `tuned_names` names
what training changes.
Belongs here: what changes a backbone and states what then trains. It knows no data, head or training loop, and imports nothing of
`dgss`; imported by `training` and the benchmarks.
"""

from rein.dgss.methods.dry_run import find_unused_parameters
from rein.dgss.methods.state import tuned_names, tuned_parameters
from rein.dgss.methods.table import METHODS, Method, apply, find, merge

__all__ = [
    "METHODS",
    "Method",
    "apply",
    "find",
    "find_unused_parameters",
    "merge",
    "tuned_names",
    "tuned_parameters",
]
