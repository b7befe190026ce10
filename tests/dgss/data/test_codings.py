"""How a user's own label files encode classes: class numbers in files of several kinds, values, and colours."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dgss import trees
from rein.cli import main
from rein.dgss.data.datasets import DATASETS, open_dataset, parse_options, space_of
from rein.errors import InputError

COLOURS = {"sky": [70, 130, 180], "ground": [0, 0, 0], "thing": [255, 0, 0]}
VOID = [255, 255, 255]


def numbers(size=(20, 30)):
    """Three classes and ignored pixels."""
    label = np.zeros(size, np.uint8)
    label[8:], label[12:16, 5:15], label[:2] = 1, 2, 255
    return label


def painted(label=None):
    """The colours of a label, (H, W, 3)."""
    table = np.full((256, 3), VOID, np.uint8)
    table[:3] = list(COLOURS.values())
    return table[numbers() if label is None else label]


def paletted(label, palette):
    picture = Image.fromarray(label, "P")
    picture.putpalette(palette)
    return picture


def write(root, label, index=None):
    """A folder with one image and a label."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "labels").mkdir(exist_ok=True)
    Image.new("RGB", (label.width, label.height)).save(root / "images" / "0.png")
    label.save(root / "labels" / "0.png")
    (root / "index.json").write_text(json.dumps({"classes": list(COLOURS)} if index is None else index))
    return root


def read(root, **options):
    return open_dataset("folder", root, **options)[0][1].numpy()


KINDS = {
    "grey": (lambda label: Image.fromarray(label), "values 0 to 2 in one channel"),
    "16 bits": (lambda label: Image.fromarray(label.astype(np.uint16)), "values 0 to 2 in one channel"),
    "RGB": (lambda label: Image.fromarray(label).convert("RGB"), "values 0 to 2 in equal channels"),
    "RGBA": (lambda label: Image.fromarray(label).convert("RGBA"), "values 0 to 2 in equal channels"),
    "grey with transparency": (lambda label: Image.fromarray(label).convert("LA"), "values 0 to 2 in equal channels"),
    "paletted": (
        lambda label: paletted(label, bytes(range(255, -1, -1)) * 3),
        "values 0 to 2, the indices of a palette (its colours are not used)",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_class_numbers_are_read_from_every_kind_of_file_and_the_kind_is_stated(tmp_path, kind, capsys):
    make, coding = KINDS[kind]
    root = write(tmp_path, make(numbers()))
    assert np.array_equal(read(root), numbers())
    assert open_dataset("folder", root).coding_of(0) == coding
    assert main(["data", "check", "folder", str(root)]) == 0
    assert f"labels: {coding} (1)" in capsys.readouterr().out


def test_palettes_that_differ_between_files_are_refused_and_read_by_their_colours(tmp_path, capsys):
    colours = np.array(list(COLOURS.values()), np.uint8)
    others = colours[::-1].tobytes()
    write(tmp_path, paletted(numbers().clip(max=2), colours.tobytes()))
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "1.png")
    paletted(2 - numbers().clip(max=2), others).save(tmp_path / "labels" / "1.png")
    data = open_dataset("folder", tmp_path)
    first = data[0][1]
    with pytest.raises(
        InputError, match=r"1.png has the colour .* for index 0 of its palette, an earlier file had .*'colors'; if"
    ):
        data[1]
    assert main(["data", "check", "folder", str(tmp_path)]) == 2
    assert "expected one palette for all files" in capsys.readouterr().err
    by_colour = open_dataset("folder", tmp_path, colors=COLOURS)
    assert all(torch.equal(by_colour[index][1], first) for index in range(2))


def test_labels_that_may_be_coded_otherwise_are_named(tmp_path, capsys):
    label = np.zeros((20, 30), np.uint8)
    label[:9] = 1
    write(tmp_path, Image.fromarray(label), {"classes": ["ground", "thing"]})
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "1.png")
    Image.fromarray(255 * label).save(tmp_path / "labels" / "1.png")
    assert main(["data", "check", "folder", str(tmp_path)]) == 0
    assert "note: labels with only 'ground' and ignored pixels: 1. If 255 stands for 'thing'" in capsys.readouterr().out


