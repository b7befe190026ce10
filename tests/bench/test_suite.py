"""The benchmark suite: its command, files and tables. The commands for a GPU run the same code on the CPU here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import forms, recipe, report, routing, scaling, summary, throughput, timing
from benchmarks.options import Options
from rein.dgss.evaluation.results import Result, write_results

ROOT = Path(__file__).parents[2]
TINY = Options(tiny=True)


def test_timing_interleaves_all_runs_in_a_different_order_each_repeat():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.interleaved(runs, repeats=3, warmup=1)
    assert order == list("cab" + "abc" + "bca" + "cab")
    assert {name: len(elapsed) for name, elapsed in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_costs_are_compared_pair_by_pair():
    assert timing.cost_percent([2.0, 9.0], [1.0, 6.0]) == [100.0, 50.0]


def test_repeats_are_summarised_by_median_quartiles_and_range():
    assert summary.quartiles([3.0, 1.0, 2.0]) == [1.5, 2.0, 2.5]
    assert summary.quartiles([1.25]) == [1.25, 1.25, 1.25]
    assert summary.median_interval([float(n) for n in range(100)])[0] == 39.0
    assert summary.median_interval([1.0]) == [1.0, 1.0]
    assert summary.median_and_range([3.0, 1.0, 2.111], digits=2) == (2.11, 1.0, 3.0)


def test_seeds_are_summarised_by_mean_and_deviation():
    assert str(summary.spread([10.0, 12.0])) == "11.0 ± 1.4"
    assert str(summary.spread([10.0])) == "10.0 ± nan"
    assert str(summary.difference({0: 3.0}, {0: 1.0, 1: 9.0})) == "+2.0 [+nan, +nan]"


@pytest.mark.parametrize("form", [form for form in forms.FORMS if "compiled" not in form and form not in ("vpt", "adaptformer")])
def test_forms_that_start_as_the_bare_backbone_give_its_features(form):
    bare = forms.backbone("test_vit", 32)
    model, images = forms.build(form, bare), torch.randn(2, 3, 32, 32)
    if form in ("published", "rein"):
        with torch.no_grad():
            model.rein.scale.zero_()
    with torch.no_grad():
        assert torch.allclose(model(images), bare(images), atol=1e-4)


def test_the_published_form_gives_the_same_numbers_as_rein():
    bare, images = forms.backbone("test_vit", 32), torch.randn(2, 3, 32, 32)
    published, ours = (forms.build(form, bare) for form in ("published", "rein"))
    published.rein.load_state_dict(ours.rein.state_dict())
    results = []
    for model in (published, ours):
        with torch.no_grad():
            model.rein.scale.fill_(0.5)
        model.forward_features(images).square().mean().backward()
        results.append([model.forward_features(images), *(p.grad for p in model.rein.parameters() if p.grad is not None)])
    assert len(results[0]) == 8
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_training_step_gives_gradients_and_inference_gives_none():
    for form in ("rein", "lora", "full"):
        model, images = forms.build(form, forms.backbone("test_vit", 32)), torch.randn(1, 3, 32, 32)
        throughput.run(model, images, training=False)
        assert all(parameter.grad is None for parameter in model.parameters())
        throughput.run(model, images, training=True)
        assert any(parameter.grad is not None for parameter in model.parameters())


def test_the_ceiling_of_a_vit_large_agrees_with_theory():
    """Multiplications per token: 12 C^2 and 2 N C for a block and its attention, C^2 for the refinement."""
    layers, width, tokens = 24, 1024, 1025
    bare = layers * (12 * width**2 + 2 * tokens * width) + 3 * 256 * width  # and the patch embedding
    expected = bare / (bare + layers * width**2)
    assert throughput.ceiling("vit_large_patch16_224", 512, training=False) == pytest.approx(expected, rel=0.002)
    assert throughput.ceiling("vit_large_patch16_224", 512, training=True) == pytest.approx(
        bare / (bare + 1.5 * layers * width**2), rel=0.002
    )


def test_throughput_compares_every_form_with_the_bare_backbone_of_its_repeat():
    rows = list(suite.rows_of("throughput", TINY))
    assert [row["form"] for row in rows if row["step"] == "inference"] == list(throughput.TINY[0][3])
    assert "lora merged" not in {row["form"] for row in rows if row["step"] == "training"}
    for row in rows:
        low, median, high = row["cost_percent_quartiles"]
        assert low <= median <= high
        assert (row["form"] != "bare") or median == 0
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forms_of_a_gpu_run_on_the_cpu_in_every_precision(dtype):
    """The commands for a GPU differ only in sizes and device."""
    options = Options(device="cpu", dtype=dtype, tiny=True)
    eager = throughput.WITHOUT_COMPILED
    rows = [row for step in (False, True) for row in throughput.measure("test_vit", 32, 1, eager, 1, step, options)]
    assert {row["form"] for row in rows} == set(eager)
    assert all(row["seconds"] > 0 for row in [*rows, *suite.rows_of("recipe", options)])


def test_the_methods_of_the_recipe_train_increasing_numbers_of_parameters():
    trainable = {row["method"]: row["trainable_parameters"] for row in suite.rows_of("recipe", TINY) if row["step"] == "training"}
    assert trainable["freeze"] < trainable["rein"] < trainable["full"]


def test_scaling_varies_one_quantity_at_a_time():
    rows = list(suite.rows_of("scaling", TINY))
    for row in rows:
        if "step" in row:
            assert row["varied"] not in row
            assert {"tokens", "layers", "m", "r", "images"} - set(row) == {row["varied"]}
    assert {row["varied"] for row in rows} == {"tokens", "layers", "m", "r", "images", "adapters held"}
    assert report.r_squared([(1, 2), (2, 4), (3, 6)]) == pytest.approx(1)
    assert report.r_squared([(1, 2), (2, 0), (3, 2)]) < 0.1


def test_the_command_writes_rows_and_machine_and_names_benchmarks_that_failed(tmp_path, capsys, monkeypatch):
    def broken(options):
        yield {"fine": 1}
        raise RuntimeError("no more")

    monkeypatch.setattr(scaling, "parts", lambda options: iter([("broken", broken(options))]))
    monkeypatch.setattr(recipe, "parts", lambda options: iter([("fine", iter([{"seconds": 1.5}, {"seconds": 2.5}]))]))
    assert suite.main(["scaling", "recipe", "--tiny", "--out", str(tmp_path)]) == 1
    assert "failed: scaling" in capsys.readouterr().err
    assert not (tmp_path / "scaling.json").exists()
    content = json.loads((tmp_path / "recipe.json").read_text())
    assert content["rows"] == [{"seconds": 1.5}, {"seconds": 2.5}]
    assert content["command"] == "python -m benchmarks recipe --tiny --device cpu --dtype float32"
    assert {"cpu", "cores", "threads", "torch", "timm", "rein"} <= set(content["machine"])


def test_an_interrupted_benchmark_goes_on_after_its_finished_parts(tmp_path, monkeypatch, capsys):
    measured = []

    def part(name, fails=False):
        measured.append(name)
        if fails:
            raise KeyboardInterrupt
        yield {"name": name}

    command = ["recipe", "--tiny", "--out", str(tmp_path)]
    monkeypatch.setattr(recipe, "parts", lambda options: iter([("a", part("a")), ("b", part("b", fails=True))]))
    with pytest.raises(KeyboardInterrupt):
        suite.main([*command, "--resume"])
    assert not (tmp_path / "recipe.json").exists()
    monkeypatch.setattr(recipe, "parts", lambda options: iter([(name, part(name)) for name in "abc"]))
    assert suite.main([*command, "--resume", "--minutes", "0"]) == 3
    assert "recipe is not finished after 0 minutes; the same command goes on" in capsys.readouterr().err
    assert suite.main([*command, "--resume"]) == 0
    assert json.loads((tmp_path / "recipe.json").read_text())["rows"] == [{"name": name} for name in "abc"]
    assert measured == ["a", "b", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
    assert suite.main([*command, "--resume"]) == 0  # finished
    assert suite.main(command) == 0  # from the beginning
    assert measured == ["a", "b", "b", "c", "a", "b", "c"]
    (tmp_path / "recipe.json").unlink()
    content = {"benchmark": "recipe", "command": "another", "machine": {}, "seconds": 0, "rows": [{"part": "a", "row": {}}]}
    (tmp_path / "recipe.parts.json").write_text(json.dumps(content))
    assert suite.main([*command, "--resume"]) == 0  # parts of another command are not used
    assert json.loads((tmp_path / "recipe.json").read_text())["rows"] == [{"name": name} for name in "abc"]


@pytest.mark.sweep
def test_the_backbones_of_a_gpu_can_be_built_and_adapted_at_their_sizes():
    for name, size, _, chosen, _ in throughput.FULL_GPU:
        assert set(chosen) <= set(forms.FORMS)
        with torch.device("meta"):
            bare = forms.backbone(name, size)
            for form in ("one product", "rein", "published"):
                forms.build(form, bare)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "unknown benchmark speed; expected params"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--device", "meta"], "--device meta; expected cpu, cuda or cuda:N"),
        (["--out", __file__], "expected a folder that can be written to"),
    ],
)
def test_a_wrong_name_device_or_folder_is_reported_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit):
        suite.main(arguments)
    assert message in capsys.readouterr().err


def test_the_texts_hold_the_tables_of_the_committed_results():
    assert report.main(["--check"]) == 0


def test_a_text_that_differs_from_its_results_is_reported(monkeypatch, tmp_path, capsys):
    text = tmp_path / "README.md"
    text.write_text("<!-- benchmarks: headline -->\nold\n<!-- end -->\nkept\n")
    monkeypatch.setattr(report, "TEXTS", (text,))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main(["--check"]) == 1
    assert "README.md differs from its results" in capsys.readouterr().err
    assert report.updated(text).endswith("<!-- end -->\nkept\n")
    assert "old" not in report.updated(text)
    text.write_text("<!-- benchmarks: recipe -->\n<!-- end -->\n")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.main(["--check"]) == 1
    assert "has no results of recipe" in capsys.readouterr().err


def test_the_table_of_the_demo_compares_every_method_with_the_first_one(monkeypatch, tmp_path):
    """The files are those of `rein demo`, written by `write_results`."""
    (tmp_path / "machine").mkdir()
    for seed in (10, 2):
        results = [
            Result(method, 1000, tuned, 5, {"day": day, "fog": fog + seed / 1000}, {})
            for method, tuned, day, fog in (("frozen", 0, 0.3, 0.1), ("rein", 250, 0.4, 0.2))
        ]
        settings = {"sources": ["day"], "runs": [{"seed": seed}] * 2}
        write_results(tmp_path / f"machine/demo-seed{seed}.json", settings, results, {"day": "held-out source"})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    source, _, header, _, frozen, rein = report.demo().splitlines()
    assert "rein demo --seed N --out runs/demo-N`, seeds 2, 10; mean of unseen: fog; torch" in source
    assert header.split(" | ")[2:] == ["day (held-out source)", "fog", "mean of unseen", "minus frozen [95 %] |"]
    assert frozen == "| frozen | 0 (0.0%) | 30.0 ± 0.0 | 10.6 ± 0.6 | 10.6 ± 0.6 |  |"
    assert rein == "| rein | 250 (25.0%) | 40.0 ± 0.0 | 20.6 ± 0.6 | 20.6 ± 0.6 | +10.0 [+10.0, +10.0] |"


def test_every_committed_result_has_a_command_and_a_table():
    found = sorted((ROOT / "benchmarks/results").glob("*/*.json"))
    named = [json.loads(path.read_text()) for path in found if path.stem in suite.NAMES]
    assert named
    for content in named:
        assert content["command"].split()[3] == content["benchmark"]
        assert report.TABLES[content["benchmark"]](content).count("\n") > 2


def test_every_curve_has_a_plot(tmp_path, monkeypatch):
    folder = tmp_path / "results/some-machine"
    for name in ("throughput", "scaling"):
        suite.run(name, TINY, folder)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.plots(tmp_path)
    assert (tmp_path / "throughput-some-machine.png").stat().st_size > 5000
    assert (tmp_path / "scaling-some-machine.png").stat().st_size > 5000


def test_routing_is_compared_with_one_adapter_and_has_a_table():
    rows = list(suite.rows_of("routing", TINY))
    assert [(row["form"], row["adapters"]) for row in rows] == [
        ("bare", 0),
        ("one", 1),
        ("routed", 1),
        ("routed", 2),
        ("split", 2),
    ]
    assert rows[1]["cost_percent_quartiles"] == [0.0, 0.0, 0.0]
    table = report.routing({"rows": rows}).splitlines()
    assert [line.split(" | ")[3] for line in table[2:]] == ["1", "2"]


def test_routed_and_split_batches_of_the_routing_benchmark_are_the_same_work():
    model, images = routing.adapted("test_vit", 32, 2, TINY), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for name in model.rein:
            model.rein[name].scale.fill_(0.5)
    passes, together = routing.split(model, images, 2), routing.routed(model, images, 2)
    assert not torch.allclose(together, routing.one(model, images), atol=1e-2)
    for number in range(2):
        assert torch.allclose(together[number::2], passes[number], atol=1e-4)


def test_the_suite_runs_as_a_command_without_a_gpu():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--full" in done.stdout
