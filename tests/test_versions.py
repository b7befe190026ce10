"""Files of every format version load for ever, and a newer one is refused with the version to install."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rein
from rein import checkpoint

FILES = Path(__file__).parent / "files"


def maker(version):
    """The script that wrote the files of a format version; it makes the same backbone and images again."""
    spec = importlib.util.spec_from_file_location(f"make_format_{version}", FILES / f"make_format_{version}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_format_version_has_files():
    assert sorted(path.name for path in FILES.glob("format-*")) == [
        f"format-{version}" for version in range(1, checkpoint.FORMAT_VERSION + 1)
    ]


@pytest.mark.parametrize("version", range(1, checkpoint.FORMAT_VERSION + 1))
def test_files_of_every_format_version_give_the_numbers_of_that_time(version):
    made, folder = maker(version), FILES / f"format-{version}"
    expected, images = load_file(folder / "numbers.safetensors"), made.make_images()
    model = rein.load(made.make_backbone(), folder / "adapter.safetensors")
    segmenter = rein.Segmenter.load(folder / "segmenter.safetensors", made.make_backbone()).eval()
    assert model.rein.config == segmenter.backbone.rein.config == made.CONFIG
    with torch.no_grad():
        found = {
            "features": model.forward_features(images),
            "queries": model.rein.queries(),
            "logits": segmenter(images),
        }
    for name, tensor in found.items():
        # float32 on other machines and in other versions of torch: some units of the last place, through three blocks
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    with rein.disabled(model), torch.no_grad():
        assert (model.forward_features(images) - expected["features"]).abs().max() > 0.01, "the adapter changes nothing"


def newer(path, version, wrote):
    """A copy of the file that a later version of rein could have written."""
    source = FILES / "format-1" / "adapter.safetensors"
    with safe_open(source, "pt") as file:
        metadata = {**file.metadata(), "rein_format": version, "rein_version": json.dumps(wrote)}
    save_file(load_file(source), path, metadata)
    return path


@pytest.mark.parametrize(
    ("version", "wrote", "remedy"),
    [
        ("3", "1.4.0", r"rein 1.4.0 wrote it, so run: pip install 'rein-adapter>=1.4.0'"),
        ("12", "0.1.10", r"rein 0.1.10 wrote it, so run: pip install 'rein-adapter>=0.1.10'"),
        ("3", "0.0.1", "upgrade rein-adapter"),  # a version that cannot have written it
        ("3", "1.0.0'; rm -rf /", "upgrade rein-adapter"),
        ("3", ["1.0.0"], "upgrade rein-adapter"),
        ("x\n", None, "upgrade rein-adapter"),
    ],
)
def test_a_newer_format_is_refused_with_the_version_to_install(tmp_path, version, wrote, remedy):
    path = newer(tmp_path / "new.safetensors", version, wrote)
    for read in (lambda: rein.load(maker(1).make_backbone(), path), lambda: checkpoint.describe_file(path)):
        with pytest.raises(
            rein.CheckpointError, match=rf"has format version {version.strip()}, rein .* reads versions 1, 2; {remedy}\.$"
        ):
            read()


def test_the_facts_of_version_2_are_read():
    segmenter = rein.Segmenter.load(FILES / "format-2" / "segmenter.safetensors", maker(2).make_backbone())
    assert segmenter.classes == ["road", "sky", "car"]
    assert segmenter.palette == [(128, 64, 128), (70, 130, 180), (0, 0, 142)]
    assert segmenter.normalization == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    assert segmenter.notes == {"sources": ["day"], "window": 16}
