"""The code blocks of the README and the docs run, and their commands, options and pictures exist."""

import contextlib
import io
import json
import re
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import rein
from rein.cli import EXPERIMENT_COMMANDS, main

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(text, code, id=f"{text.name}-{number}")
    for text in TEXTS
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("text", "code"), BLOCKS)
def test_python_blocks_run(text, code, tmp_path, monkeypatch):
    """Every block runs on its own. Models are narrower and not pretrained; depth, patch and sizes are those of the named model."""
    if "export_segmenter" in code and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        pytest.skip("dynamic sizes of torch.export were tested with torch 2.14 and newer")
    real = timm.create_model

    def small(name, pretrained=False, **settings):
        return real(name.partition(".")[0], pretrained=False, embed_dim=48, num_heads=4, **settings)

    monkeypatch.setattr(timm, "create_model", small)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)  # as torchrun does
    monkeypatch.chdir(tmp_path)
    for name in set(re.findall(r'Segmenter\.load\("(\w+\.safetensors)"', code)):  # what a reader has by now, and a photograph
        vit = rein.wrap(rein.testing.pocket_vit(), rein.ReinConfig(num_tokens=4, rank=2))
        rein.Segmenter(vit, rein.heads.LinearHead(vit.embed_dim, 3)).save(name)
        Image.new("RGB", (40, 30)).save("photo.jpg")
    exec(compile(code, f"{text.name}", "exec"), {})


def test_the_readmes_first_screen_has_the_picture_the_install_line_and_the_code():
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:32])
    assert re.search(r"!\[.*\]\(docs/images/demo.png\).*^pip install .*rein.wrap", first, re.DOTALL | re.MULTILINE)


def test_the_readme_states_the_demos_figures_as_measured():
    """The means over seeds that the evidence page has in its table."""
    table = (ROOT / "docs/evidence.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[2:] for line in table.splitlines() if line.startswith("| ")}
    caption = " ".join((ROOT / "README.md").read_text().split())
    (full_day, _, full_night), (rein_day, _, rein_night), frozen = (rows[name][:3] for name in ("full", "rein", "frozen"))
    assert f"full fine-tuning reaches {full_day} and Rein {rein_day}." in caption
    assert f"full fine-tuning falls to {full_night}, and Rein keeps {rein_night}." in caption
    assert f"The frozen backbone alone has {frozen[0].split()[0]} and {frozen[2].split()[0]}:" in caption


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / "docs/notebook.ipynb").read_text())
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["loss"].item() < 2.5  # from 2.9, the logarithm of 19 classes
    assert torch.equal(names["again"].segment(names["night"].image).classes, names["result"].classes)


@cache
def get_help(command):
    """All options of a command, as it prints them."""
    everything = "--help-all" if command[0] in EXPERIMENT_COMMANDS else "--help"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main([*command, everything])
    return printed.getvalue()


def test_the_commands_and_options_in_the_texts_exist():
    fences = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    blocks = [block for text in TEXTS for language, block in fences.findall(text.read_text()) if not language]
    commands = {line for block in blocks for line in re.findall(r"^(?:make|rein) .*$", block, re.MULTILINE)}
    assert any(command.startswith("make demo") for command in commands)
    makefile = (ROOT / "Makefile").read_text()
    for command in commands:
        words = command.split("#")[0].split()
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), command
        else:
            help_text = get_help(tuple(words[1 : 3 if words[1] == "data" else 2]))
            for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                assert option in help_text, command


def test_the_pictures_in_the_texts_exist():
    for text in TEXTS:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text.read_text()):
            assert (text.parent / target).is_file(), target
