"""Images with masks: what the data sets in MVTec AD's layout and its variants have in common."""

from collections.abc import Callable
from pathlib import Path

import torch
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import LabelName
from pandas import DataFrame, Series
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Mask

from anomalib_pack.data.grouped import GroupedImageBatch, GroupedImageItem
from anomalib_pack.data.image_files import ReadsImages, read_image
from anomalib_pack.data.masks import read_union


class MaskedImageDataset(ReadsImages, AnomalibDataset):
    """Base of datasets whose anomalous images all have masks.

    ``samples``, which the subclass sets, has the columns of Anomalib's datasets and optionally ``group``. Items are
    :class:`~anomalib_pack.data.GroupedImageItem` with that ``group``, or ``None`` without the column. ``gt_mask`` is
    zero for normal images, whose ``mask_path`` is the empty string.

    Args:
        augmentations: Applied to image and mask together.
        white_level: The value that is white in images of more than 8 bits; see
            :func:`~anomalib_pack.data.image_files.read_image`.
    """

    def __init__(self, augmentations: Transform | None = None, white_level: float | None = None) -> None:
        super().__init__(augmentations=augmentations)
        self.white_level = white_level

    def __getitem__(self, index: int) -> GroupedImageItem:
        """Read an image and the union of its masks.

        Raises:
            OSError: If the image or one of its masks cannot be read.
            ValueError: If the size of a mask is not that of the image, or the masks of an anomalous image are empty.
        """
        sample = self.samples.iloc[index]
        image = read_image(sample.image_path, self.white_level)
        mask = Mask(torch.zeros(image.shape[-2:], dtype=torch.bool))
        if sample.label_index == LabelName.ABNORMAL:
            mask = read_union(self.mask_files(Path(sample.mask_path)), sample.image_path, image.shape[-2:])
        if self.augmentations:
            image, mask = self.augmentations(image, mask)
        return GroupedImageItem(
            image=image,
            gt_mask=mask,
            gt_label=torch.tensor(sample.label_index),
            image_path=sample.image_path,
            mask_path=sample.mask_path,
            group=sample.get("group"),
        )

    @staticmethod
    def mask_files(mask_path: Path) -> list[Path]:
        """List the files with the masks of an anomalous image: here it is one."""
        return [mask_path]

    @property
    def collate_fn(self) -> Callable:
        """The collate function, which keeps the groups."""
        return GroupedImageBatch.collate


def sample_of(samples: DataFrame, image_path: str) -> Series:
    """Row of an image.

    Raises:
        ValueError: If there is none.
    """
    rows = samples[samples.image_path == image_path]
    if rows.empty:
        msg = f"{image_path} is no image of the data set."
        raise ValueError(msg)
    return rows.iloc[0]
