import pytest

from benchmarks import int8, report
from benchmarks.options import Options

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of Lightning and the exporters


@pytest.mark.sweep
def test_sizes_speeds_and_miou_are_stated_for_both_kinds_of_weights():
    for module in ("onnx", "onnxscript", "onnxruntime", "torchao"):
        pytest.importorskip(module)
    rows = list(int8.rows(Options(tiny=True)))
    sizes = {row["weights"]: row for row in rows if row["measure"] == "size"}
    for name in ("frozen_bytes", "onnx_bytes"):
        assert 0.2 < sizes["int8"][name] / sizes["float32"][name] < 0.5
    speeds = {row["form"]: row for row in rows if row["measure"] == "speed"}
    assert set(speeds) == {f"{runtime} {kind}" for runtime in ("eager", "onnxruntime") for kind in ("float32", "int8")}
    assert all(row["seconds"] > 0 for row in speeds.values())
    assert speeds["eager float32"]["cost_percent_quartiles"] == [0.0, 0.0, 0.0]
    quality = [row for row in rows if row["measure"] == "mIoU"]
    assert [row["domain"] for row in quality] == ["day", "fog", "night", "rain", "snow"]
    assert any(row["float32"] != row["int8"] for row in quality)
    assert all(abs(row["float32"] - row["int8"]) < 1 for row in quality)
    lines = report.TABLES["int8"]({"rows": rows}).splitlines()[2:]
    titles = ["frozen weights of pocket_vit", "ONNX file of pocket_vit"]
    titles += [f"pocket_vit, one image of 32 x 32, {runtime}" for runtime in ("eager", "onnxruntime")]
    titles += [f"mIoU, {domain}, 1 seeds" for domain in ("day", "fog", "night", "rain", "snow")]
    assert [line.split(" | ")[0] for line in lines] == [f"| {title}" for title in titles]


def test_it_refuses_a_gpu():
    with pytest.raises(ValueError, match="device is cuda; expected cpu"):
        next(int8.rows(Options(device="cuda", tiny=True)))
