"""The layout of the package: layers of imports, the cost of importing, public names, documentation."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import rein

ROOT = Path(rein.__file__).parent
LAYERS = {
    "_version": 0,
    "errors": 0,
    "extras": 0,
    "modes": 0,
    "config": 0,
    "files": 1,
    "remote": 1,
    "resizing": 1,
    "pytorch_files": 1,
    "refinement": 1,
    "adapter": 1,
    "stagewise": 1,
    "named_adapters": 1,
    "heads": 1,
    "backbones": 2,
    "other_adapters": 2,
    "images": 2,
    "injection": 3,
    "parameters": 3,
    "routing": 3,
    "checkpoint": 4,
    "merging": 4,
    "segmenter": 4,
    "catalogue": 4,
    "official": 4,
    "hub": 5,
    "testing": 5,
    "export": 5,
    "dgss": 5,
    "cli": 6,
    "": 7,  # rein itself, the public names
}
# packages that may be imported besides the standard library and rein, by module; other modules may import none
ALLOWED = {
    "errors": set(),
    "config": set(),
    "adapter": {"torch", "einops"},
    "heads": {"torch", "einops"},
    "backbones": {"torch", "timm", "safetensors", "huggingface_hub"},
    "checkpoint": {"torch", "safetensors"},
    "cli": set(),
}
ALLOWED |= {
    module: {"torch"}
    for module in (
        "refinement",
        "stagewise",
        "resizing",
        "named_adapters",
        "routing",
        "merging",
        "modes",
        "injection",
        "parameters",
        "segmenter",
    )
}
ALLOWED["remote"] = {"huggingface_hub"}
ALLOWED["hub"] = {"torch", "timm"}
ALLOWED["images"] = {"torch", "numpy", "PIL"}
ALLOWED["other_adapters"] = {"torch"}
ALLOWED["files"] = {"torch", "safetensors"}
ALLOWED["pytorch_files"] = {"torch"}
ALLOWED["export"] = {"torch", "onnxruntime"}  # onnxruntime where it is used
ALLOWED["catalogue"] = {"torch", "timm"}
ALLOWED["testing"] = {"torch", "timm", "safetensors"}
ALLOWED["official"] = {"torch", "safetensors"}
FILES = sorted(ROOT.rglob("*.py"))


DGSS = ROOT / "dgss"
DGSS_LAYERS = {
    "labels": 0,
    "methods": 0,
    "recipes": 0,
    "scenes": 0,
    "panels": 1,
    "pages": 1,
    "data": 2,
    "evaluation": 3,
    "prediction": 3,
    "training": 4,
    "commands": 5,
    "planning": 5,
    "demo": 6,
}


def module_of(path, root=ROOT):
    """The first part of a file's path below `root`: a module or a package; empty for `root` itself."""
    return path.relative_to(root).with_suffix("").parts[0].replace("__init__", "")


def imports(path):
    """(module, whether at the top level) for every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"rein.{alias.name}" for alias in node.names] if node.module == "rein" else [node.module]
            yield from ((name, id(node) in top) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_to_lower_layers_only(path):
    module = module_of(path)
    for name, _ in imports(path):
        if name.partition(".")[0] == "rein":
            other = (name.split(".") + [""])[1]
            other = other if other in LAYERS else ""  # `from rein import wrap` imports a public name
            if module == other or (other == "" and module == "dgss"):  # dgss is a user of the library
                continue
            assert LAYERS[other] <= LAYERS[module], f"{module} (layer {LAYERS[module]}) imports {name}"
            assert {module, other} != {"heads", "adapter"}, "heads and adapter do not import each other"


@pytest.mark.parametrize("path", sorted(DGSS.rglob("*.py")), ids=lambda path: str(path.relative_to(DGSS)))
def test_imports_inside_dgss_go_to_lower_layers_only(path):
    module = module_of(path, DGSS)
    for name, _ in imports(path):
        parts = [part for part in name.split(".") if part]
        if parts[:2] == ["rein", "dgss"]:
            others = parts[2:3] or list(names_imported_from_dgss(path))
            for other in others:
                if other != module:
                    assert DGSS_LAYERS[other] < DGSS_LAYERS[module], f"{module} (layer {DGSS_LAYERS[module]}) imports {other}"


def names_imported_from_dgss(path):
    """The modules that `from rein.dgss import ...` names in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "rein.dgss":
            yield from (alias.name for alias in node.names)


