"""The interface of a labelled data set: `Pairs`. `rein.dgss.data.datasets` opens them.

An image is (3, H, W) uint8. A label is (H, W) uint8 and holds class indices of a `LabelSpace`; 255 is ignored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from rein.dgss.labels import LabelSpace

Sample = tuple[Tensor, Tensor]


class Pairs(Dataset[Sample]):
    """Labelled images of one data set, in a fixed order.

    Attributes:
        space: the classes of the labels.
        pairs: (image path, label path) of each sample. The label path is None if only images were requested. The list is empty if
            the data set has no files.
        left_out: image path -> reason, for images on disk that the data set does not use.
        unused_labels: labels on disk that have no image.
    """

    space: LabelSpace
    pairs: list[tuple[Path, Path | None]]
    left_out: dict[Path, str]
    unused_labels: Sequence[Path] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The image (3, H, W) and the label (H, W), both uint8. Callers must not modify them: a data set may keep them.

        Raises:
            InputError: a file cannot be read, image and label differ in size, or the label has an unknown value.
        """

    @abstractmethod
    def read_image(self, index: int) -> Tensor:
        """The image without its label, (3, H, W) uint8."""

    def read_label(self, index: int) -> Tensor:
        """The label without its image, (H, W) uint8."""
        return self[index][1]

    def coding_of(self, index: int) -> str:
        """How the label encodes classes, in words."""
        return "class numbers"

    @abstractmethod
    def name_of(self, index: int) -> str:
        """The name of the image, without a suffix. It is unique in the data set and does not depend on the data set's folder.

        The name may contain slashes, as in `frankfurt/frankfurt_000000_000294`. Output files with this name keep the publisher's
        folders.
        """
