"""What is known of an image, as rows of tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor

from anomalib_pack.records.defects import Defect
from anomalib_pack.records.table import Row

PREDICTION_COLUMNS = (
    *("image_path", "category", "group", "gt_label", "pred_label", "raw_score", "pred_score"),
    *("raw_threshold", "threshold", "explanation", "picture"),
)
DEFECT_COLUMNS = (
    *("image_path", "category", "group", "defect", "x", "y", "width", "height"),
    *("centroid_x", "centroid_y", "area", "area_mm2", "max_score"),
)


def group_of(image_path: str, group: str | None, category: str) -> str:
    """Group of a labelled image: that of its anomaly, else the name of its folder.

    Args:
        image_path: The image.
        group: What the batch has as ``group``, which may start with the category, or end with ``/`` where the image
            belongs to several.
        category: Name of its category.

    Example:
        >>> group_of("loco/pushpins/test/good/000.png", "pushpins/", "pushpins")
        'good'
        >>> group_of("aebad/test/ablation/000.png", "view", "")
        'view'
    """
    name = (group or "").removeprefix(f"{category}/")
    return Path(image_path).parent.name if name in {"", category} or name.endswith("/") else name


def scores(values: Tensor | None, count: int) -> list[float | None]:
    """Scores of a batch, (B,) or (B, 1); None without a score for each image."""
    if values is None or values.numel() != count:
        return [None] * count
    return [short(value) for value in values.float().flatten().tolist()]


def labels(values: Tensor | None, count: int) -> list[int | None]:
    """Labels of a batch as 0 and 1; None without a label for each image, as of videos, whose frames have them."""
    if values is None or values.numel() != count:
        return [None] * count
    return [int(value) for value in values.flatten().tolist()]


def short(value: float) -> float:
    """The number with the fewest digits that is the same in float32."""
    return float(str(np.float32(value)))


def known(value: float) -> float | None:
    """The number in short; None if it is NaN."""
    return None if math.isnan(value) else short(value)


def defect_rows(prediction: Row, defects: Iterable[Defect]) -> list[Row]:
    """Rows of the defects of an image.

    Args:
        prediction: Row of the image.
        defects: Its defects.
    """
    image = {column: prediction[column] for column in DEFECT_COLUMNS[:3]}
    return [
        image
        | {"defect": number}
        | {name: short(value) if isinstance(value, float) else value for name, value in asdict(defect).items()}
        for number, defect in enumerate(defects, start=1)
    ]
