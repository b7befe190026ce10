"""Every name of the installed timm, on meta tensors: wrapped rightly, or refused with what is missing. `make test-backbones`."""

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import timm

from verdicts import verdict_or_error


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_every_name_of_timm_is_supported_or_refused(capsys):
    counts, total, wrong = Counter(), Counter(), []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for name, result, kind, why in pool.map(verdict_or_error, timm.list_models(), chunksize=4):
            counts[kind, result] += 1
            total[result] += 1
            if result == "wrong":
                wrong.append((name, kind, why))
    with capsys.disabled():
        print(f"\ntimm {timm.__version__}")
        for (kind, result), count in sorted(counts.items(), key=lambda item: (item[0][1] != "supported", -item[1])):
            print(f"{result:10} {count:4}  {kind}")
        print(", ".join(f"{total[result]} {result}" for result in ("supported", "refused", "wrong")))
        print(*wrong, sep="\n")
    assert not wrong