def test_a_key_that_stands_twice_in_the_index_is_refused(tmp_path):
    write(tmp_path, Image.fromarray(numbers()))
    (tmp_path / "index.json").write_text('{"classes": ["a", "b", "c"], "classes": ["c", "b", "a"]}')
    with pytest.raises(InputError, match="index.json cannot be read: the key 'classes' stands in it twice"):
        open_dataset("folder", tmp_path)


@pytest.mark.parametrize("listed", [True, False], ids=["list", "by name"])
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "paletted"])
def test_a_colour_table_maps_colours_also_those_of_a_palette(tmp_path, kind, listed, capsys):
    by_name = dict(reversed(COLOURS.items()))  # the order of the names does not count
    index = {
        "classes": list(COLOURS),
        "colors": list(COLOURS.values()) if listed else by_name,
        "ignored_colors": [VOID],
    }
    picture = Image.fromarray(painted()).convert("RGBA" if kind == "RGBA" else "RGB")
    if kind == "paletted":  # the indices are in another order than the classes
        mixed = np.array([2, 0, 1])[np.minimum(numbers(), 2)].astype(np.uint8)
        mixed[:2] = 3
        picture = paletted(mixed, bytes(COLOURS["ground"] + COLOURS["thing"] + COLOURS["sky"] + VOID))
    root = write(tmp_path, picture, index)
    assert np.array_equal(read(root), numbers())
    assert space_of("folder", root).palette == tuple(map(tuple, COLOURS.values()))
    coding = f"colours of {'a palette' if kind == 'paletted' else 'the pixels'}, mapped by the colour table"
    assert main(["data", "check", "folder", str(root)]) == 0
    assert f"labels: {coding} (1)" in capsys.readouterr().out


def test_colours_and_values_may_be_options_which_take_precedence_over_the_index(tmp_path, capsys):
    root = write(tmp_path, Image.fromarray(painted()), {"classes": list(COLOURS), "values": [7, 8, 9]})
    assert np.array_equal(read(root, colors=COLOURS, ignored_colors=[VOID]), numbers())
    options = ["--option", "colors=4682b4,#000000,FF0000", "--option", "ignored_colors=ffffff"]
    assert main(["data", "check", "folder", str(root), *options]) == 0
    write(root, Image.fromarray(numbers() + np.uint8(7) * (numbers() < 3)), {"classes": list(COLOURS), "colors": COLOURS})
    assert np.array_equal(read(root, values=[7, 8, 9]), numbers())


def test_a_grey_mask_has_colours_too(tmp_path):
    mask = np.where(numbers() == 1, 255, 0).astype(np.uint8)
    root = write(tmp_path, Image.fromarray(mask), {"classes": ["a", "b"], "colors": [[0, 0, 0], [255, 255, 255]]})
    assert np.array_equal(read(root), mask // 255)


def test_a_colour_that_is_not_in_the_table_is_an_error_that_names_it_and_the_file(tmp_path):
    pixels = painted()
    pixels[5:7, 3:5], pixels[9, 9] = [1, 2, 3], [4, 5, 6]
    root = write(tmp_path, Image.fromarray(pixels), {"classes": list(COLOURS), "colors": COLOURS, "ignored_colors": [VOID]})
    with pytest.raises(
        InputError,
        match=r"labels/0.png has 5 pixels of 2 colours that are not in the colour table, most of them of \[1, 2, 3\]; expected "
        r"\[70, 130, 180\] \(sky\), \[0, 0, 0\] \(ground\), .*. Add the colours to 'colors' or 'ignored_colors'",
    ):
        read(root)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"colors": {"sky": [0, 0, 0]}}, "'colors' has 'sky', the classes are 'sky', 'ground', 'thing'; .* Correct 'ground'"),
        ({"colors": {**COLOURS, "sea": [1, 1, 1]}}, "expected one colour for each class. Correct 'sea'"),
        ({"colors": [[0, 0, 0]]}, "'colors' has 1 colours .*; expected 3 colours, one for each class"),
        ({"colors": [[0, 0, 0], [0, 0, 0], [1, 1, 1]]}, "'colors' has 3 colours .* of which 2 differ; .* no colour twice"),
        ({"colors": COLOURS, "ignored_colors": [[0, 0, 0]]}, "no colour twice"),
        ({"colors": [[0, 0, 0], [1, 1], [2, 2, 2]]}, r"expected a list of \[red, green, blue\], each from 0 to 255"),
        ({"colors": "red"}, r"expected a list of \[red, green, blue\], each from 0 to 255"),
        ({"colors": COLOURS, "ignored_colors": 5}, "'ignored_colors' is 5; expected a list"),
        ({"colors": COLOURS, "values": [0, 1, 2]}, "expected colours or values. Remove one kind"),
        ({"colors": COLOURS, "ignore_label_on_disk": 4}, "expected colours or values. Remove one kind"),
        ({"ignored_colors": [VOID]}, "expected colours or values. Remove one kind"),
        ({"values": [0, 1, "2"]}, "expected one different number for each class of sky, ground, thing"),
        ({"values": "012"}, "expected one different number for each class of sky, ground, thing"),
        ({"values": [0, 1, 70_000]}, "expected one different number for each class of sky, ground, thing"),
        (
            {"ignore_label_on_disk": 0},
            "the label value 0 is ignored and is also the value of the class 'sky'; expected one of both. Remove it",
        ),
    ],
)
def test_a_wrong_or_contradictory_coding_is_refused(tmp_path, index, message):
    root = write(tmp_path, Image.fromarray(numbers()), {"classes": list(COLOURS), **index})
    with pytest.raises(InputError, match=message):
        open_dataset("folder", root)


