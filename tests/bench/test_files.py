import pytest

import rein
from benchmarks import files, forms
from benchmarks.options import Options


@pytest.fixture(scope="module")
def rows():
    return list(files.rows(Options(tiny=True)))


def test_a_file_holds_the_adapter_and_a_small_header(rows):
    (size,) = [row for row in rows if row["measure"] == "size"]
    bare = forms.backbone("test_vit", 224)
    assert size["backbone_bytes"] == sum(4 * parameter.numel() for parameter in bare.parameters())
    assert size["parameters"] == sum(parameter.numel() for parameter in rein.wrap(bare).rein.parameters())
    assert 0 < size["file_bytes"] - 4 * size["parameters"] < 10_000  # the header
    assert size["file_bytes"] < size["backbone_bytes"]
    assert size["fraction"] == pytest.approx(size["file_bytes"] / size["backbone_bytes"], abs=1e-6)


def test_every_time_has_a_median_and_a_range(rows):
    timed = {row.get("import", row["measure"]): row for row in rows if "seconds" in row}
    assert set(timed) == {"save", "load into bare", "swap", "rein"}
    for row in timed.values():
        assert 0 < row["seconds_least"] <= row["seconds"] <= row["seconds_most"]
    assert timed["rein"]["after"] == "torch"
    assert timed["swap"]["swaps_per_second"] == pytest.approx(1 / timed["swap"]["seconds"], rel=0.01)


def test_each_load_and_swap_reads_another_adapter(monkeypatch):
    loaded, load = [], rein.load

    def recorded(model, path):
        wrapped = hasattr(model, "rein")
        load(model, path)
        loaded.append((wrapped, model.rein.tokens_a[0, 0, 0].item()))

    monkeypatch.setattr(rein, "load", recorded)
    list(files.adapter_rows(forms.backbone("test_vit", 224), repeats=3, adapters=2))
    assert [wrapped for wrapped, _ in loaded] == [False] * 4 + [True] * 4
    values = [value for wrapped, value in loaded if wrapped]
    assert values[0] == values[2] != values[1] == values[3]
