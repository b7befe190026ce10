"""What becomes of one name of timm, on meta tensors. A module of its own, so that other processes can import it."""

import warnings
from itertools import groupby

import timm
import torch

import rein
from rein import backbones


def adapter_parameters(layers, width, m=100, r=16, q=256):
    """The default's count for one stage, from the formula."""
    return layers * r * (m + width) + 2 * (width * width + width) + (width * q + q) + (3 * q * q + q) + 1


ENDS_BY_CONVOLUTION = ("ByobNet", "GhostNet", "NormFreeNet", "RepGhostNet")


def verdict(name):
    """What became of one name, the class of its model, and what is wrong."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0).eval()
    bare = dict(model.named_parameters())
    spec = backbones.input_spec(model)
    height, width = spec.fixed_size or (8 * spec.multiple[0], 8 * spec.multiple[1])
    image = torch.empty(1, spec.channels, height, width, device="meta")
    try:
        rein.wrap(model)
    except rein.UnsupportedBackboneError as error:
        helpful = "blocks=[...]" in str(error) or "num_prefix_tokens=" in str(error)  # how to give what is missing
        untouched = not any(module._forward_hooks for module in model.modules())
        return ("refused" if helpful and untouched else "wrong"), type(model).__name__, "the refusal does not help"
    counted, sites = rein.summary(model), model.rein_injection.sites
    widths, wrong = [site.width for site in sites], []
    # one witness is timm: its maps are as wide as blocks are. Its first may be the stem's; its last is that of the last block, or
    # of a convolution after the blocks
    taps = backbones.map_channels(model)
    ends = taps[-1] in widths or type(model).__name__ in ENDS_BY_CONVOLUTION
    if not ends or not {*taps[1:-1]} <= {*widths} or len(set(widths)) == 1 != len(set(taps)):
        wrong.append(f"widths {widths}, timm's maps {taps}")
    declared = getattr(model, "num_prefix_tokens", None)
    # the classes in which timm's declaration is known to differ from what its blocks give
    if type(model).__name__ not in ("Cait", "Xcit", "ConVit") and declared not in (None, sites[0].num_prefix_tokens):
        wrong.append(f"prefix rows {sites[0].num_prefix_tokens}, timm says {declared}")
    stages = [(widths[0], len(widths))] if len(set(widths)) == 1 else [(w, len(list(layers))) for w, layers in groupby(widths)]
    if counted.adapter_parameters != sum(adapter_parameters(layers, width) for width, layers in stages):
        wrong.append(f"{counted.adapter_parameters} parameters")
    # the other is the model itself: it runs wrapped, and its outputs keep their shapes
    with torch.no_grad(), torch.device("meta"):
        after = model(image)
        with rein.disabled(model):
            before = model(image)
    if [tensor.shape for tensor in leaves(before)] != [tensor.shape for tensor in leaves(after)]:
        wrong.append("the outputs changed their shapes")
    if not all(model.get_parameter(key) is value for key, value in bare.items()):
        wrong.append("parameters were exchanged")
    return ("wrong" if wrong else "supported"), type(model).__name__, "; ".join(wrong)


def leaves(output):
    return [output] if isinstance(output, torch.Tensor) else [leaf for each in output for leaf in leaves(each)]


def verdict_or_error(name):
    """As `verdict`; an error of any other kind, timm's own included, is wrong too."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        return name, *verdict(name)
    except Exception as error:
        return name, "wrong", type(error).__name__, str(error)
