"""The benchmark of generalisation: nothing is chosen by a target, runs are kept, and the committed results are what they say."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

import rein
from benchmarks.generalisation import __main__ as command
from benchmarks.generalisation import data, runs, tables, trial
from benchmarks.generalisation.camera import another_camera
from benchmarks.generalisation.contenders import EVERYONE
from benchmarks.generalisation.plan import CHOOSING, FIRST_OF_HEAD, PLANS, RATES, best_rate, lengthened, next_rate, tiny
from benchmarks.pocket import pretrain
from benchmarks.pocket.pool import FIRST_STREET
from rein.dgss import recipes
from rein.dgss.data.datamodule import Domain
from rein.dgss.data.datasets.generated import scene_seeds
from rein.dgss.scenes import render
from rein.dgss.training.experiment import Experiment
from rein.dgss.training.task import DivergedError
from rein.errors import InputError

ROOT = Path(__file__).parents[2]
NAMES = {plan.benchmark for plan in PLANS.values()}
RESULTS = [path for path in sorted(ROOT.glob("benchmarks/results/*/generalisation-*.json")) if path.stem in NAMES]
TINY = tiny(PLANS["streets"])
RATES_OF_A_RUN = trial.Rates(0.01, 0.01)


# -- the search for a rate


def result(name, rates, seed, miou=0.0):
    purpose = "choose" if seed == CHOOSING else "evaluate"
    found = {"contender": name, "head_rate": rates.head, "rate": rates.method, "seed": seed, "purpose": purpose}
    return {**found, "validation_miou": miou}


def searched(plan, curve):
    """All runs of a plan whose validation is `curve(name, head, method)`, in the order in which they were due."""
    search, order = runs.Search(plan), []
    while due := search.due():
        order += due
        for name, rates, seed in due:
            search.add(result(name, rates, seed, curve(name, rates.head, rates.method)))
    return order


def plan_of(*names):
    return replace(PLANS["streets"], contenders=tuple(EVERYONE[name] for name in names), seeds=(0, 1))


def near(peak):
    return lambda name, head, method: 50 - abs(np.log(method / peak))


@pytest.mark.parametrize("peak", RATES)
def test_the_search_finds_the_peak_wherever_it_lies(peak):
    order = searched(plan_of("freeze"), near(peak))
    assert len(set(order)) == len(order)
    assert {rates for _, rates, seed in order if seed != CHOOSING} == {trial.Rates(peak, peak)}
    assert [seed for _, _, seed in order if seed != CHOOSING] == [0, 1]


def test_a_search_that_starts_at_the_peak_tries_no_more():
    order = searched(plan_of("freeze"), near(FIRST_OF_HEAD[1]))
    assert sorted(rates.head for _, rates, seed in order if seed == CHOOSING) == sorted(FIRST_OF_HEAD)


def test_the_frozen_backbones_head_rate_is_every_methods_and_each_finds_its_own():
    peaks = {"freeze": 1e-1, "full": 1e-4, "rein": 3e-3, "freeze, random weights": 1e-3}
    order = searched(plan_of(*peaks), lambda name, head, method: 50 - abs(np.log(method / peaks[name])))
    evaluated = {name: rates for name, rates, seed in order if seed != CHOOSING}
    alone = {name: trial.Rates(peaks[name], peaks[name]) for name in peaks if EVERYONE[name].head_alone}
    assert evaluated == alone | {name: trial.Rates(1e-1, peaks[name]) for name in ("full", "rein")}
    head_known = next(place for place, (name, _, seed) in enumerate(order) if (name, seed) == ("freeze", 0))
    assert all(name in alone for name, *_ in order[:head_known])


def test_of_equal_rates_the_smaller_is_taken():
    assert best_rate({1e-2: 20.0, 3e-3: 20.0, 1e-3: 19.0}) == 3e-3


# -- what is counted


def content(*rows):
    same = {"purpose": "evaluate", "head_rate": 0.1, "rate": 0.01, "tuned_parameters": 7}
    choosing = {"purpose": "choose", "contender": "a", "rate": 1.0, "seed": CHOOSING, "validation_miou": 9.0}
    evaluated = [{**same, "contender": name, "seed": seed, "miou": miou} for name, seed, miou in rows]
    return {"source": "day", "rows": [choosing, *evaluated]}


def test_the_mean_of_the_unseen_leaves_the_source_out_and_choosing_does_not_count():
    found = tables.evaluated(content(("a", 0, {"day": 90.0, "fog": 10.0, "night": 20.0})))
    assert found == {"a": {0: {"day": 90.0, "fog": 10.0, "night": 20.0, tables.UNSEEN: 15.0}}}
    assert tables.as_text(content(("a", 0, {"day": 90.0, "fog": 10.0, "night": 20.0}))).endswith("\n\nmean of unseen: fog, night")


def test_differences_are_taken_seed_by_seed():
    one, other = {0: 10.0, 1: 20.0, 2: 31.0, 3: 5.0}, {2: 30.0, 1: 18.0, 0: 9.0}
    found = tables.difference(one, other)
    wanted = stats.ttest_rel([10.0, 20.0, 31.0], [9.0, 18.0, 30.0]).confidence_interval(0.95)
    assert found.mean == pytest.approx(4 / 3)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_the_table_has_a_row_for_each_contender_and_a_difference_to_each_reference():
    rows = [("freeze", 0, 10.0), ("freeze", 1, 12.0), ("rein", 0, 11.0), ("rein", 1, 14.0)]
    head, lines = tables.table(content(*((name, seed, {"day": 50.0, "fog": value}) for name, seed, value in rows)))
    assert head == ["method", "tuned", "rates", "day (held-out source)", "fog", "mean of unseen", "minus freeze"]
    assert lines[0] == ["freeze", "7", "0.1, 0.01", "50.0 ± 0.0", "11.0 ± 1.4", "11.0 ± 1.4", ""]
    assert lines[1][:6] == ["rein", "7", "0.1, 0.01", "50.0 ± 0.0", "12.5 ± 2.1", "12.5 ± 2.1"]
    assert lines[1][6].startswith("+1.5 [")


def test_the_table_names_runs_that_diverged():
    rows = content(("freeze", 0, {"day": 50.0, "fog": 10.0}), ("freeze", 1, {"day": 0.0, "fog": 0.0}))
    rows["rows"][-1] |= {"diverged": "the loss is nan", "tuned_parameters": 0}
    _, lines = tables.table(rows)
    assert lines[0][:2] == ["freeze (1 of 2 diverged)", "7"]


# -- data


def test_the_other_camera_moves_image_and_label_together():
    scene = render(5, "day", (256, 512))
    painted = torch.where(torch.from_numpy(scene.label) == 10, 255, 0).to(torch.uint8).expand(3, -1, -1)  # white sky
    image, label = another_camera(painted, torch.from_numpy(scene.label), 3, (128, 256))
    assert image.shape == (3, 128, 256)
    assert image.dtype == label.dtype == torch.uint8
    sky = label == 10
    assert 0.02 < sky.float().mean() < 0.98
    light = image.float().mean(0)
    assert (light[sky] > light.median() + 30).float().mean() > 0.95
    assert set(label.unique().tolist()) <= {*np.unique(scene.label).tolist(), 255}


def test_another_camera_is_another_one_for_each_seed_and_the_same_for_one():
    scene = render(5, "day", (64, 128))
    pair = torch.from_numpy(scene.image).permute(2, 0, 1), torch.from_numpy(scene.label)
    first, again, other = (another_camera(*pair, seed, (32, 64)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])


def opened(section, role):
    """The pairs of each domain of a role, by title."""
    return {domain["title"]: Domain(**domain).open(Path(), "train") for domain in section[role]}


def test_every_domain_shows_the_same_streets_and_no_split_shares_one(tmp_path):
    section = data.streets(0, TINY.counts, tmp_path)
    targets = opened(section, "targets")
    assert list(targets) == ["day", "fog", "night", "rain", "snow", "camera"]
    for domain in ("fog", "night", "rain", "snow"):
        for (image, label), (day_image, day_label) in zip(targets[domain], targets["day"], strict=True):
            assert torch.equal(label, day_label)
            assert not torch.equal(image, day_image)
    everything = [*opened(section, "sources").values(), *opened(section, "validation").values(), targets["day"]]
    labels = [pairs[index][1].numpy().tobytes() for pairs in everything for index in range(len(pairs))]
    assert len(labels) == sum((TINY.counts.train, TINY.counts.validation, TINY.counts.test))
    assert len(set(labels)) == len(labels)


def test_the_files_hold_what_was_rendered(tmp_path):
    section = data.streets(0, TINY.counts, tmp_path)
    scene = render(scene_seeds("test", 1, 0)[0], "fog", data.SIZE)
    image, label = opened(section, "targets")["fog"][0]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), scene.image)
    assert np.array_equal(label.numpy(), scene.label)


def test_rates_are_chosen_without_the_targets_and_on_streets_of_their_own(tmp_path):
    assert all(CHOOSING not in plan.seeds for plan in PLANS.values())
    assert runs.data_section(TINY, CHOOSING, tmp_path, None, targets=False)["targets"] == []
    (folder,) = tmp_path.glob("data/*/*")
    assert {path.name for path in folder.iterdir()} == {data.SOURCE, data.VALIDATION}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_backbone_was_pretrained_on_streets_that_no_split_has(split):
    pool = range(FIRST_STREET, FIRST_STREET + 100_000)
    for seed in range(3):
        streets = scene_seeds(split, 900_000, seed)
        assert streets[-1] < pool[0] or streets[0] > pool[-1]


def frames(root):
    """CamVid in small: every frame one colour and one class, which say what it is."""
    number = 0
    for split, drives in (("day_train", ("0016E5", "0006R0")), ("day_val", ("0016E5",)), ("dusk_test", ("0001TP",))):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        for drive in drives:
            for frame in range(3):
                number += 1
                Image.new("RGB", (48, 36), (number, 0, 0)).save(root / split / f"images/{drive}_{frame}.png")
                Image.new("L", (48, 36), frame).save(root / split / f"labels/{drive}_{frame}.png")
    (root / "index.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))


def test_camvid_trains_on_one_drive_validates_on_another_and_evaluates_a_third(tmp_path):
    frames(tmp_path / "camvid")
    section = data.camvid(tmp_path / "camvid", tmp_path / "kept")

    def shown(role):
        return {
            title: sorted(int(pairs[index][0][0, 0, 0]) for index in range(len(pairs)))
            for title, pairs in opened(section, role).items()
        }

    assert (shown("sources"), shown("validation")) == ({"day": [1, 2, 3]}, {"day (held out)": [4, 5, 6]})
    assert shown("targets") == {"day": [7, 8, 9], "dusk": [10, 11, 12]}
    assert opened(section, "sources")["day"][0][0].shape[1:] == data.CAMVID_SIZE
    assert runs.data_section(tiny(PLANS["camvid"]), CHOOSING, tmp_path, tmp_path / "camvid", targets=False)["targets"] == []
    Image.new("RGB", (48, 36), (77, 77, 77)).save(tmp_path / "camvid/dusk_test/images/0001TP_1.png", compress_level=0)
    section = data.camvid(tmp_path / "camvid", tmp_path / "kept")
    assert 77 in shown("targets")["dusk"]
    shutil.rmtree(tmp_path / "camvid/day_train")
    (tmp_path / "camvid/day_val").rename(tmp_path / "camvid/day_train")
    with pytest.raises(InputError, match="day_val"):
        data.camvid(tmp_path / "camvid", tmp_path / "other")


# -- runs


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    return data.streets(1, TINY.counts, tmp_path_factory.mktemp("streets"), targets=False)


def instantiated(name, section, out):
    """The LightningModule of a contender, built as `rein fit` builds it."""
    head = "mask2former" if name == "rein linked" else "linear"
    config = trial.configuration(EVERYONE[name], head, section, TINY.budget, trial.Rates(0.01, 0.002), 1, out)
    return Experiment(num_classes=19, seed=1, **config["model"])


@pytest.mark.parametrize("name", EVERYONE)
def test_every_contender_trains_what_it_says_and_starts_from_the_same_head(name, section, tmp_path):
    bare, tuned = instantiated("freeze", section, tmp_path), instantiated(name, section, tmp_path)
    if "linked" not in name:
        bare_head, head = bare.segmenter.head.state_dict(), tuned.segmenter.head.state_dict()
        assert all(torch.equal(value, head[key]) for key, value in bare_head.items())
    backbone = tuned.segmenter.backbone
    trains = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    method = EVERYONE[name].method
    if method == "freeze":
        assert not trains
    elif method == "full":
        frozen = {key for key, parameter in backbone.named_parameters() if not parameter.requires_grad}
        assert frozen == {"norm.weight", "norm.bias"}  # no feature map passes the final norm
    else:
        mark = {"vpt": "vpt", "adaptformer": "adaptformer", "lora": "lora_", "soma": "soma."}.get(method, "rein.")
        assert trains
        assert all(mark in key for key in trains)
    rates = tuned.optimization
    assert (rates.lr, rates.backbone_factor, rates.adapter_factor) == pytest.approx((0.01, 0.2, 0.2))
    if method.startswith("rein"):
        assert rein.summary(backbone).num_layers == (4 if name == "rein late" else 8)


def test_the_schedule_is_somas_scaled_to_the_length_of_the_run():
    assert trial.schedule(40_000) == {"ema": 0.9998, "ema_from": 12_000, "final_weight_decay": 1e-5}
    assert trial.schedule(400) == {"ema": pytest.approx(0.9998**100), "ema_from": 120, "final_weight_decay": 1e-5}


def test_a_scheduled_contender_differs_in_the_schedule_only(section, tmp_path):
    plan = PLANS["schedules"]
    pairs = [(each, EVERYONE[f"{each.name}, scheduled"]) for each in plan.contenders if f"{each.name}, scheduled" in EVERYONE]
    assert [plain.name for plain, _ in pairs] == ["rein", "lora", "dora", "soma"]
    assert len(plan.contenders) == 1 + 2 * len(pairs)
    for plain, scheduled in pairs:
        one, other = (
            trial.configuration(each, plan.head, section, plan.budget, RATES_OF_A_RUN, 0, tmp_path) for each in (plain, scheduled)
        )
        assert other == {**one, "model": {**one["model"], **trial.schedule(400)}}
        assert {**plain.facts(), "scheduled": True} == scheduled.facts()


@pytest.mark.parametrize("name", [pytest.param("dora", marks=pytest.mark.sweep), "soma, scheduled"])
def test_contenders_of_the_plan_of_schedules_run(name, tmp_path):
    plan = replace(TINY, budget=replace(TINY.budget, steps=20))
    row = runs.one_run(plan, name, RATES_OF_A_RUN, 0, tmp_path, None)
    assert row["tuned_parameters"] > 0
    assert set(row["miou"]) == {"day", "fog", "night", "rain", "snow", "camera"}


def test_a_finished_run_is_read_and_one_of_other_settings_is_refused(tmp_path, monkeypatch):
    row = runs.one_run(TINY, "freeze", RATES_OF_A_RUN, 0, tmp_path, None)
    assert row["purpose"] == "evaluate"
    assert set(row["miou"]) == {"day", "fog", "night", "rain", "snow", "camera"}
    folder = runs.run_folder(TINY, "freeze", RATES_OF_A_RUN, 0, tmp_path)
    assert not (folder / "checkpoints").exists()
    monkeypatch.setattr(trial, "run", None)
    assert runs.one_run(TINY, "freeze", RATES_OF_A_RUN, 0, tmp_path, None) == row
    with pytest.raises(InputError, match="other settings, weights or data"):
        runs.one_run(replace(TINY, budget=replace(TINY.budget, batch=1)), "freeze", RATES_OF_A_RUN, 0, tmp_path, None)
    finished = folder / "row.json"
    finished.write_text(finished.read_text()[:40])
    with pytest.raises(InputError, match=r"freeze-0\.01-0\.01-0/row\.json is damaged"):
        runs.one_run(TINY, "freeze", RATES_OF_A_RUN, 0, tmp_path, None)


def test_the_queries_of_the_papers_head_are_linked_to_the_tokens(tmp_path):
    plan = tiny(PLANS["mask2former"])
    heads = [runs.one_run(plan, name, RATES_OF_A_RUN, 0, tmp_path, None)["head_parameters"] for name in ("freeze", "rein linked")]
    assert heads[0] > heads[1]  # whose queries come from the tokens
    assert {path.parent.name for path in tmp_path.glob("*/*/row.json")} == {"freeze-0.01-0.01-0", "rein-linked-0.01-0.01-0"}


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """Exported weights of another encoder."""
    folder = tmp_path_factory.mktemp("wider")
    arguments = ["--work", str(folder), "--encoder", "test_vit"]
    pretrain.main([*arguments, *["--images", "2", "--batch", "2", "--steps", "1", "--threads", "1"]])
    pretrain.main([*arguments, "--export", "--to", str(folder / "wider.safetensors")])
    return folder / "wider.safetensors"


def test_another_backbone_runs_with_its_own_weights_in_a_folder_of_its_own(tmp_path, wider):
    plan = replace(TINY, weights=wider)
    assert plan.benchmark == "generalisation-streets-wider"
    row = runs.one_run(plan, "rein", RATES_OF_A_RUN, 0, tmp_path, None)
    assert set(row["miou"]) == {"day", "fog", "night", "rain", "snow", "camera"}
    (finished,) = tmp_path.glob("streets-linear-2-wider/rein-0.01-0.01-0/row.json")
    backbone = json.loads(finished.read_text())["facts"]["backbone"]
    assert (backbone["name"], backbone["steps"]) == ("test_vit", 1)
    config = trial.configuration(EVERYONE["rein"], "linear", {}, TINY.budget, RATES_OF_A_RUN, 0, tmp_path, wider)
    built = Experiment(num_classes=19, **config["model"]).segmenter.backbone.state_dict()
    stored = load_file(wider)
    assert all(torch.equal(built[name], value.float()) for name, value in stored.items())
    on_gpu = trial.configuration(EVERYONE["rein"], "linear", {}, TINY.budget, RATES_OF_A_RUN, 0, tmp_path, wider, "cuda:1")
    assert (on_gpu["trainer"]["accelerator"], on_gpu["trainer"]["devices"]) == ("gpu", [1])
    random = trial.configuration(
        EVERYONE["freeze, random weights"], "linear", {}, TINY.budget, RATES_OF_A_RUN, 0, tmp_path, wider
    )
    assert random["model"]["backbone"] == "test_vit"
    assert "weights" not in random["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["streets", "--weights", "nothing.safetensors"], "is not a file that `python -m benchmarks.pocket.pretrain --export"),
        (["ablations", "--weights", "WIDER"], "the plan ablations names blocks of pocket_vit"),
        (["streets", "--device", "meta"], "--device meta; expected cpu, cuda or cuda:N"),
        (["--steps", "0"], "--steps 0; expected at least 1"),
        (["--tiny", "--steps", "5"], "leave out --steps"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_the_work(arguments, message, wider, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([*(str(wider) if each == "WIDER" else each for each in arguments), "--work", str(tmp_path / "work")])
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "work").glob("*/*"))


def test_another_backbone_runs_every_plan_but_the_one_that_names_blocks(wider, tmp_path, monkeypatch):
    ran = []

    def record(plan, *arguments):
        ran.append(plan.name)
        return []

    monkeypatch.setattr(command, "run_plan", record)
    monkeypatch.setattr(command, "draw_examples", lambda *arguments: None)
    monkeypatch.setattr(command, "as_text", lambda content: "")
    assert command.main(["--weights", str(wider), "--work", str(tmp_path)]) == 0
    assert set(ran) == set(PLANS) - {"ablations", "camvid"}
    found = json.loads((tmp_path / "generalisation-streets-wider.json").read_text())
    assert found["command"] == "python -m benchmarks.generalisation streets --weights FILE"
    assert found["backbone"]["name"] == "test_vit"


def test_a_longer_run_chooses_its_rates_with_runs_of_its_length():
    plan = lengthened(PLANS["long"], 3000)
    assert plan.about == "the plan long with 3000 steps, for which the rates are chosen"
    assert (plan.benchmark, plan.budget_of(0).steps, plan.budget_of(CHOOSING).steps) == (
        "generalisation-long-3000-steps",
        3000,
        3000,
    )


def test_plans_share_the_runs_that_they_have_in_common(tmp_path, monkeypatch):
    streets, longer, fpn = (PLANS[name] for name in ("streets", "long", "fpn"))
    shared = [runs.run_folder(plan, "rein", RATES_OF_A_RUN, CHOOSING, tmp_path) for plan in (streets, longer, fpn)]
    assert shared[0] == shared[1] != shared[2]  # rates of the long plan are found with the short budget
    own = {runs.run_folder(plan, "rein", RATES_OF_A_RUN, 0, tmp_path) for plan in (streets, longer, fpn)}
    assert len(own) == 3
    plan = replace(TINY, choosing=replace(TINY.budget, steps=1))
    used = []
    monkeypatch.setattr(trial, "run", lambda config: used.append(config["trainer"]["max_steps"]) or {})
    for seed in (CHOOSING, 0):
        runs.one_run(plan, "freeze", RATES_OF_A_RUN, seed, tmp_path, None)
    assert used == [1, TINY.budget.steps]


def test_a_rate_that_explodes_is_never_the_best(tmp_path, monkeypatch):
    def explode(*arguments):
        raise DivergedError("the loss is nan at step 3")

    monkeypatch.setattr(trial, "run", explode)
    row = runs.one_run(TINY, "freeze", RATES_OF_A_RUN, CHOOSING, tmp_path, None)
    assert (row["purpose"], row["validation_miou"], row["diverged"]) == ("choose", 0.0, "the loss is nan at step 3")
    assert best_rate({row["rate"]: row["validation_miou"], 0.003: 0.1}) == 0.003
    evaluated = runs.one_run(TINY, "freeze", RATES_OF_A_RUN, 0, tmp_path, None)
    assert set(evaluated["miou"].values()) == {0.0}
    monkeypatch.setattr(trial, "run", lambda *arguments: data.camvid(tmp_path / "none", tmp_path))
    with pytest.raises(InputError):  # an error in the data is not a rate that diverged
        runs.one_run(TINY, "full", RATES_OF_A_RUN, CHOOSING, tmp_path, None)


def test_a_folder_that_cannot_be_made_is_reported_before_the_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(command, "run_plan", lambda *arguments: pytest.fail("it ran"))
    for folders in (["--out", f"{tmp_path}/file"], ["--work", f"{tmp_path}/file"]):
        with pytest.raises(SystemExit):
            command.main(["streets", "--work", f"{tmp_path}/work", *folders])
        assert "cannot make the folder" in capsys.readouterr().err


def test_workers_end_with_their_parent_process(tmp_path):
    command = [sys.executable, "-m", "benchmarks.generalisation", "streets", "--workers", "1", "--work", str(tmp_path)]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def workers():
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True, check=False)
        return [Path("/proc") / pid for pid in listed.stdout.split()]

    while not list(tmp_path.glob("data/*/*")):  # a worker is at work
        assert parent.poll() is None
        time.sleep(0.1)
    started = workers()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(process.exists() for process in started):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ctrl_c_stops_at_once_and_keeps_finished_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.generalisation", "streets", "--tiny", "--workers", "1", "--work", str(tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (kept := list(tmp_path.glob("streets-*/*/row.json"))):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].endswith(f"interrupted; finished runs are in {tmp_path}; the same command resumes")
    assert "Traceback" not in errors
    assert len(list(tmp_path.glob("streets-*/*/row.json"))) <= len(kept) + 2  # of fifteen


def test_the_command_runs_a_plan_and_writes_table_and_picture(tmp_path):
    command = [sys.executable, "-m", "benchmarks.generalisation", "streets", "--tiny", "--workers", "1", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "minus freeze" in done.stdout
    found = json.loads((tmp_path / "generalisation-streets.json").read_text())
    assert found["command"] == "python -m benchmarks.generalisation streets --tiny"
    assert not [row for row in found["rows"] if row["purpose"] == "choose" and "miou" in row]
    (choosing,) = tmp_path.glob(f"data/*/streets-{CHOOSING}-*")
    assert {path.name for path in choosing.iterdir()} == {data.SOURCE, data.VALIDATION}
    check_choices(found, tiny(PLANS["streets"]))
    with Image.open(tmp_path / "examples-streets/panel.png") as picture:
        assert picture.width > 1000


def check_choices(found, plan):
    """Every rate of a result is the best by the source, and every seed is there."""
    rows = defaultdict(list)
    for row in found["rows"]:
        rows[row["contender"], row["purpose"]].append(row)
    assert {name for name, _ in rows} == {contender.name for contender in plan.contenders}
    for contender in plan.contenders:
        tried = {row["rate"]: row["validation_miou"] for row in rows[contender.name, "choose"]}
        assert next_rate(tried) is None
        head = best_rate(tried) if contender.head_alone else rows["freeze", "evaluate"][0]["rate"]
        evaluated = rows[contender.name, "evaluate"]
        assert {(row["head_rate"], row["rate"]) for row in evaluated} == {(head, best_rate(tried))}
        assert sorted(row["seed"] for row in evaluated) == list(plan.seeds)


# -- what is committed


def chosen(plan):
    """Contender -> an evaluated row of a committed result."""
    found = json.loads((ROOT / f"benchmarks/results/epyc-2-cores/{PLANS[plan].benchmark}.json").read_text())
    return {row["contender"]: row for row in found["rows"] if row["purpose"] == "evaluate"}


def test_every_plan_has_results():
    assert {path.stem for path in RESULTS} == NAMES


def test_the_recipes_of_the_demo_have_the_rates_that_the_source_chose():
    rows = chosen("streets")
    frozen, with_rein, full = (recipes.resolve(f"streets-{name}")["model"] for name in ("frozen", "rein", "full"))
    assert (with_rein["method"], with_rein.get("method_settings")) == ("rein", None)  # the default
    assert frozen["lr"] == with_rein["lr"] == full["lr"] == rows["freeze"]["head_rate"]
    assert with_rein["lr"] * with_rein["adapter_factor"] == pytest.approx(rows["rein"]["rate"])
    assert full["lr"] * full["backbone_factor"] == pytest.approx(rows["full"]["rate"])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_of_the_packaged_weights_and_chosen_by_the_source(path):
    found = json.loads(path.read_text())
    plan = PLANS[path.stem.removeprefix("generalisation-").replace("-", " ")]
    assert {key: found[key] for key in runs.settings_of(plan)} == runs.settings_of(plan)
    assert found["contenders"] == json.loads(json.dumps({each.name: each.facts() for each in plan.contenders}))
    assert len(plan.seeds) >= 5
    check_choices(found, plan)
