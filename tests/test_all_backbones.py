"""Every name of the installed timm, on meta tensors: wrapped rightly, or refused with what is missing. `make test-backbones`."""

from collections import Counter
from itertools import groupby

import pytest
import timm
import torch

import rein
from rein import backbones, catalogue


def adapter_parameters(layers, width, m=100, r=16, q=256):
    """The default's count for one stage, from the formula."""
    return layers * r * (m + width) + 2 * (width * width + width) + (width * q + q) + (3 * q * q + q) + 1


def verdict(name):
    """What became of one name, the class of its model, and what is wrong."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0).eval()
    bare = model.state_dict(keep_vars=True)
    try:
        sites = backbones.find_sites(model)
    except rein.UnsupportedBackboneError as error:
        helpful = "blocks=[...]" in str(error) or "num_prefix_tokens=" in str(error)  # how to give what is missing
        untouched = not any(module._forward_hooks for module in model.modules())
        return ("refused" if helpful and untouched else "wrong"), type(model).__name__, "the refusal does not help"
    widths = [site.width for site in sites]
    wrong = []
    # one witness is timm: the width of each of its own maps but the stem's and the final convolution's, and its count of prefix rows
    taps = backbones.map_channels(model)
    if widths[-1] not in taps or len(set(widths)) == 1 != len(set(taps)):
        wrong.append(f"widths {widths}, timm's maps {taps}")
    declared = getattr(model, "num_prefix_tokens", None)
    # the classes in which timm's declaration is known to differ from what its blocks give
    if type(model).__name__ not in ("Cait", "Xcit", "ConVit") and declared not in (None, sites[0].num_prefix_tokens):
        wrong.append(f"prefix rows {sites[0].num_prefix_tokens}, timm says {declared}")
    entry = catalogue.entry_of(model, name)
    stages = [(width, len(list(layers))) for width, layers in groupby(widths)]
    if len(set(widths)) == 1:
        stages = [(widths[0], len(widths))]
    if entry.adapter_parameters != sum(adapter_parameters(layers, width) for width, layers in stages):
        wrong.append(f"{entry.adapter_parameters} parameters")
    # the other is the wrapped model: it runs, and its outputs keep their shapes
    spec = backbones.input_spec(model)
    height, width = spec.fixed_size or (6 * spec.multiple[0], 6 * spec.multiple[1])
    image = torch.empty(1, spec.channels, height, width, device="meta")
    with torch.no_grad(), torch.device("meta"):
        before = model(image)
        rein.wrap(model)
        after = model(image)
    if [tensor.shape for tensor in leaves(before)] != [tensor.shape for tensor in leaves(after)]:
        wrong.append("the outputs changed their shapes")
    if not all(model.get_parameter(key) is value for key, value in bare.items() if isinstance(value, torch.nn.Parameter)):
        wrong.append("parameters were exchanged")
    return ("wrong" if wrong else "supported"), type(model).__name__, "; ".join(wrong)


def leaves(output):
    return [output] if isinstance(output, torch.Tensor) else [leaf for each in output for leaf in leaves(each)]


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_every_name_of_timm_is_supported_or_refused(capsys):
    counts, wrong = Counter(), []
    for name in timm.list_models():
        try:
            result, kind, why = verdict(name)
        except Exception as error:  # timm itself cannot build it on the meta device, or rein failed in another way
            result, kind, why = "wrong", type(error).__name__, str(error)
        counts[kind, result] += 1
        if result == "wrong":
            wrong.append((name, kind, why))
    with capsys.disabled():
        print(f"\ntimm {timm.__version__}")
        for (kind, result), count in sorted(counts.items(), key=lambda item: (item[0][1] != "supported", -item[1])):
            print(f"{result:10} {count:4}  {kind}")
        total = Counter()
        for (_, result), count in counts.items():
            total[result] += count
        print(", ".join(f"{total[result]} {result}" for result in ("supported", "refused", "wrong")))
        print(*wrong, sep="\n")
    assert not wrong
