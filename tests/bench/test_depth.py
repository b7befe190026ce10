"""The depth benchmark at toy size."""

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import depth, report
from benchmarks.options import Options


def test_every_method_is_evaluated_in_every_domain_and_the_table_states_it():
    rows = list(suite.rows_of("depth", Options(tiny=True)))
    assert [(row["method"], row["domain"]) for row in rows] == [
        (method, domain) for method in ("frozen", "rein", "full") for domain in ("day", "fog", "night", "rain", "snow")
    ]
    assert all(0 <= row["delta_1.25"] <= 1 and row["rmse"] > 0 for row in rows)
    assert rows[0]["tuned_parameters"] == 0 < rows[5]["tuned_parameters"] < rows[-1]["tuned_parameters"]
    table = report.TABLES["depth"]({"rows": rows})
    assert f"{100 * rows[5]['abs_rel']:.1f}" in table
    assert len(table.splitlines()) == 2 + 3 * 3


def test_only_what_the_method_tunes_changes():
    images, distances = depth.streets("day", range(2))
    for name in ("frozen", "rein"):
        segmenter, optimizer = depth.build(name, seed=0, rate=1e-3)
        before = {key: value.clone() for key, value in segmenter.state_dict().items()}
        depth.fit(segmenter, optimizer, images, distances, 2, torch.Generator().manual_seed(0))
        changed = {
            key.split(".")[0:2][-1] for key, value in segmenter.state_dict().items() if not torch.equal(value, before[key])
        }
        assert changed == ({"decoder", "rein"} if name == "rein" else {"decoder"})


def test_the_loss_falls_and_is_the_same_for_the_same_seed():
    images, distances = depth.streets("day", range(2))
    losses: list = []
    for _ in range(2):
        segmenter, optimizer = depth.build("frozen", seed=0, rate=1e-3)
        losses.append(depth.fit(segmenter, optimizer, images, distances, 12, torch.Generator().manual_seed(0)))
    assert losses[0] == losses[1]
    assert sum(losses[0][-3:]) < 0.8 * sum(losses[0][:3])


def test_the_rate_is_the_one_with_the_lowest_error_on_held_out_streets_by_day(monkeypatch):
    asked = []
    monkeypatch.setattr(depth, "train", lambda name, seed, rate, options: (rate, 0.0))
    monkeypatch.setattr(depth, "streets", lambda domain, seeds: (asked.append((domain, seeds)) or domain, seeds))
    monkeypatch.setattr(depth, "evaluate", lambda rate, images, truth: {"abs_rel": abs(rate - depth.RATES[1])})
    depth.choose_rate.cache_clear()
    assert depth.choose_rate("rein", Options()) == depth.RATES[1]
    assert asked == [("day", depth.scene_seeds("val", 4))]
    assert depth.choose_rate("frozen", Options()) == depth.HEAD_RATE
    depth.choose_rate.cache_clear()


def test_crops_of_image_and_depth_stay_aligned():
    depth_map = torch.arange(128 * 256, dtype=torch.float32).reshape(1, 128, 256)
    generator = torch.Generator().manual_seed(0)
    mirrored = set()
    for _ in range(8):
        x, d = depth.crop(depth_map[:, None].expand(1, 3, -1, -1), depth_map, generator)
        assert x.shape == (3, 96, 96)
        assert torch.equal(x[0], d)
        mirrored.add(bool(d[0, 1] < d[0, 0]))
    assert mirrored == {True, False}


@pytest.mark.parametrize("domain", ["day", "snow"])
def test_streets_of_every_domain_have_the_same_depth(domain):
    assert torch.equal(depth.streets(domain, range(1))[1], depth.streets("fog", range(1))[1])
