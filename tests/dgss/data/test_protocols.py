"""Protocols: sizes of images and labels by data set, and the class map."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dgss import trees
from rein.dgss.data.datamodule import Domain, DomainData, EvaluationDataset
from rein.dgss.data.protocols import PROTOCOLS, Preparation, find_protocol
from rein.dgss.data.resampling import halve_image, halve_label
from rein.errors import InputError
from rein.resizing import resize_image
from rein.segmenter import _windows


def sizes(protocol, dataset, height, width, edge=None):
    """Sizes of image and label as they are evaluated."""
    image, label = torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(height, width, dtype=torch.uint8)
    return tuple(tuple(part.shape[-2:]) for part in PROTOCOLS[protocol].preparation(dataset, edge).pair(image, label))


@pytest.mark.parametrize(
    ("protocol", "dataset", "own", "image", "label"),
    [
        ("rein", "cityscapes", (1024, 2048), (512, 1024), (1024, 2048)),
        ("rein", "bdd100k", (720, 1280), (720, 1280), (720, 1280)),
        ("rein", "acdc", (1080, 1920), (540, 960), (1080, 1920)),
        ("rein", "mapillary", (3025, 4033), (512, 683), (1512, 2016)),  # halved down, then 2016 * 512 / 1512 = 682.67
        ("rein", "mapillary", (1001, 3001), (341, 1024), (500, 1500)),  # 500 * 1024 / 1500 = 341.33
        ("rein", "mapillary", (480, 640), (512, 683), (240, 320)),
        ("rein", "idd", (1080, 1920), (1080, 1920), (1080, 1920)),
        ("rein-1024", "acdc", (1080, 1920), (1080, 1920), (1080, 1920)),
        ("rein-1024", "cityscapes-c", (1024, 2048), (1024, 2048), (1024, 2048)),
        ("robustnet", "mapillary", (1001, 3001), (341, 1024), (500, 1500)),
        ("full-resolution", "mapillary", (1001, 3001), (1001, 3001), (1001, 3001)),
        ("full-resolution", "cityscapes", (1024, 2048), (1024, 2048), (1024, 2048)),
    ],
)
def test_a_protocol_sets_the_sizes_of_image_and_label(protocol, dataset, own, image, label):
    assert sizes(protocol, dataset, *own) == (image, label)


def test_a_shortest_edge_replaces_the_size_of_the_image():
    assert sizes("rein", "cityscapes", 1024, 2048, edge=256) == ((256, 512), (1024, 2048))
    assert sizes("rein", "mapillary", 1000, 3000, edge=100) == ((100, 300), (500, 1500))
    assert sizes("full-resolution", "bdd100k", 720, 1280, edge=360) == ((360, 640), (720, 1280))


@pytest.mark.parametrize(
    ("size", "window", "stride", "rows", "columns"),
    [
        ((512, 1024), 512, 341, [0], [0, 341, 512]),
        ((720, 1280), 512, 341, [0, 208], [0, 341, 682, 768]),
        ((540, 960), 512, 341, [0, 28], [0, 341, 448]),
        ((1024, 2048), 1024, 683, [0], [0, 683, 1024]),
        ((1080, 1920), 1024, 683, [0, 56], [0, 683, 896]),
    ],
)
def test_the_windows_are_those_of_the_published_stride(size, window, stride, rows, columns):
    """The last window of each axis is moved back to the border."""
    found = [_windows(side, window, stride) for side in size]
    assert [[part.start for part in parts] for parts in found] == [rows, columns]
    assert all(part.stop - part.start == window for parts in found for part in parts)


def test_mapillary_is_halved_before_its_image_is_fitted(tmp_path):
    tree = trees.make("mapillary", tmp_path / "mapillary", split="val", count=1, size=(61, 95))
    data = DomainData(str(tmp_path), sources=[Domain("gtav")], targets=[Domain("mapillary")], protocol="rein", workers=0)
    data.trainer = type("Trainer", (), {"global_rank": 0, "world_size": 1})()
    ((image, label, index),) = data.test_dataloader()[0]
    assert index.tolist() == [0]
    own = torch.from_numpy(np.array(Image.open(tree.images[0]))).permute(2, 0, 1)
    assert torch.equal(image[0], resize_image(halve_image(own), (512, 802)))  # 47 * 512 / 30 = 802.13
    assert torch.equal(label[0], halve_label(torch.from_numpy(tree.labels[0])))


def test_a_protocol_selects_the_class_map_unless_the_domain_does(tmp_path):
    tree = trees.make("mapillary", tmp_path, split="val", count=1)
    Image.fromarray(np.full((64, 128), 41, np.uint8)).save(tree.label_files[0])  # a manhole, road in RobustNet only

    def first(protocol, **options):
        target = Domain("mapillary", str(tmp_path), options=options)
        data = DomainData(targets=[target], protocol=protocol, workers=0)
        data.trainer = type("Trainer", (), {"global_rank": 0, "world_size": 1})()
        ((_, label, _),) = data.test_dataloader()[0]
        return int(label[0, 0, 0])

    assert [first(protocol) for protocol in ("rein", "rein-1024", "full-resolution", "robustnet")] == [255, 255, 255, 0]
    assert first("robustnet", class_map="rein") == 255


def test_the_name_of_a_domain_does_not_depend_on_the_protocol():
    data = DomainData(targets=[Domain("mapillary")], protocol="robustnet")
    assert list(data.roles()) == ["mapillary"]


def test_an_unknown_protocol_is_refused():
    with pytest.raises(InputError, match="data.protocol is 'rien'; expected one of rein, rein-1024, robustnet, full-resolution"):
        find_protocol("rien")


def test_protocols_differ_and_are_described_by_plain_values():
    described = [protocol.describe() for protocol in PROTOCOLS.values()]
    assert [each["name"] for each in described] == list(PROTOCOLS)
    without_names = [{key: value for key, value in each.items() if key != "name"} for each in described]
    assert all(one != other for i, one in enumerate(without_names) for other in without_names[:i])
    assert str(Preparation((1024, 512), None, True)) == "image and label halved, image fitted into 1024 x 512"
    assert str(Preparation(edge=24)) == "image resized to a shortest edge of 24"
    assert str(Preparation()) == "image at its own size"


def test_evaluation_data_sets_can_be_sent_to_loading_processes(tmp_path):
    trees.make("mapillary", tmp_path, split="val", count=1)
    pairs = Domain("mapillary", str(tmp_path)).open(tmp_path, "val")
    prepared = EvaluationDataset(pairs, PROTOCOLS["rein"].preparation("mapillary"))
    copied = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(copied[0][0], prepared[0][0])
