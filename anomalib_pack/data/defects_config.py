"""Defects of MVTec LOCO: masks whose values ``defects_config.json`` explains.

The masks of an image are files of one defect each. All of its pixels that are not 0 have one value, and the
configuration of the category says for each value which kind of defect it is and how much of it has to be found::

    [{"defect_name": "missing_pin", "pixel_value": 255, "saturation_threshold": 40, "relative_saturation": false}, ...]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomalib_pack.data.image_files import read, read_header
from anomalib_pack.data.masks import check_size, empty_message, mask_values
from anomalib_pack.defect import Defect

CONFIG = "defects_config.json"


@dataclass(frozen=True)
class Saturation:
    """What the configuration says of the masks of one value.

    Attributes:
        defect_name: Kind of the defect.
        threshold: What has to be found of a mask: pixels or, if relative, a share of the mask.
        relative: Whether the threshold is a share.
    """

    defect_name: str
    threshold: float
    relative: bool

    @property
    def is_possible(self) -> bool:
        """Whether what was read is a share or a number of pixels."""
        if type(self.threshold) not in {int, float} or type(self.relative) is not bool:
            return False
        return 0 < self.threshold <= 1 if self.relative else self.threshold >= 1 and self.threshold % 1 == 0

    def area(self, mask_area: int) -> int:
        """Number of pixels from which on a mask of so many counts as found; 0 if the share is less than a pixel."""
        return int(self.threshold * mask_area) if self.relative else min(int(self.threshold), mask_area)


def read_defects(config_path: Path, mask_paths: Sequence[Path], image_path: str) -> list[Defect]:
    """Read the defects of an image.

    Args:
        config_path: ``defects_config.json`` of the category.
        mask_paths: Masks of the image.
        image_path: The image, whose header is read.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If the configuration contradicts itself or does not explain a mask, or if a mask is empty, has
            several values or another size than its image. The message names the file and the value.
    """
    saturations = read_config(config_path)
    size = read_header(image_path).size
    return [_read_defect(path, image_path, size, saturations, config_path) for path in mask_paths]


def read_config(path: Path) -> dict[int, Saturation]:
    """Read the configuration of a category.

    Returns:
        What is said of each value of a mask.

    Raises:
        OSError: If the file is missing.
        ValueError: If an entry is not as it should be, or two contradict each other.
    """
    if not path.is_file():
        msg = (
            f"There is no file {path}, which says for each value of a mask how much of the defect has to be found. "
            "Restore it from the data set, or write one in the format of MVTec LOCO."
        )
        raise FileNotFoundError(msg)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"Cannot read {path}: {error}."
        raise ValueError(msg) from error
    if not isinstance(entries, list):
        msg = f"{path} must be a list with an entry for each kind of defect, got a {type(entries).__name__}."
        raise ValueError(msg)  # noqa: TRY004  # it is the file that is wrong
    found: dict[int, Saturation] = {}
    for entry in entries:
        value, saturation = _parse(entry, path)
        if found.setdefault(value, saturation) != saturation:
            msg = f"{path} contradicts itself on pixel value {value}: it is {found[value]} and {saturation}."
            raise ValueError(msg)
    return found


def _parse(entry: Any, path: Path) -> tuple[int, Saturation]:
    try:
        value, threshold, relative = (
            entry[key] for key in ("pixel_value", "saturation_threshold", "relative_saturation")
        )
        saturation = Saturation(str(entry["defect_name"]), threshold, relative)
    except (KeyError, TypeError) as error:
        msg = (
            f"{path} must have defect_name, pixel_value, saturation_threshold and relative_saturation in each entry, "
            f"got {entry!r}."
        )
        raise ValueError(msg) from error
    if type(value) is not int or value < 1:  # True is an int too
        msg = f"{path} must have whole numbers above 0 as pixel_value, got {value!r} for {saturation.defect_name}."
        raise ValueError(msg)
    if not saturation.is_possible:
        msg = (
            f"{path} must have for pixel value {value} a share in (0, 1] as saturation_threshold if "
            f"relative_saturation is true, and a whole number of pixels if it is false, got {threshold!r} and "
            f"{relative!r}."
        )
        raise ValueError(msg)
    return value, saturation


def _read_defect(
    path: Path, image_path: str, size: tuple[int, int], saturations: dict[int, Saturation], config_path: Path
) -> Defect:
    values = read(mask_values, path)
    check_size(path, values.shape, image_path, size)
    mask = values > 0
    if not mask.any():
        raise ValueError(empty_message([path], image_path))
    found = np.unique(values[mask]).tolist()
    if len(found) > 1:
        msg = f"The mask {path} must have one value beside 0, that of its defect, got {', '.join(map(str, found))}."
        raise ValueError(msg)
    if found[0] not in saturations:
        known = ", ".join(map(str, sorted(saturations)))
        msg = f"The mask {path} has pixel value {found[0]}, but {config_path} explains {known} only."
        raise ValueError(msg)
    saturation, mask_area = saturations[found[0]], int(mask.sum())
    area = saturation.area(mask_area)
    if area == 0:
        msg = (
            f"The mask {path} has {mask_area} pixels of value {found[0]}, of which the share {saturation.threshold} is "
            f"less than one pixel: so small a defect has no sPRO. Correct the mask, or saturation_threshold in "
            f"{config_path}."
        )
        raise ValueError(msg)
    return Defect(saturation.defect_name, torch.from_numpy(mask), area)
