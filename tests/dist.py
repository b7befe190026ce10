"""Run the tests of the source distribution that `make dist` built, install it and the wheel into empty environments, and use what
each extra is for: `make test-dist`.

    python tests/dist.py dist

Not a part of the test suite: each environment takes gigabytes, which uv shares between them where it can.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

BASE = """
import importlib.resources, rein, timm, torch
root = importlib.resources.files("rein")
assert "site-packages" in str(root), root
assert (root / "py.typed").is_file()
vit = rein.wrap(timm.create_model("test_vit", num_classes=0))
rein.save(vit, "adapter.safetensors")
rein.load(rein.unwrap(vit), "adapter.safetensors")
assert rein.testing.pocket_vit()(torch.zeros(1, 3, 64, 64)).isfinite().all()
"""
CODE = {  # extra -> a program that uses it
    "": "",
    "train": "from rein.dgss import commands, demo, recipes; assert len(recipes.listed()) > 50",
    "data": "import cv2, imagecorruptions, scipy",
    "peers": "import peft",
    "mask2former": "rein.heads.Mask2FormerHead([64] * 4, 3, channels=64)",
    "heads": "rein.heads.DecoderHead([64] * 4, 3)",
    "export": "import onnx, onnxruntime, onnxscript",
    "int8": "import torchao",
    "hub": "import huggingface_hub",
    "video": "import av",
}
COMMANDS = {  # extra -> arguments of the `rein` command and the start of what it prints
    "": [
        ("--version", "rein "),
        ("info adapter.safetensors", "adapter.safetensors: adapter, format 2"),
        ("backbones test_vit", "test_vit"),
    ],
    "train": [("recipes streets-rein", "# Generated streets"), ("data list", "gtav"), ("fit --help", "usage: rein fit")],
}
IN_WHEEL = (
    "_rein_command.py",
    "_rein_pytest.py",
    "rein/py.typed",
    "rein/testing/pocket_vit_v2.safetensors",
    "rein/dgss/recipes/gtav-dinov2-l-rein.yaml",
    "rein/dgss/recipes/bases/gtav.yaml",
)
IN_SOURCES = (
    "src/rein/py.typed",
    "src/rein/testing/pocket_vit_v2.safetensors",
    "src/rein/dgss/recipes/streets-rein.yaml",
    "README.md",
    "LICENSE",
)


def main(folder):
    """Check the one wheel and the one source distribution of a folder."""
    (wheel,), (sources,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_content(wheel, sources)
    check_tests(sources)
    for extra in CODE:
        check_install(wheel, extra)
    check_install(sources, "")


def check_content(wheel, sources):
    """Both have the package's data, and the wheel has nothing but the package."""
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    assert not set(IN_WHEEL) - set(inside), set(IN_WHEEL) - set(inside)
    others = [name for name in inside if not name.startswith(("rein/", "rein_adapter-", "_rein_")) or "__pycache__" in name]
    assert not others, others
    with tarfile.open(sources) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
    assert not set(IN_SOURCES) - set(inside), set(IN_SOURCES) - set(inside)
    assert not [name for name in inside if name.startswith((".venv", "runs", "dist"))]


def check_tests(sources):
    """The source distribution passes its own tests, in this environment."""
    print(f"{sources.name}: tests", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sources) as archive:
            archive.extractall(folder, filter="data")
        (root,) = Path(folder).iterdir()
        program = "import sys, pytest; sys.path.insert(0, 'src'); sys.exit(pytest.main(['-q', '-m', 'not sweep and not slow']))"
        run(sys.executable, "-c", program, cwd=root)


def check_install(distribution, extra):
    """Install into a new environment, and run the programs of the extra."""
    print(f"{distribution.name}{f'[{extra}]' if extra else ''}", flush=True)
    uv = Path(sys.executable).with_name("uv")
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "env", "bin", "python")
        run(uv, "venv", "--quiet", "--python", sys.executable, Path(folder, "env"))
        run(uv, "pip", "install", "--quiet", "--python", python, f"rein-adapter[{extra}] @ {distribution.resolve().as_uri()}")
        run(python, "-c", BASE + CODE[extra], cwd=folder)
        for arguments, start in COMMANDS.get(extra, []):
            printed = run(python.with_name("rein"), *arguments.split(), cwd=folder)
            assert printed.startswith(start), printed[:500]


def run(*command, cwd=None):
    """Run a program without the variables of this environment; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:300]}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
