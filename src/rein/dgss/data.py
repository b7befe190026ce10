"""What a data set is to training and judging: pairs of an image and a label, as uint8 tensors. `datasets` opens them.

An image is (3, H, W), a label (H, W) with class numbers of a `LabelSpace` and 255 where nothing counts.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from rein.dgss.labels import LabelSpace

Sample = tuple[Tensor, Tensor]


class Pairs(Dataset[Sample]):
    """Labelled images of one data set, in a fixed order.

    Attributes:
        space: what the numbers in the labels mean.
        pairs: (image, label) paths, in order; the label is None where only images were asked for. Empty where there are no files.
        left_out: images that lie there and are not used -> why.
    """

    space: LabelSpace
    pairs: list[tuple[Path, Path | None]]
    left_out: dict[Path, str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The image (3, H, W) and the label (H, W), both uint8.

        Raises:
            InputError: a file cannot be read, the sizes differ, or a number in the label is outside the class map.
        """

    @abstractmethod
    def read_image(self, index: int) -> Tensor:
        """The image alone, (3, H, W) uint8."""

    @abstractmethod
    def name_of(self, index: int) -> str:
        """What the image is called, without a suffix; the same wherever the data lie, and used once in a data set.

        It may hold slashes, as in `frankfurt/frankfurt_000000_000294`: outputs named after it keep the publisher's folders.
        """
