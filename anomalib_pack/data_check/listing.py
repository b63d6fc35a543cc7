"""The images that a datamodule lists."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anomalib.data import AnomalibDataModule
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import LabelName
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset

from anomalib_pack.data.first_look import (
    datasets,
    has_kinds_of_defects,
    lacks_mask,
    mask_files,
    read_by_pack,
)


@dataclass(frozen=True)
class Listed:
    """An image, and where the datamodule has it."""

    path: str
    category: str
    split: str  # train, val or test
    group: str
    anomalous: bool
    masks: tuple[Path, ...]
    lacks_mask: bool  # the data set has masks, but none for this anomalous image
    has_kinds: bool  # values of its masks name kinds of defects
    by_pack: bool  # whether the pack's reader reads it, or Anomalib's
    white_level: float | None


def list_images(datamodule: AnomalibDataModule) -> list[Listed]:
    """List the images of all splits of a datamodule that is set up."""
    return [
        image
        for split, dataset in datasets(datamodule).items()
        for category, part in _parts(datamodule, dataset)
        for image in _images(split, category, part, joined=part is not dataset)
    ]


def _parts(datamodule: AnomalibDataModule, dataset: AnomalibDataset) -> list[tuple[str, AnomalibDataset]]:
    parts = getattr(dataset, "parts", None)
    return list(parts.items()) if parts else [(datamodule.category or datamodule.name, dataset)]


def _images(split: str, category: str, part: AnomalibDataset, joined: bool) -> Iterator[Listed]:
    made = isinstance(part, SyntheticAnomalyDataset)  # its anomalies are Anomalib's
    for row in part.samples.itertuples():
        anomalous = row.label_index == LabelName.ABNORMAL
        if anomalous and made:
            continue
        mask_path = getattr(row, "mask_path", "")
        yield Listed(
            path=row.image_path,
            category=category,
            split=split,
            group=getattr(row, "group", "") or _name(getattr(row, "label", "")),
            anomalous=anomalous,
            masks=tuple(mask_files(part, mask_path)) if anomalous else (),
            lacks_mask=anomalous and lacks_mask(part, mask_path),
            has_kinds=has_kinds_of_defects(part),
            by_pack=read_by_pack(part, joined),
            white_level=getattr(part, "white_level", None),
        )


def _name(label: object) -> str:
    """A label, which Anomalib has as a string or as a member of an enumeration."""
    return str(getattr(label, "value", label))
