"""Every name of the installed timm, on meta tensors: wrapped rightly, or refused with what is missing. `make test-backbones`."""

from collections import Counter

import pytest
import timm
import torch

import rein


def adapter_parameters(layers, width, m=100, r=16, q=256):
    """The default's count, from the formula."""
    return layers * r * (m + width) + 2 * (width * width + width) + (width * q + q) + (3 * q * q + q) + 1


def verdict(name):
    """What became of one name, and the class of its model."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    try:
        rein.wrap(model)
    except rein.UnsupportedBackboneError as error:
        helpful = "blocks=[...]" in str(error) or "num_prefix_tokens=" in str(error)  # how to give what is missing
        untouched = not any(module._forward_hooks for module in model.modules())
        return "refused" if helpful and untouched else "wrong", type(model).__name__
    counted = rein.summary(model)
    columnar = len(counted.widths) == 1
    right = columnar and counted.adapter_parameters == adapter_parameters(counted.num_layers, counted.widths[0])
    declared = getattr(model, "num_prefix_tokens", None)
    # the classes in which timm's declaration is known to differ from what its blocks give
    right &= type(model).__name__ in ("Cait", "Xcit", "ConVit") or declared in (None, counted.num_prefix_tokens[0])
    return "supported" if right else "wrong", type(model).__name__


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_every_name_of_timm_is_supported_or_refused(capsys):
    counts, wrong = Counter(), []
    for name in timm.list_models():
        try:
            result, kind = verdict(name)
        except Exception as error:  # timm itself cannot build it on the meta device, or rein failed in another way
            result, kind = "wrong", f"{type(error).__name__} for {name}: {error}"
        counts[kind, result] += 1
        if result == "wrong":
            wrong.append((name, kind))
    with capsys.disabled():
        print(f"\ntimm {timm.__version__}")
        for (kind, result), count in sorted(counts.items(), key=lambda item: (item[0][1] != "supported", -item[1])):
            print(f"{result:10} {count:4}  {kind[:100]}")
        total = Counter()
        for (_, result), count in counts.items():
            total[result] += count
        print(dict(total))
    assert not wrong
