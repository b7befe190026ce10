"""The pytest plugin, in test suites of other projects, which run in processes of their own."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rein

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "tests/example_project"
PAGE = ROOT / "docs/your-ci.md"


def run(folder, *arguments):
    """Run pytest in `folder` with the plugin, as if it was installed with its entry point, and without any other plugin."""
    paths = [str(Path(rein.__file__).parent.parent), *sys.path]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "_rein_pytest", "-p", "no:cacheprovider", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def run_text(tmp_path, text, *arguments):
    (tmp_path / "test_it.py").write_text(text)
    return run(tmp_path, "--rootdir", str(tmp_path), *arguments)


@pytest.mark.slow
def test_the_suite_of_the_example_project_passes():
    done = run(EXAMPLE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


@pytest.mark.slow
def test_the_suite_of_the_example_project_fails_for_a_backbone_that_ignores_its_blocks(tmp_path):
    for file in EXAMPLE.glob("*.*"):
        text = file.read_text()
        (tmp_path / file.name).write_text(text.replace("tokens = layer(tokens)", "layer(tokens)"))
    done = run(tmp_path, "-k", "works_with_rein")
    assert done.returncode == 1
    assert "BackboneCheckError: features: the adapter does not change the outputs of the model" in done.stdout


def test_a_suite_that_uses_no_fixture_imports_neither_torch_nor_rein(tmp_path):
    text = "import sys\ndef test_it(): assert not {'torch', 'rein', 'timm'} & set(sys.modules)"
    done = run_text(tmp_path, text)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_test_gets_a_model_of_its_own_and_its_random_state_stays(tmp_path):
    text = """
import pytest, torch, rein
state = torch.get_rng_state()
weights = []

@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("name", ["rein_tiny_vit", "rein_pocket_vit"])
def test_it(name, number, request):
    model = request.getfixturevalue(name)
    assert not model.training
    rein.wrap(model)  # refused for a model that another test has wrapped
    weights.append(model.blocks[0].attn.qkv.weight)
    assert number == 0 or torch.equal(*weights[-2:])
    model.requires_grad_(False)
    weights[-1].add_(1) if number == 1 else None
    torch.set_rng_state(state)
    request.getfixturevalue("rein_check_backbone")
    assert torch.equal(torch.get_rng_state(), state)

def test_building_draws_nothing(rein_tiny_vit, rein_pocket_vit):
    assert torch.equal(torch.get_rng_state(), state)
"""
    done = run_text(tmp_path, text, "-W", "error")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_the_fixtures_are_listed_with_their_documentation(tmp_path):
    done = run_text(tmp_path, "", "--fixtures")
    for name in ("rein_tiny_vit", "rein_pocket_vit", "rein_check_backbone"):
        assert re.search(rf"^{name} .*\n    \w+", done.stdout, re.MULTILINE), done.stdout


def test_the_package_has_the_plugin_as_an_entry_point():
    text = (ROOT / "pyproject.toml").read_text()
    name, value = re.search(r'\[project.entry-points.pytest11\]\n(\w+) = "(\w+)"', text).groups()
    plugin = importlib.metadata.EntryPoint(name, value, "pytest11").load()
    assert f'"src/{value}.py"' in text  # in the wheel
    assert Path(plugin.__file__).name == "_rein_pytest.py"


def test_the_page_shows_the_files_of_the_example_project():
    text = PAGE.read_text()
    functions = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    assert functions
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.parse(block).body:
            if isinstance(node, ast.FunctionDef):
                assert ast.get_source_segment(block, node) in (EXAMPLE / "test_backbone.py").read_text(), node.name
