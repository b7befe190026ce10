"""Files for the test servers of Cityscapes and ACDC: Cityscapes' label ids, under the names of the images, in one zip file."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rein.dgss.data.datasets.class_maps import CITYSCAPES_IDS
from rein.dgss.labels import CITYSCAPES_CLASSES, IGNORE_LABEL, LabelSpace
from rein.errors import InputError
from rein.files import replace_file

_IDS = np.zeros(len(CITYSCAPES_CLASSES), np.uint8)
for _label_id, _train_id in CITYSCAPES_IDS.items():
    if _train_id != IGNORE_LABEL:
        _IDS[_train_id] = _label_id


def label_ids(classes: np.ndarray) -> np.ndarray:
    """Class indices of Cityscapes (train ids) -> its label ids, uint8."""
    ids: np.ndarray = _IDS[classes]
    return ids


def check_space(space: LabelSpace, dataset: str) -> None:
    """Refuse classes that a test server does not know.

    Raises:
        InputError: the classes are not the 19 of Cityscapes.
    """
    if space.names != CITYSCAPES_CLASSES:
        raise InputError(
            f"the run has the classes {', '.join(space.names[:6])}{', ...' if len(space.names) > 6 else ''}; the server of {dataset} "
            "expects the 19 classes of Cityscapes. Predict without --format."
        )


def write_zip(path: Path, files: Sequence[Path]) -> None:
    """Write files into one zip file, without folders, and put it at `path` in one step.

    Raises:
        CheckpointError: it cannot be written.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNG files are compressed already
        for file in files:
            archive.write(file, file.name)
    replace_file(path, buffer.getvalue())
