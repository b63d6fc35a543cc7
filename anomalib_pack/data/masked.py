"""Images with masks: what the data sets in MVTec AD's layout and its variants have in common."""

from collections.abc import Callable
from pathlib import Path

import torch
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import LabelName, Split
from pandas import DataFrame, Series
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Mask

from anomalib_pack.data.grouped import GroupedImageBatch, GroupedImageItem
from anomalib_pack.data.image_files import ReadsImages, list_images, list_split, read_image
from anomalib_pack.data.masks import read_union

# Masks are lossless in all data sets that are read here.
MASK_EXTENSIONS = (".png", ".PNG")


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


def make_mvtec_samples(
    root: Path, split: str | Split, extensions: tuple[str, ...], remedy: str, levels: str = "*"
) -> DataFrame:
    """List the images of a split in MVTec AD's layout.

    Images are in ``<root>/<split>/<label>/``, or in folders below; ``label`` is ``good`` or the type of defect. The
    mask of an anomalous image has the stem of its name, and below ``<root>/ground_truth/`` the path that the image has
    below ``<root>/<split>/``.

    Args:
        root: Folder that holds ``train``, ``test`` and ``ground_truth``.
        split: ``"train"`` or ``"test"``.
        extensions: File name extensions of images, with the dot.
        remedy: What to do if the folder of the split is missing, a sentence.
        levels: Pattern of the folders that hold the images, relative to the split's.

    Returns:
        One row per image with the columns that Anomalib's datasets have: ``path``, ``split``, ``label``,
        ``image_path``, ``mask_path``, ``label_index``.

    Raises:
        FileNotFoundError: If the folder of the split is missing.
        RuntimeError: If the split has no images, or an anomalous image has no mask or several.
    """
    folder = root / Split(split).value
    samples = DataFrame([_row(root, folder, path) for path in list_split(folder, extensions, remedy, levels)])
    # Anomalib writes no masks with its result pictures for a classification task.
    samples.attrs["task"] = "segmentation"
    return samples


def _row(root: Path, folder: Path, image_path: Path) -> dict:
    relative = image_path.relative_to(folder)
    label = relative.parts[0]
    is_good = label == "good"
    return {
        "path": str(root),
        "split": folder.name,
        "label": label,
        "image_path": str(image_path),
        "mask_path": "" if is_good else str(_mask_of(image_path, root / "ground_truth" / relative.parent)),
        "label_index": int(LabelName.NORMAL if is_good else LabelName.ABNORMAL),
    }


def _mask_of(image_path: Path, folder: Path) -> Path:
    files = list_images(folder, MASK_EXTENSIONS) if folder.is_dir() else []
    masks = [path for path in files if path.stem == image_path.stem]
    if len(masks) != 1:
        msg = (
            f"The anomalous image {image_path} has {len(masks)} masks, but must have one: "
            f"{folder / image_path.stem}.png. Restore that file, or remove the image."
        )
        raise RuntimeError(msg)
    return masks[0]
