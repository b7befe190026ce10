"""Images, labels, polygons and the files beside them from anyone: the original's values, or an error in one line."""

import io
import json
import os
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import loadmat, savemat

from dgss import trees
from fuzzing import NUMBERS, changed_bytes, changed_values, counts, survive
from rein.dgss.data.datasets import open_dataset
from rein.dgss.data.datasets.encodings import Polygons, load_image, read_first_of_three_16_bit, read_rgb, read_values
from rein.dgss.labels import label_space
from rein.errors import InputError

GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 255, (24, 40, 3), np.uint8)
VALUES = GENERATOR.integers(0, 19, (24, 40), np.uint8)
READ_PIXELS = 200 * 2**20  # bytes of the largest image that Pillow reads, beside its file


def encoded(pixels, kind, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if options.pop("palette", False):
        image = image.convert("P")
    image.save(buffer, kind, **options)
    return buffer.getvalue()


FILES = {
    "png": (encoded(PIXELS, "PNG"), read_rgb),
    "png label": (encoded(VALUES, "PNG"), read_values),
    "png label with a palette": (encoded(VALUES, "PNG", palette=True), read_values),
    "png label of 16 bits": (encoded(VALUES.astype(np.uint16), "PNG"), read_values),
    "jpeg": (encoded(PIXELS, "JPEG"), read_rgb),
    "bmp": (encoded(PIXELS, "BMP"), read_rgb),
    "webp": (encoded(PIXELS, "WEBP"), read_rgb),
    "tiff": (encoded(PIXELS, "TIFF"), read_rgb),
    "compressed tiff": (encoded(PIXELS, "TIFF", compression="tiff_lzw"), read_rgb),
}
EXACT = [name for name in FILES if name.startswith("png")]  # the other formats have no checksums


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damage that it tolerates
@pytest.mark.parametrize("kind", FILES)
@counts(60, 1000)
def test_images_and_labels_with_changed_bytes(tmp_path, kind, count):
    content, read = FILES[kind]
    path = tmp_path / "file.png"
    path.write_bytes(content)
    original = read(path)

    def check(data):
        path.write_bytes(data)
        values = read(path)
        assert kind not in EXACT or np.array_equal(values, original)

    survive(check, changed_bytes(content, count), size_of=lambda data: len(data) + READ_PIXELS)


@counts(40, 500)
def test_labels_of_synthia_with_changed_bytes(tmp_path, count):
    pytest.importorskip("cv2")
    tree = trees.make("synthia", tmp_path, count=1, size=(16, 24))
    path = tree.label_files[0]
    content, original = path.read_bytes(), read_first_of_three_16_bit(path)

    def check(data):
        path.write_bytes(data)
        assert np.array_equal(read_first_of_three_16_bit(path), original)

    survive(check, changed_bytes(content, count), size_of=lambda data: len(data) + READ_PIXELS)


def test_a_png_file_with_wrong_pixels_is_an_error(tmp_path):
    path = tmp_path / "label.png"
    content = bytearray(encoded(VALUES, "PNG", compress_level=0))
    content[content.index(b"IDAT") + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="label.png cannot be read as an image: the checksum of its part b'IDAT' is wrong"):
        read_values(path)


def test_only_formats_of_images_are_read_whatever_the_name(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )  # Pillow would start Ghostscript
    with pytest.raises(InputError, match="cannot be read as an image: cannot identify"):
        load_image(path)


def test_a_pipe_is_not_an_image(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(InputError, match="image.png cannot be read as an image: .*it is not a regular file"):
        read_rgb(tmp_path / "image.png")


def test_an_image_that_asks_for_much_memory_is_refused(tmp_path):
    content = bytearray(encoded(VALUES, "PNG"))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "label.png").write_bytes(content)

    def read(path):
        read_values(path)

    assert survive(read, [tmp_path / "label.png"], size_of=os.path.getsize) == {"InputError": 1}


# -- polygons


POLYGONS = {
    "imgHeight": 24,
    "imgWidth": 40,
    "objects": [
        {"label": "road", "polygon": [[0, 10], [39, 10], [39, 23], [0, 23]], "deleted": 0},
        {"label": "cargroup", "polygon": [[3.5, 3], [20, 3], [20, 12]], "deleted": 0, "date": "2020"},
    ],
}
READ_POLYGONS = Polygons({"road": 1, "car": 2}, 0)


@pytest.fixture
def polygons(tmp_path):
    def check(content):
        (tmp_path / "p.json").write_bytes(content)
        values = READ_POLYGONS(tmp_path / "p.json")
        assert values.dtype == np.uint8
        assert values.max() <= 2

    return check


@counts(150, 3000)
def test_polygon_files_with_changed_values(polygons, count):
    inputs = (json.dumps(value).encode() for value in changed_values(POLYGONS, count))
    survive(polygons, inputs)


@counts(100, 2000)
def test_polygon_files_with_changed_bytes(polygons, count):
    survive(polygons, changed_bytes(json.dumps(POLYGONS).encode(), count))


numbers = st.integers() | st.floats() | st.sampled_from(NUMBERS)
sides = st.integers(1, 40) | numbers.filter(lambda number: not 1000 < number <= 2**15)  # such sides are valid, and take memory


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {
            "imgHeight": sides,
            "imgWidth": sides,
            "objects": st.lists(
                st.fixed_dictionaries(
                    {"label": st.sampled_from(["road", "car"]) | st.text(), "polygon": st.lists(st.tuples(numbers, numbers))}
                ),
                max_size=3,
            ),
        }
    )
)
def test_any_polygons_are_drawn_or_refused(polygons, content):
    survive(polygons, [json.dumps(content).encode()])


