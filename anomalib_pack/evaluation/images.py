"""The test images of a category, with what is read of each when it is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import LabelName

from anomalib_pack.data.categories import with_readable_names
from anomalib_pack.data.image_files import map_files, names, read_header
from anomalib_pack.evaluation.layout import place, unique_places
from anomalib_pack.evaluation.map_file import TIFF, find_map, read_map
from anomalib_pack.metrics.original_size import Originals


class MappedImage(NamedTuple):
    """A test image and the file of its map; ``group`` is ``""`` for an image of every group."""

    path: str
    map_path: Path
    size: tuple[int, int]
    group: str
    anomalous: bool


@dataclass(frozen=True)
class MappedImages:
    """The test images of a category; ``has_defects`` says whether its defects can be told apart."""

    category: str
    images: list[MappedImage]
    originals: Originals
    has_defects: bool

    def batches(self, images: Iterable[MappedImage], fields: Sequence[str]) -> Iterator[SimpleNamespace]:
        """Read each image's map, and its mask or defects: a batch of one image at the size of its file.

        Args:
            images: The images.
            fields: What is read: ``"anomaly_map"``, ``"gt_mask"``, ``"defects"``.

        Raises:
            OSError: If a file cannot be read.
            ValueError: If the map, a mask or the defects are not as they should be.
        """
        for image in images:
            raw = torch.from_numpy(read_map(image.map_path, image.size, image.path))
            yield self.originals.read(image.path, raw, fields).batch(fields, None)


def list_images(category: str, datamodule: AnomalibDataModule, root: str | Path | None, folder: Path) -> MappedImages:
    """List the test images of a datamodule, and find their maps.

    Args:
        category: Name of the category.
        datamodule: The datamodule of the category. Nothing is downloaded.
        root: Folder of the data set.
        folder: Folder of the maps.

    Raises:
        OSError: If a map is missing, or an image is none.
        ValueError: If an image has several maps, there is no ground truth, or ``defects_config.json`` contradicts
            itself.
    """
    datamodule.looks_at_files = False  # training images are no matter here
    datamodule.num_workers = 0
    with with_readable_names(datamodule):
        datamodule.setup()
    dataset = datamodule.test_dataloader().dataset  # MVTec AD 2 has others than its test_data
    _check_ground_truth(category, dataset)
    paths = dataset.samples.image_path.tolist()
    places = unique_places({path: place(path, root, category) for path in paths})
    maps = {path: find_map(folder, found) for path, found in places.items()}
    missing = [path for path, found in maps.items() if found is None]
    if missing:
        msg = (
            f"{len(missing)} of {len(paths)} test images have no map, {names(missing, 3)}. That of the first would be "
            f"{folder / places[missing[0]]}{TIFF}."
        )
        raise FileNotFoundError(msg)
    sizes = map_files(lambda path: read_header(path).size, paths)
    groups = dataset.samples["group"] if "group" in dataset.samples else [""] * len(paths)
    labels = dataset.samples.label_index == LabelName.ABNORMAL
    images = [
        MappedImage(path, maps[path], size, group, bool(label))
        for path, size, group, label in zip(paths, sizes, groups, labels, strict=True)
    ]
    originals = Originals(dataset)
    return MappedImages(category, images, originals, _can_tell_defects(originals))


def _can_tell_defects(originals: Originals) -> bool:
    if not originals.has_defects:
        return False
    try:
        originals.check_defects()
    except FileNotFoundError as error:
        warnings.warn(f"AUC-sPRO is left out, and AUPRO is in its place. {error}", stacklevel=2)
        return False
    return True


def _check_ground_truth(category: str, dataset: AnomalibDataset) -> None:
    labels = set(dataset.samples.label_index)
    if LabelName.UNKNOWN in labels:
        msg = f"The test images of {category} have no ground truth: the server of the benchmark has it."
        raise ValueError(msg)
    if dataset.task != TaskType.SEGMENTATION:
        msg = f"The anomalous test images of {category} have no masks, without which maps cannot be evaluated."
        raise ValueError(msg)
    for label, kind in ((LabelName.NORMAL, "normal"), (LabelName.ABNORMAL, "anomalous")):
        if label not in labels:
            msg = f"{category} has no {kind} test images, without which nothing can be measured."
            raise ValueError(msg)
