"""Check rein on one model of timm, on meta tensors. A separate module, so that worker processes can import it."""

import warnings
from itertools import groupby

import timm
import torch

import rein
from rein import backbones


def adapter_parameters(layers, width, m=100, r=16, q=256):
    """Number of parameters of the default adapter for one stage, from the formula of the paper."""
    return layers * r * (m + width) + 2 * (width * width + width) + (width * q + q) + (3 * q * q + q) + 1


LAST_FEATURE_IS_A_CONVOLUTION = ("ByobNet", "GhostNet", "NormFreeNet", "RepGhostNet")


def check_model(name):
    """Returns "supported", "refused" or "wrong", the class of the model, and what is wrong."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0).eval()
    bare = dict(model.named_parameters())
    spec = backbones.input_spec(model)
    height, width = spec.fixed_size or (8 * spec.multiple[0], 8 * spec.multiple[1])
    image = torch.empty(1, spec.channels, height, width, device="meta")
    try:
        rein.wrap(model)
    except rein.UnsupportedBackboneError as error:
        helpful = "blocks=[...]" in str(error) or "num_prefix_tokens=" in str(error)  # says how to pass the missing fact
        unchanged = not any(module._forward_hooks for module in model.modules())
        return ("refused" if helpful and unchanged else "wrong"), type(model).__name__, "the error does not say what to do"
    summary, blocks = rein.summary(model), model.rein_injection.blocks
    widths, wrong = [block.width for block in blocks], []
    # timm's feature maps are as wide as the blocks, except the first, which may come from the stem, and the last, which may come
    # from a convolution after the blocks
    channels = backbones.map_channels(model)
    last_fits = channels[-1] in widths or type(model).__name__ in LAST_FEATURE_IS_A_CONVOLUTION
    if not last_fits or not {*channels[1:-1]} <= {*widths} or len(set(widths)) == 1 != len(set(channels)):
        wrong.append(f"widths {widths}, timm's feature maps {channels}")
    declared = getattr(model, "num_prefix_tokens", None)
    # in these classes timm's attribute is known to differ from the outputs of the blocks
    if type(model).__name__ not in ("Cait", "Xcit", "ConVit") and declared not in (None, blocks[0].num_prefix_tokens):
        wrong.append(f"{blocks[0].num_prefix_tokens} prefix tokens, timm declares {declared}")
    stages = [(widths[0], len(widths))] if len(set(widths)) == 1 else [(w, len(list(layers))) for w, layers in groupby(widths)]
    if summary.adapter_parameters != sum(adapter_parameters(layers, width) for width, layers in stages):
        wrong.append(f"{summary.adapter_parameters} adapter parameters")
    # the wrapped model runs, and its outputs keep their shapes
    with torch.no_grad(), torch.device("meta"):
        after = model(image)
        with rein.disabled(model):
            before = model(image)
    if [tensor.shape for tensor in leaves(before)] != [tensor.shape for tensor in leaves(after)]:
        wrong.append("the shapes of the outputs changed")
    if not all(model.get_parameter(key) is value for key, value in bare.items()):
        wrong.append("parameters were replaced")
    return ("wrong" if wrong else "supported"), type(model).__name__, "; ".join(wrong)


def leaves(output):
    return [output] if isinstance(output, torch.Tensor) else [leaf for each in output for leaf in leaves(each)]


def check_model_safely(name):
    """The name and the result of `check_model`. Any other exception, including one from timm, counts as wrong."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        return name, *check_model(name)
    except Exception as error:
        return name, "wrong", type(error).__name__, str(error)
