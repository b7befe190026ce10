import json

import numpy as np
import pytest
import torch
from PIL import Image

from dgss.folders import CLASSES, make_folder
from rein.dgss.data.datasets import open_dataset
from rein.dgss.data.datasets.generated import Scenes
from rein.dgss.labels import CITYSCAPES, LabelSpace, distinct_colours, label_space
from rein.errors import InputError


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path)


def open_domain(root, name="day"):
    """One domain of `make_folder`, with the classes of all its domains."""
    return open_dataset("folder", root / name, space=label_space(root))


def test_a_folder_gives_images_and_labels_with_255_for_ignored_pixels(root):
    folder = open_domain(root)
    assert len(folder) == 4
    image, label = folder[1]
    assert image.dtype == label.dtype == torch.uint8
    assert image.shape == (3, 32, 48)
    assert label.shape == (32, 48)
    assert (label[:2] == 255).all()
    assert set(label.unique().tolist()) == {0, 1, 2, 255}
    assert image[0, 20:].float().mean() < image[2, 2:8].float().mean()


def test_hidden_files_are_not_images(root):
    (root / "day" / "images" / "._000.jpg").write_bytes(b"written by a file manager")
    assert len(open_domain(root)) == 4


def test_arguments_take_precedence_over_the_index(root):
    assert label_space(root).names == tuple(CLASSES)
    assert label_space(root).ignored == (11,)
    given = label_space(root, ["a", "b"], [7, 8])
    assert given.names == ("a", "b")
    assert given.ignored == (7, 8)
    (root / "index.json").write_text(json.dumps({"classes": ["x"], "palette": [[1, 2, 3]], "ignore_label_on_disk": [4, 5]}))
    assert label_space(root) == LabelSpace(("x",), ((1, 2, 3),), (4, 5))


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_label_files_of_every_mode_are_read_as_numbers(root, mode):
    path = root / "day" / "labels" / "000.png"
    numbers = np.array(Image.open(path))
    if mode == "P":
        picture = Image.fromarray(numbers)
        picture.putpalette([7] * 768)
    else:
        picture = Image.fromarray(numbers.astype({"L": np.uint8, "I;16": np.uint16}[mode]))
    picture.save(path)
    label = open_domain(root)[0][1].numpy()
    assert np.array_equal(label[2:], numbers[2:])


def test_scenes_are_the_same_streets_in_every_domain():
    day, night = (Scenes(domain, range(2), (32, 64)) for domain in ("day", "night"))
    assert len(day) == 2
    assert torch.equal(day[1][1], night[1][1])
    assert day[1][0].float().mean() > 1.5 * night[1][0].float().mean()
    assert day[1][0].shape == (3, 32, 64)
    assert day[1][1].max() < len(CITYSCAPES.names)


def test_sixty_classes_have_different_colours():
    assert len(set(distinct_colours(60))) == 60
    assert LabelSpace(tuple(map(str, range(60))), tuple(distinct_colours(60)))


def drop_label(root):
    (root / "day" / "labels" / "002.png").unlink()
    return r"images/002.jpg has no label; expected .*labels/002.png"


def label_out_of_range(root):
    Image.fromarray(np.full((32, 48), 3, np.uint8)).save(root / "day" / "labels" / "001.png")
    return r"labels/001.png has label values \[3\]; expected 0 to 2 \(sky, ground, thing\) or 11, 255 \(ignored\)"


def other_size(root):
    Image.fromarray(np.zeros((31, 48), np.uint8)).save(root / "day" / "labels" / "001.png")
    return r"001.jpg is 48 x 32 pixels and its label .*001.png is 48 x 31; expected equal sizes"


def coloured_label(root):
    picture = Image.new("RGB", (48, 32))
    picture.putpixel((3, 4), (128, 64, 0))
    picture.save(root / "day" / "labels" / "001.png")
    return (
        r"001.png has 2 colours, such as \[0, 0, 0\], \[128, 64, 0\]; expected class numbers in one channel or in equal channels. "
        "If the colours are classes, add a colour table to index.json"
    )


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
    return "001.png has mode I;16; expected an image with 8 bits per channel"


def two_of_a_name(root):
    Image.new("RGB", (48, 32)).save(root / "day" / "images" / "001.png")
    return "day/images has several images named '001', for one label"


DAMAGES = [
    drop_label,
    label_out_of_range,
    other_size,
    coloured_label,
    broken_image,
    truncated_label,
    no_images,
    deep_image,
    two_of_a_name,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_an_error_that_names_the_file(root, damage):
    message = damage(root)
    with pytest.raises(InputError, match=message):
        [*map(open_domain(root).__getitem__, range(4))]


def test_a_bad_folder_or_index_is_refused(root):
    with pytest.raises(
        InputError,
        match=r"night does not exist; expected images/\* and labels/\*.png in .*night or in .*night/train. Check the path",
    ):
        open_domain(root, "night")
    for content, message in (
        ("{not json", "index.json cannot be read"),
        ("[]", "is a JSON list; expected a JSON object with a list 'classes'"),
        ("[" * 100_000, "index.json cannot be read: .*Expected a JSON object"),
        (
            '{"clases": ["a", "b"]}',
            r"unknown key 'clases' in .*index.json; expected 'classes', 'palette', .*\. Did you mean 'classes'\?",
        ),
        ('{"classes": ["a", "b"], "colours": []}', r"unknown key 'colours' in .*Did you mean 'colors'\?"),
        ('{"classes": ["a", "b"], "licence": "mine"}', "unknown key 'licence' in .*Remove the key"),
        ('{"classes": ["a", "\\ud800"]}', "expected different, non-empty names of printable characters"),
        ('{"classes": ["a", " "]}', "expected different, non-empty names of printable characters"),
        ('{"classes": 5}', "The class names are unknown"),
        ('{"classes": "road"}', "The class names are unknown"),
        ('{"classes": ["a", "a"]}', "The class names are 'a', 'a'; expected different, non-empty names"),
        (
            '{"classes": ["a"], "palette": [["red"]]}',
            r"is not valid; expected a list of \[red, green, blue\], each from 0 to 255",
        ),
        (
            '{"classes": ["a"], "palette": [[300, 0, 0]]}',
            r"is not valid; expected a list of \[red, green, blue\], each from 0 to 255",
        ),
        ('{"classes": ["a"], "ignore_label_on_disk": "x"}', "expected integers from 0 to 65535"),
        ('{"classes": ["a"], "ignore_label_on_disk": [null]}', "expected integers from 0 to 65535"),
    ):
        (root / "index.json").write_text(content)
        with pytest.raises(InputError, match=message):
            label_space(root)
    (root / "index.json").unlink()
    with pytest.raises(
        InputError,
        match=r"The class names are unknown; expected a list of names 'classes' in .*index.json. Add the list, or set the option",
    ):
        label_space(root)
    with pytest.raises(InputError, match="The palette has 1 colours for 2 classes; expected one per class"):
        LabelSpace(("a", "b"), ((0, 0, 0),))
