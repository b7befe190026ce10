from math import isclose

import pytest
import timm

from benchmarks import params
from benchmarks.options import Options


@pytest.fixture(scope="module")
def rows():
    return list(params.rows(Options(tiny=True)))


def test_the_counts_equal_the_published_ones(rows):
    checked = [row for row in rows if "published_parameters" in row]
    assert len(checked) == len(params.PUBLISHED)
    assert all(row["trainable_parameters"] == row["published_parameters"] for row in checked)
    large = {
        row["settings"]: row["trainable_parameters"]
        for row in checked
        if row["model"] == params.LARGE and row["method"] == "rein"
    }
    assert large["rank=4"] < large["rank=16"] == large["num_tokens=100"] < large["num_tokens=150"]


def test_a_count_that_differs_from_the_published_one_fails(monkeypatch):
    monkeypatch.setattr(params, "PUBLISHED", [("test_vit", "rein", {}, 1)])
    with pytest.raises(ValueError, match=r"rein {} trains 237,569 parameters in test_vit; expected the published 1\."):
        list(params.rows(Options(tiny=True)))


def test_every_method_has_a_row_with_its_count_or_a_reason(rows):
    by_model = {}
    for row in rows:
        if "family" in row:
            by_model.setdefault(row["model"], {})[row["method"]] = row
    vit, convnext = by_model["test_vit"], by_model["test_convnext"]
    assert set(vit) == set(convnext) == set(params.METHODS)
    assert {name for name, row in convnext.items() if "refused" in row} == {"lora", "dora", "soma", "vpt", "adaptformer"}
    assert "(B, C, H, W)" in convnext["vpt"]["refused"]
    assert vit["full"]["fraction"] == 1
    assert vit["freeze"]["trainable_parameters"] == vit["freeze"]["fraction"] == 0
    blocks, width = 6, 64
    lora, dora, rein = (vit[name] for name in ("lora", "dora", "rein"))
    assert (
        dora["trainable_parameters"] - lora["trainable_parameters"] == blocks * 2 * width
    )  # a magnitude for every row of q and v
    assert rein["total_parameters"] == vit["full"]["total_parameters"] + rein["trainable_parameters"]
    assert isclose(rein["fraction"], rein["trainable_parameters"] / rein["total_parameters"], abs_tol=1e-8)


def test_a_model_that_timm_lacks_gives_a_row_with_the_reason():
    (row,) = params.backbone_rows({"family": "none", "variant": "L", "model": "vit_of_tomorrow"})
    assert row["refused"] == f"timm {timm.__version__} has no such model"
