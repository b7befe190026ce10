"""Every model name of the installed timm, on meta tensors, is supported or refused with a helpful error: `make test-backbones`."""

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import timm

from timm_sweep import check_model_safely


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_every_name_of_timm_is_supported_or_refused(capsys):
    counts, totals, wrong = Counter(), Counter(), []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for name, result, model_class, reason in pool.map(check_model_safely, timm.list_models(), chunksize=4):
            counts[model_class, result] += 1
            totals[result] += 1
            if result == "wrong":
                wrong.append((name, model_class, reason))
    with capsys.disabled():
        print(f"\ntimm {timm.__version__}")
        for (model_class, result), count in sorted(counts.items(), key=lambda item: (item[0][1] != "supported", -item[1])):
            print(f"{result:10} {count:4}  {model_class}")
        print(", ".join(f"{totals[result]} {result}" for result in ("supported", "refused", "wrong")))
        print(*wrong, sep="\n")
    assert not wrong
