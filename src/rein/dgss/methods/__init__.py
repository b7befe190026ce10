"""Ways to tune a backbone, side by side under one interface: fully, not at all, Rein and its ablations, and the paper's peers.

`apply` changes a bare timm backbone in place; afterwards what trains is exactly the method's. `tuned_state` and `load_tuned`
take out and put back what training changes.
"""

from rein.dgss.methods.frozen import unused_by_maps
from rein.dgss.methods.state import load_tuned, tuned_parameters, tuned_state
from rein.dgss.methods.table import METHODS, Method, apply, find

__all__ = ["METHODS", "Method", "apply", "find", "load_tuned", "tuned_parameters", "tuned_state", "unused_by_maps"]