def test_ignored_background_and_classes_from_1_are_stated_by_values(tmp_path):
    label = np.where(numbers() == 255, 0, numbers() + 1).astype(np.uint8)
    index = {"classes": list(COLOURS), "values": [1, 2, 3], "ignore_label_on_disk": 0}
    assert np.array_equal(read(write(tmp_path, Image.fromarray(label), index)), numbers())


def test_white_pixels_of_one_bit_are_class_1_or_the_value_255(tmp_path):
    mask = numbers() == 1
    root = write(tmp_path, Image.fromarray(mask), {"classes": ["a", "b"]})
    assert np.array_equal(read(root), mask)
    assert np.array_equal(read(root, values=[0, 255]), mask)


@pytest.mark.parametrize(("depth", "colour_type"), [(2, 0), (4, 0), (16, 2), (16, 4), (16, 6)])
def test_files_whose_class_numbers_pillow_would_change_are_refused(tmp_path, depth, colour_type):
    """Pillow reads the values 0 and 3 of 2 bits as 0 and 255, and colour channels of 16 bits as zeros."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    root = write(tmp_path, Image.new("L", (8, 1)))
    (root / "labels" / "0.png").write_bytes(trees.png(8, 1, depth, colour_type, bytes([0, 1] * (channels * depth // 2))))
    with pytest.raises(
        InputError, match=rf"labels/0.png has .* of {depth} bits; expected class numbers in one channel of 8 or 16 bits"
    ):
        read(root)


WRONG = (None, True, -1, 10**30, 1.5, "x", "", [], [1], [[1]], ["x", None], {}, {"a": 1}, {"a": [1, 2, 3]}, b"x", object())


def outcome(call, *args, **options):
    """The text of an InputError, or empty; other exceptions pass."""
    try:
        call(*args, **options)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", DATASETS)
def test_every_value_of_every_option_is_taken_or_refused_by_an_error_of_ours(tmp_path, name):
    tree = trees.make(name, tmp_path, count=2, size=(32, 64))
    for option in [*DATASETS[name].options, "labels"]:
        for value in WRONG:
            outcome(open_dataset, name, tmp_path, **{**tree.options, option: value})
            outcome(parse_options, name, [f"{option}={value}"])
        for value in (1.5, {"a": 1}, b"x", object()):
            said = outcome(space_of, name, tmp_path, **{option: value})
            assert said.startswith(f"{option} of {name} is {value!r}; expected ")
        assert outcome(parse_options, name, [option]).startswith(f"{option!r} is not an option of {name}; expected one of ")


def test_an_option_for_python_does_not_reach_it_from_the_command_line(tmp_path, capsys):
    root = write(tmp_path, Image.fromarray(numbers()))
    assert main(["data", "check", "folder", str(root), "--option", "space=x"]) == 2
    error = capsys.readouterr().err
    assert "'space=x' is not an option of folder; expected one of classes=, values=," in error
    assert "space=," not in error.partition("expected")[2]
    with pytest.raises(InputError, match="space of folder is 'x'; expected a LabelSpace"):
        open_dataset("folder", root, space="x")
    assert main(["data", "list"]) == 0
    assert "space=:" not in capsys.readouterr().out
