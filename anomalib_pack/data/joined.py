"""One dataset made of the datasets of several categories."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import ImageItem
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import LabelName
from lightning.pytorch.utilities import rank_zero_warn
from pandas import DataFrame
from torchvision.transforms.v2 import Compose, Transform
from torchvision.tv_tensors import Mask

from anomalib_pack.data.first_look import reads_like_anomalib
from anomalib_pack.data.grouped import GroupedImageBatch, GroupedImageItem
from anomalib_pack.data.image_files import ReadsImages, check_white_level, read, read_image
from anomalib_pack.data.masked import sample_of
from anomalib_pack.data.masks import read_union
from anomalib_pack.defect import Defect


class MultiCategoryDataset(ReadsImages, AnomalibDataset):
    """Images of several categories, read as the datasets of the categories do.

    Where these do nothing but Anomalib's usual reading, images and masks are read by
    :func:`~anomalib_pack.data.image_files.read_image` and :func:`~anomalib_pack.data.masks.read_union`.

    Every item is a :class:`~anomalib_pack.data.GroupedImageItem` whose ``group`` is the category, or begins with it.
    ``samples`` has the columns that the categories' samples share, ``category`` and ``group``. A batch has masks for
    all its images or for none: if some categories have anomalies without masks, those of the others are left out, with
    a warning. A category without anomalies takes nothing away: its images get empty masks.

    Args:
        parts: Dataset of each category.
        links: For each category, folders by the path that the images have in ``parts``, and the path that they get.
            Anomalib resolves symbolic links, and names result pictures by what lies below the root of the data.
        white_level: The value that is white in images of more than 8 bits, e.g. 4095 for 12 bits in 16; None for the
            largest of the type.
        group_by: ``"category"``, or ``"group"`` for the category and the group that its own dataset gives the image,
            e.g. ``"pushpins/logical_anomalies"``. An image that is of every group there is so in its category,
            ``"pushpins/"``; one without group there has the category.
    """

    def __init__(
        self,
        parts: dict[str, AnomalibDataset],
        links: dict[str, dict[str, str]],
        white_level: float | None = None,
        group_by: Literal["category", "group"] = "category",
    ) -> None:
        self.parts = parts
        self.white_level = check_white_level(white_level)
        for part in parts.values():
            part.white_level = self.white_level
        self._own_augmentations = {name: part.augmentations for name, part in parts.items()}
        super().__init__()
        frames = [_part_samples(name, part, links.get(name, {}), group_by) for name, part in parts.items()]
        # Not through the setter, which would look for each file again.
        self._samples = pd.concat(frames, ignore_index=True, join="inner")
        self._samples.attrs["task"] = _joint_task(parts).value

    def __getitem__(self, index: int) -> GroupedImageItem:
        """Read an image and its mask.

        Raises:
            OSError: If the image or its mask cannot be read; the message names the file.
            ValueError: If the size of a mask is not that of the image, or the mask of an anomalous image is empty.
        """
        sample = self.samples.iloc[index]
        part = self.parts[sample.category]
        if isinstance(part, ReadsImages):
            item = part[sample.row]
        elif reads_like_anomalib(part):
            item = _read_item(part, part.samples.iloc[sample.row])
        else:
            # Anomalib's datasets with masks of their own kind name no file that is broken.
            item = read(lambda _: part[sample.row], sample.image_path)
        mask = None
        if self.task == TaskType.SEGMENTATION:
            mask = torch.zeros(item.image.shape[-2:]) if item.gt_mask is None else item.gt_mask
        return GroupedImageItem(
            image=item.image,
            gt_mask=mask,
            gt_label=item.gt_label,
            image_path=sample.image_path,
            mask_path=item.mask_path or "",
            group=sample.group,
        )

    @property
    def defects(self) -> Callable[[str], list[Defect]] | None:
        """Reader of the defects of an image, as :meth:`MVTecLocoDataset.defects`; None if a category has none."""
        return self._defects if all(getattr(part, "defects", None) for part in self.parts.values()) else None

    def _defects(self, image_path: str) -> list[Defect]:
        sample = sample_of(self.samples, image_path)
        part = self.parts[sample.category]
        return part.defects(part.samples.iloc[sample.row].image_path)

    @property
    def augmentations(self) -> Transform | None:
        """Augmentations of all categories. Those that a category has of its own come before them."""
        return self._augmentations

    @augmentations.setter
    def augmentations(self, augmentations: Transform | None) -> None:
        self._augmentations = augmentations
        for name, part in self.parts.items():
            steps = [step for step in (self._own_augmentations[name], augmentations) if step is not None]
            part.augmentations = Compose(steps) if steps else None

    @property
    def collate_fn(self) -> Callable:
        """The collate function, which keeps the groups."""
        return GroupedImageBatch.collate


def _read_item(part: AnomalibDataset, sample: pd.Series) -> ImageItem:
    """Read an image and its mask as Anomalib's datasets do, but by the pack's readers."""
    image, mask = read_image(sample.image_path, part.white_level), None
    if part.task == TaskType.SEGMENTATION:
        mask = Mask(torch.zeros(image.shape[-2:], dtype=torch.bool))
        if sample.label_index == LabelName.ABNORMAL:
            mask = read_union([Path(sample.mask_path)], sample.image_path, image.shape[-2:])
    if part.augmentations:
        image, mask = (part.augmentations(image), None) if mask is None else part.augmentations(image, mask)
    return ImageItem(
        image=image,
        gt_mask=None if sample.label_index == LabelName.UNKNOWN else mask,
        gt_label=None if sample.label_index == LabelName.UNKNOWN else torch.tensor(sample.label_index),
        image_path=sample.image_path,
        mask_path=sample.mask_path,
    )


def _part_samples(category: str, part: AnomalibDataset, links: dict[str, str], group_by: str) -> DataFrame:
    """Samples of a category with its name, and with the position of each image in the category's dataset."""
    # From a missing path pandas 3 makes NaN, which the items refuse.
    part.samples["mask_path"] = part.samples["mask_path"].fillna("")
    groups = category
    if group_by == "group" and "group" in part.samples:
        groups = f"{category}/" + part.samples["group"]
    samples = part.samples.assign(category=category, group=groups, row=range(len(part)))
    for folder, link in links.items():
        if folder != link:
            samples["image_path"] = [
                link + path[len(folder) :] if path.startswith(folder + os.sep) else path for path in samples.image_path
            ]
    return samples


def _joint_task(parts: dict[str, AnomalibDataset]) -> TaskType:
    anomalous = {name: part for name, part in parts.items() if part.has_anomalous}
    without = [name for name, part in (anomalous or parts).items() if part.task == TaskType.CLASSIFICATION]
    if not without:
        return TaskType.SEGMENTATION
    if len(without) < len(anomalous):
        rank_zero_warn(
            f"The categories {', '.join(without)} have no masks. The masks of the other categories are left out, and "
            "with them the pixel metrics: a batch has masks for all its images or for none."
        )
    return TaskType.CLASSIFICATION
