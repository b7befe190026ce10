"""`rein plan`: the memory of a training step, counted without values, equals that of a real step; what fits, and what is refused."""

import pytest
import torch

from rein.cli import main
from rein.dgss import planning, recipes
from rein.dgss.planning import GB, Memory, Step, step_of
from rein.dgss.training.experiment import Experiment
from rein.errors import InputError

SMALL_HEAD = {"encoder_layers": 1, "decoder_layers": 3, "channels": 64, "encoder_feedforward": 32, "decoder_feedforward": 32}
MODELS = {
    "rein, linear": {"backbone": "pocket_vit", "head": "LinearHead"},
    "frozen": {"backbone": "pocket_vit", "head": "LinearHead", "method": "freeze"},
    "full, fpn, checkpointing": {
        "backbone": "test_vit",
        "img_size": 96,
        "head": "FPNHead",
        "method": "full",
        "gradient_checkpointing": True,
    },
    "mask2former": {"backbone": "test_vit", "img_size": 96, "head_settings": SMALL_HEAD, "method_settings": {"query_dim": 64}},
}


def configuration(name, precision="32-true"):
    return {"model": MODELS[name], "data": {"crop": 96, "batch_size": 3}, "trainer": {"precision": precision}}


def count_real_step(config):
    """The largest sum of what a real step allocates, in bytes, without the gradients."""
    step, batch = step_of(config), planning.batch_of(config)
    experiment = Experiment(num_classes=19, **{**config["model"], "pretrained": False})
    segmenter = experiment.segmenter.train()
    images = torch.randint(256, (batch, 3, step.crop, step.crop), dtype=torch.uint8)
    labels = (torch.arange(step.crop**2).view(step.crop, step.crop) // 5 % 19).expand(batch, -1, -1).to(torch.uint8)
    half = step.precision == "bf16-mixed"
    with planning._Allocations() as counted:
        counted.ignore([*segmenter.parameters(), *experiment.buffers(), images, labels])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = segmenter(experiment.normalize(images), labels.long())
        loss.backward()
    gradients = sum(p.nbytes for p in segmenter.parameters() if p.requires_grad)
    return max(counted.peak - gradients, gradients)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_the_count_without_values_is_that_of_a_real_step(name, precision):
    if "mask2former" in name:
        pytest.importorskip("transformers")
    config = configuration(name, precision)
    planned = step_of(config).memory(3)
    assert planned.activations == pytest.approx(
        count_real_step(config), rel=0.08
    )  # fake kernels of bfloat16 allocate other helpers


def test_weights_and_states_are_counted_by_what_trains():
    found = step_of(configuration("rein, linear")).memory(1)
    experiment = Experiment(num_classes=19, **MODELS["rein, linear"])
    trained = sum(p.nbytes for p in experiment.parameters() if p.requires_grad)
    everything = sum(t.nbytes for t in [*experiment.parameters(), *experiment.buffers()])
    assert (found.trained, found.gradients, found.optimizer, found.frozen) == (
        trained,
        trained,
        2 * trained,
        everything - trained,
    )
    assert (found.average, found.buckets, found.gathered) == (0, 0, 0)
    averaged = {**configuration("rein, linear"), "model": {**MODELS["rein, linear"], "ema": 0.99}}
    assert step_of(averaged).memory(1).average == trained
    half = step_of(configuration("rein, linear", "bf16-true")).memory(1)
    assert half.trained == trained // 2


def test_checkpointing_needs_less_and_more_images_need_more():
    config = {**configuration("frozen"), "model": {**MODELS["frozen"], "method": "full"}}
    with_it, without = (step_of(config, checkpointing=each).memory(40).activations for each in (True, False))
    assert with_it < 0.8 * without
    assert step_of(config).memory(2).total < step_of(config).memory(40).total


def test_fsdp_divides_weights_and_states_over_the_devices():
    step = step_of(configuration("full, fpn, checkpointing"))
    ddp, fsdp = step.memory(2, 4), step.memory(2, 4, sharded=True)
    assert (ddp.buckets, ddp.gathered) == (ddp.gradients, 0)
    assert fsdp.buckets == 0
    assert fsdp.optimizer == -(-ddp.optimizer // 4)
    assert step.memory(40, 4).activations == step.memory(40, 4, sharded=True).activations
    assert (ddp.activations, fsdp.activations) >= (ddp.gradients, fsdp.gradients)  # the optimizer's copy
    assert 0 < fsdp.gathered < ddp.trained


def test_the_largest_batch_fits_and_one_more_does_not():
    step = step_of(configuration("rein, linear"))
    budget = 0.1 * GB
    batch = step.largest_batch(budget)
    assert batch > 2
    assert step.memory(batch).total <= budget < step.memory(batch + 1).total
    assert step.largest_batch(step.memory(1).total - 1) == 0


@pytest.mark.parametrize("lines", [[(5, 3)], [(50, 1), (10, 7)], [(100, 0), (0, 9)], [(1000, 1), (0, 40), (-500, 90)]])
@pytest.mark.parametrize("budget", [2, 8, 20, 99, 100, 101, 333, 1010, 5000, 100_000])
def test_the_largest_count_is_found_with_few_trials(lines, budget):
    tried = []

    def required(count):
        tried.append(count)
        return max(base + slope * count for base, slope in lines)

    found = planning.largest(required, budget)
    assert len(tried) <= 10
    assert found == 0 or required(found) <= budget
    assert required(found + 1) > budget


def report(totals):
    columns = {name: (Memory(int(total * GB), 0, 0, 0, 0, 0), 1) for name, total in totals.items()}
    return planning.Report("a run", columns, 10 * GB)


@pytest.mark.parametrize(
    ("totals", "verdict"),
    [
        ({"one device": 5, "one device + checkpointing": 4}, "It fits with: one device, one device + checkpointing."),
        ({"DDP": 12, "FSDP2": 9}, "It fits only with FSDP2."),
        ({"DDP": 20, "FSDP2": 12}, "It does not fit: FSDP2 needs 12.0 of 10.0 GB. Use more or larger devices"),
    ],
)
def test_the_report_says_what_fits(totals, verdict):
    assert verdict in str(report(totals))


def test_the_command_prints_a_table_and_its_exit_code_says_whether_the_run_fits(capsys):
    arguments = ["plan", "streets-rein", "--devices", "2", "--batch-size", "2", "--crop", "64"]
    assert main([*arguments, "--memory", "8"]) == 0
    printed = capsys.readouterr().out
    assert "streets-rein: 32-true, crops of 64 x 64, 2 images per step and device; 2 x 8 GB" in printed
    lines = {line.split("  ")[0]: line.split() for line in printed.splitlines() if line}
    assert lines["GB on each device"][4:] == ["DDP", "FSDP2", "DDP", "+", "checkpointing", "FSDP2", "+", "checkpointing"]
    assert "moving average" not in printed
    assert int(lines["largest batch of a device"][-1]) > 2
    assert main([*arguments, "--memory", "1.01"]) == 1
    assert "It does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-recipe"], "no recipe"),
        (["streets-rein", "--memory", "1"], "more than 1 GB"),
        (["streets-rein", "--memory", "nan"], "more than 1 GB"),
    ],
)
def test_bad_arguments_are_an_error_of_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_precision_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="precision is 8-bit; rein plan knows 32-true, bf16-mixed"):
        step_of(configuration("frozen", "8-bit"))


def test_every_recipe_is_a_step():
    steps = [step_of(recipes.resolve(recipe.name)) for recipe in recipes.listed()]
    assert len({(step.crop, step.precision) for step in steps}) > 2
    assert all(isinstance(step, Step) for step in steps)
