"""Weights, Lightning checkpoints and configurations from anyone: the original's result, or an error in one line."""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save

from dgss.folders import make_folder
from dgss.test_commands import configuration, write
from fuzzing import changed_bytes, changed_values, counts, survive
from rein import pytorch_files
from rein.backbones.creation import make_backbone
from rein.cli import main
from rein.dgss import commands, recipes
from rein.dgss.evaluation.comparison import compare
from rein.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning and others warn of at such sizes


def saved(content, **settings):
    buffer = io.BytesIO()
    torch.save(content, buffer, **settings)
    return buffer.getvalue()


# -- weights of a backbone


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0).state_dict()


def weights_reader(path, weights, exact):
    def read(content):
        path.write_bytes(content)
        found = make_backbone("test_vit", False, weights=path).state_dict()
        assert not exact or all(torch.equal(found[name], tensor) for name, tensor in weights.items())

    return read


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@counts(15, 500)
def test_weights_with_changed_bytes(tmp_path, weights, suffix, count):
    content = saved({"state_dict": weights}) if suffix == ".pth" else save(weights)
    inputs = [content, *changed_bytes(content, count)]
    # a safetensors file that rein did not write has no checksum
    survive(weights_reader(tmp_path / f"w{suffix}", weights, exact=suffix == ".pth"), inputs)


def changed_tensors(state, count, seed=0):
    generator = random.Random(seed)
    names = ["pos_embed", "patch_embed.proj.weight", "cls_token", *state]
    for _ in range(count):
        other = dict(state)
        name = generator.choice(names)
        tensor = state[name]
        changes = [tensor.flatten(), tensor[None], tensor.new_zeros(0), tensor.long(), tensor * 2, tensor.to(torch.complex64)]
        changes += [
            tensor.to(torch.float8_e4m3fn),
            torch.zeros(1, 2, 100_000),
            torch.zeros(1, 1, 900, 900),
            torch.zeros(1, 50, 3),
        ]
        changes += [torch.zeros(1, 17, 64), torch.zeros(64, 3, 4, 4), torch.zeros(64, 3), torch.zeros(())]
        other[generator.choice([name, name, name, "x", 3, "visual.proj", "module." + name])] = generator.choice(changes)
        if generator.random() < 0.3:
            del other[generator.choice(list(other))]
        yield other


@counts(40, 600)
def test_weights_with_changed_tensors(tmp_path, weights, count):
    inputs = (saved(state) for state in changed_tensors(weights, count))
    survive(weights_reader(tmp_path / "w.pth", weights, exact=False), inputs)


# -- Lightning checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its configuration, and the content of its last checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    data = make_folder(folder / "data", domains=("day", "dusk", "fog"), count=4)
    config = configuration(data, folder / "out", ema=0.9)
    config["trainer"].update({"max_steps": 2, "val_check_interval": 2, "logger": False})
    path = write(folder / "c.yaml", config)
    assert main(["fit", "--config", path]) == 0
    assert main(["test", "--config", path]) == 0
    return path, (folder / "out/checkpoints/last.ckpt").read_bytes()


@pytest.fixture(scope="module")
def task(run, tmp_path_factory):
    """The model of the run, as Lightning hands it a checkpoint."""
    path = tmp_path_factory.mktemp("task") / "last.ckpt"
    path.write_bytes(run[1])
    return commands.run(["validate", "--config", run[0], "--ckpt_path", str(path)], quiet=True).model


def task_reader(path, task, exact):
    original = {name: tensor.clone() for name, tensor in task.state_dict().items()}

    def read(content):
        path.write_bytes(content)
        checkpoint = pytorch_files.load(path)
        if not isinstance(checkpoint, dict):
            raise CheckpointError("not a dictionary")
        try:
            task.on_load_checkpoint(checkpoint)
        finally:
            assert all(torch.equal(tensor, original[name]) for name, tensor in task.state_dict().items())
        if exact:
            assert all(torch.equal(tensor, original[name]) for name, tensor in checkpoint["state_dict"].items())
        task.load_state_dict(checkpoint["state_dict"], strict=False)
        with task.averaged():
            pass
        task.load_state_dict(original)

    return read