def test_a_polygon_file_that_asks_for_much_memory_is_refused(polygons, tmp_path):
    with pytest.raises(InputError, match=r"imgWidth and imgHeight are \(100000, 100000\); expected integers from 1 to 32768"):
        polygons(json.dumps({**POLYGONS, "imgWidth": 100_000, "imgHeight": 100_000}).encode())
    with pytest.raises(InputError, match="a corner is further than 1,000,000 pixels away"):
        polygons(json.dumps({**POLYGONS, "objects": [{"label": "road", "polygon": [[0, 1e300], [1, 2]]}]}).encode())


# -- the files beside images


INDEX = {"classes": ["sky", "ground", "thing"], "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "ignore_label_on_disk": [11, 12]}


@pytest.mark.parametrize("change", ["bytes", "values"])
@counts(200, 3000)
def test_index_files(tmp_path, change, count):
    content = json.dumps(INDEX).encode()
    inputs = changed_bytes(content, count)
    if change == "values":
        inputs = (json.dumps(value).encode() for value in changed_values(INDEX, count))

    def read(data):
        (tmp_path / "index.json").write_bytes(data)
        space = label_space(tmp_path)
        assert all(name.isprintable() for name in space.names)
        assert len(space.palette) >= len(space.names)

    survive(read, inputs)


@counts(30, 500)
def test_folders_with_a_changed_index_file(tmp_path, count):
    tree = trees.make("folder", tmp_path, count=1, size=(16, 24))
    original = open_dataset("folder", tmp_path, "train")[0][1]

    def read(value):
        (tmp_path / "index.json").write_text(json.dumps(value))
        image, label = open_dataset("folder", tmp_path, "train")[0]
        assert label.shape == image.shape[1:] == original.shape

    survive(read, changed_values(json.loads((tree.path / "index.json").read_text()), count), size_of=lambda _: 1000)


@counts(30, 500)
def test_mapillary_with_a_changed_config_file(tmp_path, count):
    trees.make("mapillary", tmp_path, count=1, size=(16, 24), config=True)
    config = json.loads((tmp_path / "config_v1.2.json").read_text())

    def read(value):
        (tmp_path / "config_v1.2.json").write_text(json.dumps(value))
        open_dataset("mapillary", tmp_path, "train")[0]

    survive(read, changed_values(config, count), size_of=lambda _: 1000)


@pytest.mark.parametrize("compressed", [False, True])
@counts(50, 1000)
def test_the_split_file_of_gtav_with_changed_bytes(tmp_path, compressed, count):
    trees.make("gtav", tmp_path, count=3, size=(16, 24))
    content = (tmp_path / "split.mat").read_bytes()
    if compressed:
        numbers = {key: value for key, value in loadmat(tmp_path / "split.mat").items() if key.endswith("Ids")}
        savemat(tmp_path / "split.mat", numbers, do_compression=True)
        assert (tmp_path / "split.mat").read_bytes() != content
        content = (tmp_path / "split.mat").read_bytes()
    assert len(open_dataset("gtav", tmp_path, "train", split_file="split.mat")) == 2

    def read(data):
        (tmp_path / "split.mat").write_bytes(data)
        open_dataset("gtav", tmp_path, "train", split_file="split.mat")

    survive(read, changed_bytes(content, count))


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "[" + "[]," * 10_000_000 + "[]]", '{"classes": "\\u001b[31m"}']
)
def test_deep_and_long_files_are_refused(tmp_path, polygons, content):
    def read(data):
        (tmp_path / "index.json").write_bytes(data)
        label_space(tmp_path)

    for reader in (read, polygons):
        assert survive(reader, [content.encode()]) == {"InputError": 1}