def test_every_module_of_dgss_has_a_layer():
    assert {module_of(path, DGSS) for path in DGSS.rglob("*.py")} - {""} == set(DGSS_LAYERS)


@pytest.mark.parametrize("package", ["data", "evaluation", "methods", "recipes", "scenes", "training"])
def test_a_package_of_dgss_states_what_belongs_there_and_what_imports_it(package):
    text = ast.get_docstring(ast.parse((DGSS / package / "__init__.py").read_text()))
    assert "Belongs here:" in text
    assert "imported by" in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_below_dgss_imports_an_optional_dependency(path):
    module = module_of(path)
    for name, _ in imports(path):
        package = name.partition(".")[0]
        if package not in sys.stdlib_module_names and package != "rein" and module != "dgss":
            assert package in ALLOWED.get(module, set()), f"{module} imports {package}"


def run(program):
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_importing_rein_loads_no_models_and_no_optional_package_and_has_no_side_effect():
    optional = [
        "timm",
        "huggingface_hub",
        "torchvision",
        "lightning",
        "PIL",
        "transformers",
        "peft",
        "matplotlib",
        "torchmetrics",
        "tensorboard",
        "tqdm",
    ]
    program = f"""
import sys, logging, warnings, torch
modules, filters, level = set(sys.modules), list(warnings.filters), logging.getLogger().level
state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
import rein
new = {{name.partition(".")[0] for name in set(sys.modules) - modules}}
assert not new & set({optional!r}), new
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads() and dtype == torch.get_default_dtype()
assert filters == list(warnings.filters) and level == logging.getLogger().level
"""
    run(program)


def test_a_missing_extra_says_what_to_install():
    program = """
import sys
sys.modules["lightning"] = None
from rein.cli import main
sys.exit(main(["demo"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "rein: this needs lightning, which is not installed; run: pip install 'rein-adapter[train]'\n"


def test_the_public_names_are_the_promised_ones():
    promised = "wrap unwrap disabled save load summary param_groups ReinConfig ReinAdapter Segmenter heads ReinError"
    promised += " routed merge push_to_hub"
    promised += " InputError UnsupportedBackboneError WrapError CheckpointError MissingExtraError DivergedError __version__"
    assert sorted(rein.__all__) == sorted(promised.split())
    assert all(hasattr(rein, name) for name in rein.__all__)


def test_every_error_is_public():
    from rein import errors

    assert {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)} <= set(
        rein.__all__
    )
    defined = {
        node.name: path.relative_to(ROOT)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    elsewhere = {name: str(path) for name, path in defined.items() if not hasattr(errors, name)}
    assert elsewhere == {"BackboneCheckError": "testing/checks.py"}  # public in rein.testing


def test_official_and_testing_are_imported_when_they_are_used():
    program = """
import sys, rein
assert {"official", "testing"} <= set(dir(rein))
assert not {"rein.official", "rein.testing", "timm"} & set(sys.modules)
assert rein.testing.tiny_vit().embed_dim == 32
assert callable(rein.official.read)
try:
    rein.nosuch
except AttributeError as error:
    assert str(error) == "module 'rein' has no attribute 'nosuch'"
else:
    raise AssertionError
"""
    run(program)


def test_every_error_is_a_rein_error_and_a_builtin_kind():
    from rein import errors

    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not rein.ReinError]
    assert len(kinds) >= 5
    for kind in kinds:
        assert issubclass(kind, rein.ReinError)
        assert issubclass(kind, (ValueError, RuntimeError, ImportError))


def documented(path):
    """Public functions, classes and methods of a file, with whether they have a docstring; overrides of torch's own are exempt."""
    inherited = {"train", "extra_repr", "on_train_epoch_start", "init_validation_tqdm"}
    tree = ast.parse(path.read_text())
    yield "module", ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node)
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and method.name not in inherited:
                    yield f"{node.name}.{method.name}", ast.get_docstring(method)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_is_documented(path):
    assert not [name for name, text in documented(path) if not text]
