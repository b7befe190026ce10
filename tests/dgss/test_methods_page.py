"""The table of docs/methods.md says what the methods and the recipes say."""

import re
from pathlib import Path

import pytest

from dgss.test_methods import PUBLISHED
from rein.dgss import recipes
from rein.dgss.methods import METHODS

TEXT = (Path(__file__).parents[2] / "docs/methods.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.partition("## Schedules")[0].splitlines()
    if line.startswith("| `")
]
C, L, N = 1024, 24, 1024  # of a ViT-L on 512 x 512 pixels
BARE = L * (12 * C * C * (N + 1) + 2 * C * (N + 1) ** 2)  # multiply-adds: linear layers, attention


def test_every_method_has_a_row_and_dora_besides():
    names = [re.findall(r"`(\S+)`", row[0])[0] for row in ROWS]
    assert sorted(names) == sorted([*METHODS.keys() - {"rein-lowrank"}, "lora"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_a_row_states_parameters_merging_and_the_published_figure_of_its_recipe(row):
    method, name, parameters, _, merges, published, source = row
    recipe = recipes.resolve(name.strip("`"))
    chosen, dora = method.split("`")[1], "dora" in method
    assert (recipe["model"]["method"], recipe["model"].get("method_settings")) == (chosen, {"dora": True} if dora else None)
    assert int(parameters.replace(",", "")) == PUBLISHED[chosen] + (24 * 2 * C if dora else 0)
    assert (merges == "yes") == (METHODS[chosen].merge is not None)
    assert published == str(recipe["published"].get("mean", "none"))
    assert source == (recipe["published"]["source"] if "mean" in recipe["published"] else "")


@pytest.mark.parametrize(
    ("method", "added"),
    [
        ("rein", L * N * (C * C + 2 * 16 * (C + 100))),
        ("rein-core", L * N * (C * C + 2 * 100 * C)),
        ("lora", L * (N + 1) * 2 * 8 * 2 * C),
        ("soma", 16 * (N + 1) * 2 * 16 * (4 * 2 * C + 2 * 5 * C)),  # A and A0, B and B0
        ("vpt", L * (12 * C * C * 150 + 2 * C * ((N + 151) ** 2 - (N + 1) ** 2))),
        ("adaptformer", L * (N + 1) * 2 * 64 * C),
    ],
)
def test_what_a_method_adds_at_inference_is_counted_by_hand(method, added):
    (row,) = [row for row in ROWS if row[0] == f"`{method}`"]
    assert re.search(r"([\d.]+) %", row[3])[1] == f"{100 * added / BARE:.1f}"
