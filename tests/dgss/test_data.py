import json

import numpy as np
import pytest
import torch
from PIL import Image

from dgss.folders import CLASSES, make_folder
from rein.dgss.datasets.generated import Scenes
from rein.dgss.domains import find_domains, open_domain
from rein.dgss.labels import CITYSCAPES, LabelSpace, distinct_colours, label_space
from rein.errors import InputError


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path)


def space_of(root):
    return label_space(root)


def test_a_folder_gives_images_and_labels_with_255_for_nothing(root):
    folder = open_domain(root / "day", space_of(root))
    assert len(folder) == 4
    image, label = folder[1]
    assert image.dtype == label.dtype == torch.uint8
    assert image.shape == (3, 32, 48)
    assert label.shape == (32, 48)
    assert (label[:2] == 255).all()
    assert set(label.unique().tolist()) == {0, 1, 2, 255}
    assert image[0, 20:].float().mean() < image[2, 2:8].float().mean()


def test_domains_are_found_and_named(root):
    (root / "notes").mkdir()
    (root / ".trash" / "images").mkdir(parents=True)
    (root / "day" / "images" / "._000.jpg").write_bytes(b"left by a file manager")
    assert len(open_domain(root / "day", space_of(root))) == 4
    assert find_domains(root) == ["day", "dusk"]


def test_classes_come_from_the_index_or_from_the_arguments(root):
    assert label_space(root).names == tuple(CLASSES)
    assert label_space(root).ignored == (11,)
    given = label_space(root, ["a", "b"], [7, 8])
    assert given.names == ("a", "b")
    assert given.ignored == (7, 8)
    (root / "index.json").write_text(json.dumps({"classes": ["x"], "palette": [[1, 2, 3]], "ignore_label_on_disk": [4, 5]}))
    assert label_space(root) == LabelSpace(("x",), ((1, 2, 3),), (4, 5))


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_label_files_of_every_depth_are_read_as_numbers(root, mode):
    path = root / "day" / "labels" / "000.png"
    numbers = np.array(Image.open(path))
    if mode == "P":
        picture = Image.fromarray(numbers)
        picture.putpalette([7] * 768)
    else:
        picture = Image.fromarray(numbers.astype({"L": np.uint8, "I;16": np.uint16}[mode]))
    picture.save(path)
    label = open_domain(root / "day", space_of(root))[0][1].numpy()
    assert np.array_equal(label[2:], numbers[2:])


def test_scenes_are_the_same_streets_in_every_domain():
    day, night = (Scenes(domain, range(2), (32, 64)) for domain in ("day", "night"))
    assert len(day) == 2
    assert torch.equal(day[1][1], night[1][1])
    assert day[1][0].float().mean() > 1.5 * night[1][0].float().mean()
    assert day[1][0].shape == (3, 32, 64)
    assert day[1][1].max() < len(CITYSCAPES.names)


def test_any_number_of_classes_gets_different_colours():
    assert len(set(distinct_colours(60))) == 60
    assert LabelSpace(tuple(map(str, range(60))), tuple(distinct_colours(60)))


def drop_label(root):
    (root / "day" / "labels" / "002.png").unlink()
    return r"images/002.jpg has no label; wanted .*labels/002.png"


def label_out_of_range(root):
    Image.fromarray(np.full((32, 48), 3, np.uint8)).save(root / "day" / "labels" / "001.png")
    return r"labels/001.png has labels \[3\]; wanted 0 to 2 \(sky, ground, thing\) or 11, 255 for nothing"


def other_size(root):
    Image.fromarray(np.zeros((31, 48), np.uint8)).save(root / "day" / "labels" / "001.png")
    return r"001.jpg is 48 x 32 pixels, its label .*001.png is 48 x 31; they must be equal"


def coloured_label(root):
    Image.new("RGB", (48, 32)).save(root / "day" / "labels" / "001.png")
    return "001.png is a picture of mode RGB; labels must have one channel"


def broken_image(root):
    (root / "day" / "images" / "003.jpg").write_bytes(b"no image")
    return "003.jpg cannot be read as an image"


def truncated_label(root):
    path = root / "day" / "labels" / "003.png"
    path.write_bytes(path.read_bytes()[:60])
    return "003.png cannot be read as an image"


def no_images(root):
    for path in (root / "day" / "images").iterdir():
        path.unlink()
    return "day/images has no images"


def deep_image(root):
    (root / "day" / "images" / "001.jpg").unlink()
    Image.fromarray(np.zeros((32, 48), np.uint16)).save(root / "day" / "images" / "001.png")
    return "001.png is a picture of mode I;16; images must have 8 bits per channel"


def thin_pair(root):
    Image.new("RGB", (400, 20)).save(root / "day" / "images" / "001.jpg")
    Image.new("L", (400, 20)).save(root / "day" / "labels" / "001.png")
    return "001.jpg is 400 x 20 pixels; wanted at least 16 each way, and sides of at most 8 to 1"


def two_of_a_name(root):
    Image.new("RGB", (48, 32)).save(root / "day" / "images" / "001.png")
    return "more than one image called '001'"


SPOILED = [drop_label, label_out_of_range, other_size, coloured_label, broken_image, truncated_label, no_images]


@pytest.mark.parametrize("spoil", [*SPOILED, deep_image, thin_pair, two_of_a_name])
def test_a_bad_folder_is_refused_and_the_file_named(root, spoil):
    message = spoil(root)
    with pytest.raises(InputError, match=message):
        open_domain(root / "day", space_of(root))


def test_a_bad_root_or_index_is_refused(root, tmp_path):
    with pytest.raises(InputError, match=r"nowhere is not a folder; --data wants one with <domain>/images"):
        find_domains(root / "nowhere")
    with pytest.raises(InputError, match="has no domains"):
        find_domains(root / "day" / "images")
    with pytest.raises(InputError, match="images is not a folder"):
        open_domain(root / "night", space_of(root))
    for content, message in (
        ("{not json", "index.json cannot be read"),
        ("[]", "must be an object with a list 'classes'"),
        ('{"classes": 5}', "class names are not known"),
        ('{"classes": "road"}', "class names are not known"),
        ('{"classes": ["a", "a"]}', "class names must differ"),
        ('{"classes": ["a"], "palette": [["red"]]}', r"is not a list of \[red, green, blue\] from 0 to 255"),
        ('{"classes": ["a"], "palette": [[300, 0, 0]]}', r"is not a list of \[red, green, blue\] from 0 to 255"),
        ('{"classes": ["a"], "ignore_label_on_disk": "x"}', "wanted whole numbers from 0 to 65535"),
        ('{"classes": ["a"], "ignore_label_on_disk": [null]}', "wanted whole numbers from 0 to 65535"),
    ):
        (root / "index.json").write_text(content)
        with pytest.raises(InputError, match=message):
            label_space(root)
    (root / "index.json").unlink()
    with pytest.raises(InputError, match=r"class names are not known: give --classes"):
        label_space(root)
    with pytest.raises(InputError, match="palette has 1 colours for 2 classes"):
        LabelSpace(("a", "b"), ((0, 0, 0),))
