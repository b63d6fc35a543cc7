"""A look at the files of a data set before a run: what headers and a few masks tell."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.data.datasets.base import AnomalibDataset, AnomalibVideoDataset
from anomalib.data.utils import LabelName
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from lightning.pytorch.utilities import rank_zero_warn
from pandas import DataFrame

from anomalib_pack.data.image_files import (
    CONVERT,
    Header,
    ReadsImages,
    check_as_anomalib_reads,
    check_upright,
    left_out,
    map_files,
    names,
    read,
    read_header,
)
from anomalib_pack.data.masks import MAX_VALUES, check_size, count_values, empty_message, mask_values

# Masks that are decoded, evenly chosen: noise and soft edges come from how all of them were made. Ours.
SAMPLED_MASKS = 20

SYNTHETIC = "convert the images to 8 bits, or take another val_split_mode than synthetic, which reads them by Anomalib"


class LooksAtFiles:
    """Mixin for datamodules that look at their files when they are first set up; stands before ``AnomalibDataModule``.

    Attributes:
        looks_at_files: Whether they still have to. Where it is missing, the models of the pack look.
    """

    looks_at_files = True

    def setup(self, stage: str | None = None) -> None:
        """List the files and look at them."""
        super().setup(stage)
        if self.looks_at_files:
            self.looks_at_files = False
            look(self)


def look(datamodule: AnomalibDataModule) -> None:
    """Read the header of each image and mask, and a few masks.

    Raises:
        OSError: If a file is no image, an image has an EXIF orientation, or Anomalib's reader is to read one that it
            clips.
        ValueError: If a mask is missing, has another size than its image or is empty.
    """
    deep: dict[str, int] = {}
    for split, dataset in datasets(datamodule).items():
        for part in leaves(dataset):
            if isinstance(part, AnomalibVideoDataset):
                continue
            headers = _headers(part, joined=part is not dataset)
            _check_masks(part, headers)
            _warn_of_files_left_out(part)
            if split == "train":
                deep.update(_bits_above_8(part, headers))
    _warn_of_bits(deep)


def datasets(datamodule: AnomalibDataModule) -> dict[str, AnomalibDataset]:
    """The data sets of the splits ``train``, ``val`` and ``test`` that there are."""
    found = {split: getattr(datamodule, f"{split}_data", None) for split in ("train", "val", "test")}
    return {split: dataset for split, dataset in found.items() if isinstance(dataset, AnomalibDataset)}


def leaves(dataset: AnomalibDataset) -> Iterator[AnomalibDataset]:
    """The data sets of the categories where several are joined, or the data set itself."""
    parts = getattr(dataset, "parts", None)
    yield from parts.values() if parts else [dataset]


def mask_files(dataset: AnomalibDataset, mask_path: Any) -> list[Path]:
    """The files with the masks of an image; none where Anomalib names no file."""
    if not isinstance(mask_path, str) or not mask_path:
        return []
    paths = dataset.mask_files(Path(mask_path)) if hasattr(dataset, "mask_files") else [Path(mask_path)]
    return [path for path in paths if path.is_file()]


def lacks_mask(dataset: AnomalibDataset, mask_path: Any) -> bool:
    """Whether a file is missing that the data set says is there, or should."""
    if dataset.task != TaskType.SEGMENTATION or not isinstance(mask_path, str):
        return False
    return not mask_path or not Path(mask_path).exists()


def anomalous(dataset: AnomalibDataset) -> DataFrame:
    """The samples of the anomalous images."""
    return dataset.samples[dataset.samples.label_index == LabelName.ABNORMAL]


def has_kinds_of_defects(dataset: AnomalibDataset) -> bool:
    """Whether values of masks name kinds of defects, as in MVTec LOCO, so that they say nothing of quality."""
    return type(dataset).__name__ in {"MVTecLocoDataset", "MVTecLOCODataset"}


def _headers(part: AnomalibDataset, joined: bool) -> dict[str, Header]:
    paths = part.samples["image_path"].tolist()
    by_pack = read_by_pack(part, joined)
    remedy = SYNTHETIC if isinstance(part, SyntheticAnomalyDataset) else CONVERT

    def header(path: str) -> Header:
        found = read_header(path)
        if by_pack:
            read(lambda _: check_upright(found), path)
        else:
            read(lambda _: check_as_anomalib_reads(found, remedy), path)
        return found

    return dict(zip(paths, map_files(header, paths), strict=True))


def read_by_pack(part: AnomalibDataset, joined: bool) -> bool:
    """Whether images are read by the pack: in its own data sets, and where those of Anomalib are joined."""
    return isinstance(part, ReadsImages) or (joined and reads_like_anomalib(part))


def reads_like_anomalib(part: AnomalibDataset) -> bool:
    """Whether a data set does nothing but Anomalib's usual reading, for which the pack's can stand."""
    return type(part).__getitem__ is AnomalibDataset.__getitem__ and not isinstance(part, SyntheticAnomalyDataset)


def _check_masks(part: AnomalibDataset, headers: dict[str, Header]) -> None:
    if "mask_path" not in part.samples or isinstance(part, SyntheticAnomalyDataset):
        return
    rows = []
    for row in anomalous(part).itertuples():
        files = mask_files(part, row.mask_path)
        if files:
            rows.append((row.image_path, files))
        elif lacks_mask(part, row.mask_path):
            msg = f"The anomalous image {row.image_path} has no mask, but others have: {row.mask_path or 'none given'}."
            raise ValueError(msg)
    for image_path, files in rows:
        for path in files:
            check_size(path, read_header(path).size, image_path, headers[image_path].size)
    noisy = []
    for image_path, files in rows[:: max(1, math.ceil(len(rows) / SAMPLED_MASKS))]:
        masks = [read(mask_values, path) for path in files]
        if not any(mask.any() for mask in masks):
            raise ValueError(empty_message(files, image_path))
        noisy += [path for path, mask in zip(files, masks, strict=True) if count_values(mask) > MAX_VALUES]
    if noisy and not has_kinds_of_defects(part):
        rank_zero_warn(
            f"Masks have more than {MAX_VALUES} different values, as JPEG noise and soft edges leave them, and all "
            f"that is not zero counts as anomalous: {names(noisy)}. Store masks without loss, with two values."
        )


def _warn_of_files_left_out(part: AnomalibDataset) -> None:
    found = left_out(part.samples["image_path"], [path for path in part.samples.get("mask_path", []) if path])
    if found:
        rank_zero_warn(f"Images of a kind that is not read are left out, {len(found)} in all: {names(found)}.")


def _bits_above_8(part: AnomalibDataset, headers: dict[str, Header]) -> dict[str, int]:
    """Images that Anomalib reads otherwise, and their bits."""
    has_white = getattr(part, "white_level", None) is not None
    return {path: header.bits for path, header in headers.items() if header.bits > 8 and (header.clipped or has_white)}


def _warn_of_bits(deep: dict[str, int]) -> None:
    if deep:
        path, bits = next(iter(deep.items()))
        rank_zero_warn(
            f"{len(deep)} training images have more than 8 bits per channel, e.g. {path} with {bits}. The pack's "
            "datamodules scale them, and so does PredictImages. Anomalib's prediction from a folder, its inferencers "
            "and the pictures it draws clip them: convert images to 8 bits before they go there."
        )