@counts(30, 1000)
def test_lightning_checkpoints_with_changed_bytes(run, task, tmp_path, count):
    outcomes = survive(task_reader(tmp_path / "last.ckpt", task, exact=True), [run[1], *changed_bytes(run[1], count)])
    assert outcomes["CheckpointError"] > 0.7 * count


@counts(60, 1500)
def test_lightning_checkpoints_with_changed_values(run, task, tmp_path, count):
    content = torch.load(io.BytesIO(run[1]), weights_only=True)
    inputs = (saved(value) for value in changed_values(content, count))
    survive(task_reader(tmp_path / "last.ckpt", task, exact=False), inputs)


@pytest.mark.parametrize("command", ["validate", "fit"])
@counts(4, 120)
def test_commands_with_a_changed_lightning_checkpoint(run, tmp_path, command, count):
    content = torch.load(io.BytesIO(run[1]), weights_only=True)
    path = tmp_path / "last.ckpt"

    def read(value):
        torch.save(value, path)
        options = ["--ckpt_path", str(path), "--out", str(tmp_path / "out"), "--trainer.max_steps", "2"]
        commands.run([command, "--config", run[0], *options], quiet=True)

    survive(read, changed_values(content, count), size_of=lambda _: 200 * 2**20)


# -- results


@counts(15, 400)
def test_comparing_runs_with_changed_results(run, tmp_path, count):
    evaluated = Path(run[0]).parent / "out"
    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(evaluated / "test", other / "test")
    content = json.loads((other / "test/results.json").read_text())

    def read(value):
        (other / "test/results.json").write_text(json.dumps(value))
        compare([other, evaluated], out, ["other", "first"])

    survive(read, changed_values(content, count), size_of=lambda _: 100 * 2**20)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"other", "out"}
    assert {entry.name for entry in out.iterdir()} <= {
        "dusk.png",
        "fog.png",
        "index.html",
        "panel.png",
        "results.json",
        "table.txt",
    }


# -- configurations


def parse(arguments):
    """Build what a command builds, and stop before it runs."""

    class Stop(commands.ReinCLI):
        quiet = True

        def _run_subcommand(self, subcommand):
            pass

    with commands._hide_advice(True), commands._one_line_errors("fit"):
        commands._make_cli(Stop, recipes.resolved(arguments))


@pytest.mark.parametrize("start", ["plain", "bases"])
@counts(12, 300)
def test_configurations_with_changed_values(tmp_path, start, count):
    data = make_folder(tmp_path / "data", domains=("day", "dusk", "fog"), count=4)
    config = configuration(data, tmp_path / "out")
    if start == "bases":
        config = {"bases": ["streets-rein"], "model": {"method_settings": {"num_tokens": 5}}, "trainer": {"max_steps": 1}}

    def read(value):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(value))
        parse(["fit", "--config", str(tmp_path / "c.yaml")])

    before = sorted(tmp_path.rglob("*"))
    inputs = changed_values(config, count)
    survive(read, inputs, size_of=lambda _: 2**40)  # a configuration names the model to build, which may be large
    assert {*tmp_path.rglob("*")} - {*before} <= {tmp_path / "c.yaml"}


@counts(200, 5000)
def test_configuration_files_with_changed_bytes(tmp_path, count):
    content = (recipes.FOLDER / "gtav-dinov2-l-rein.yaml").read_bytes()
    survive(lambda data: read_recipe(tmp_path / "c.yaml", data), changed_bytes(content, count))


def read_recipe(path, data):
    path.write_bytes(data)
    recipes.resolved(["fit", "--config", str(path)])


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\n"
        "d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e]",
        "a: &a [*a]",
        "a: " + "[" * 900 + "]" * 900,
        "a: " + "x" * 2_000_000,
        "a: 2001-99-99",
        "a: !!bool x",
        "a: " + "9" * 5000,
        "a: !!python/object/apply:os.mkdir [made]",
        "- 1",
        "a: \0",
    ],
)
@pytest.mark.parametrize("bases", ["", "bases: [streets-rein]\n"])
def test_a_configuration_that_cannot_be_read_is_an_error_in_one_line(tmp_path, monkeypatch, text, bases):
    monkeypatch.chdir(tmp_path)
    assert survive(lambda data: read_recipe(tmp_path / "c.yaml", data), [(bases + text).encode()]) == {"InputError": 1}
    assert not (tmp_path / "made").exists()
