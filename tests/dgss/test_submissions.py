"""`rein predict --format`: files for the test servers of Cityscapes and ACDC."""

import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from dgss import trees
from rein.cli import main
from rein.dgss.data.datamodule import Domain, DomainData
from rein.dgss.data.submissions import label_ids
from rein.dgss.labels import CITYSCAPES_CLASSES

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning and others warn of at such sizes

# ids of the 19 classes in the publisher's label definitions
IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on Cityscapes at toy size, and data sets with test images. Returns its configuration, and the options of predict."""
    folder = tmp_path_factory.mktemp("run")
    for split in ("train", "val", "test"):
        trees.make("cityscapes", folder / "data/cityscapes", split=split, count=3, size=(32, 64))
    trees.make("acdc", folder / "data/acdc", split="test", count=4, size=(36, 64))
    config = {
        "out": str(folder / "run"),
        "model": {
            "backbone": "test_vit",
            "pretrained": False,
            "patch_size": 8,
            "method_settings": {"num_tokens": 5, "rank": 2, "query_dim": None},
            "head": "LinearHead",
            "lr": 3e-3,
            "window": 32,
        },
        "data": {
            "root": str(folder / "data"),
            "sources": [{"dataset": "cityscapes"}],
            "targets": [{"dataset": "cityscapes"}],
            "held_out": 0,
            "crop": 32,
            "workers": 0,
        },
        "trainer": {"max_steps": 30, "enable_progress_bar": False, "accelerator": "cpu", "logger": False},
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(path)]) == 0
    checkpoint = str(folder / "run/checkpoints/last.ckpt")
    return folder, ["predict", "--config", str(path), "--ckpt_path", checkpoint]


def read_zip(path):
    """Name -> pixels of each file; each must be a PNG with one channel of 8 bits."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file, Image.open(file) as picture:
                assert (picture.format, picture.mode) == ("PNG", "L")
                found[name] = np.array(picture)
    return found


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("cityscapes", (32, 64), [f"{('aachen', 'bochum')[i % 2]}_{i:06}_000019_leftImg8bit.png" for i in range(3)]),
        ("acdc", (36, 64), [f"GOPR0{i}_frame_000{i}_rgb_anon.png" for i in range(4)]),
    ],
)
def test_the_test_images_are_predicted_as_label_ids_under_their_names_in_a_zip_file(run, tmp_path, capsys, name, size, expected):
    folder, arguments = run
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out), "--format", name]) == 0
    said = capsys.readouterr().out
    assert f"{len(expected)} of {len(expected)} predictions are in {out / 'predictions'}" in said
    assert f"label ids of all images for the test server are in {out / f'{name}.zip'}" in said
    files = read_zip(out / f"{name}.zip")
    assert sorted(files) == sorted(expected)
    assert sorted(path.name for path in out.iterdir()) == sorted([f"{name}.zip", "predictions"])
    assert all(pixels.shape == size and set(np.unique(pixels)) <= set(IDS) for pixels in files.values())
    images = folder / "data" / name  # the same images without the format have the same classes
    images = images / ("leftImg8bit/test" if name == "cityscapes" else "rgb_anon")
    assert main([*arguments, "--out", str(tmp_path / "plain"), "--data.predict", str(images)]) == 0
    for path in (tmp_path / "plain/predictions").rglob("*.png"):
        with Image.open(path) as picture:
            assert np.array_equal(label_ids(np.array(picture)), files[path.name])


def test_the_test_images_have_the_size_of_the_protocol(run):
    folder, _ = run
    data = DomainData(str(folder / "data"), targets=[Domain("acdc")], protocol="rein", workers=0)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)
    data.submission = "acdc"
    for image, size, *_ in data.predict_dataloader():
        assert image.shape == (1, 3, 540, 960)
        assert [int(side) for side in size] == [36, 64]  # logits are resized to the image's own size


def test_the_label_ids_are_the_publishers():
    assert label_ids(np.arange(len(CITYSCAPES_CLASSES))).tolist() == IDS


def test_a_folder_may_be_predicted_in_a_format(run, tmp_path):
    folder, arguments = run
    images = folder / "data/acdc/rgb_anon/fog"
    assert main([*arguments, "--out", str(tmp_path), "--format", "acdc", "--data.predict", str(images)]) == 0
    assert list(read_zip(tmp_path / "acdc.zip")) == ["GOPR00_frame_0000_rgb_anon.png"]


def test_no_zip_file_is_written_if_an_image_cannot_be_read(run, tmp_path, capsys):
    _, arguments = run
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 32)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"nothing")
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out), "--format", "cityscapes", "--data.predict", str(tmp_path / "in")]) == 1
    assert "b.png cannot be read as an image" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["predictions"]


def test_images_of_one_name_are_refused_since_the_files_share_a_folder(run, tmp_path, capsys):
    _, arguments = run
    for name in ("one", "two"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (64, 32)).save(tmp_path / "in" / name / "same.png")
    assert main([*arguments, "--out", str(tmp_path), "--format", "acdc", "--data.predict", str(tmp_path / "in")]) == 2
    assert "several images are named same; expected different names" in capsys.readouterr().err


def test_other_classes_than_those_of_cityscapes_are_refused(run, tmp_path, capsys):
    _, arguments = run
    trees.make("folder", tmp_path / "mine", split="val")
    domain = f"[{{dataset: folder, path: {tmp_path / 'mine'}, split: val}}]"
    options = ["--data.sources", domain, "--data.targets", domain, "--out", str(tmp_path)]
    assert main([*arguments, *options, "--format", "acdc"]) == 2
    assert "the run has the classes sky, ground, thing; the server of acdc expects the 19 classes" in capsys.readouterr().err
