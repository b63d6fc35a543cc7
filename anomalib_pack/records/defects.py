"""Defects as objects: connected regions of a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalib_pack.checks import require


@dataclass(frozen=True)
class Defect:
    """A connected region of anomalous pixels, which may touch at corners only.

    A place is that of a pixel, whose column and row count from 0.

    Attributes:
        x: First column.
        y: First row.
        width: Number of columns.
        height: Number of rows.
        centroid_x: Mean of the columns of its pixels.
        centroid_y: Mean of the rows.
        area: Number of its pixels.
        area_mm2: Area in square millimetres; None if the size of a pixel is unknown.
        max_score: Largest value of the map in it.
    """

    x: int
    y: int
    width: int
    height: int
    centroid_x: float
    centroid_y: float
    area: int
    area_mm2: float | None
    max_score: float


class Regions(NamedTuple):
    """The defects of an image.

    Attributes:
        defects: The one with the largest score first.
        labels: int32, (H, W): 0 without defect, 1 in the first one, 2 in the second.
    """

    defects: list[Defect]
    labels: NDArray[np.int32]


def find_defects(
    mask: NDArray, anomaly_map: NDArray, min_area: int = 0, pixel_size: float | None = None
) -> list[Defect]:
    """Find the connected regions of a mask.

    Args:
        mask: Anomalous pixels, Boolean, (H, W).
        anomaly_map: Score of each pixel, (H, W), in whatever range.
        min_area: Least number of pixels of a defect.
        pixel_size: Width and height of a pixel in millimetres; None if it is unknown.

    Returns:
        The defects, the one with the largest score first.

    Raises:
        ValueError: If an argument is out of range, or the sizes of mask and map differ.

    Example:
        >>> mask, scores = np.zeros((4, 6), dtype=bool), np.zeros((4, 6), dtype=np.float32)
        >>> mask[1:3, 1:4] = True
        >>> scores[2, 3] = 7
        >>> [defect] = find_defects(mask, scores, pixel_size=0.5)
        >>> defect.x, defect.y, defect.width, defect.height, defect.area, defect.area_mm2, defect.max_score
        (1, 1, 3, 2, 6, 1.5, 7.0)
    """
    return find_regions(mask, anomaly_map, min_area, pixel_size).defects


def find_regions(mask: NDArray, anomaly_map: NDArray, min_area: int = 0, pixel_size: float | None = None) -> Regions:
    """Find the defects as :func:`find_defects` does, and which pixels belong to which."""
    check_sizes(min_area, pixel_size)
    require("anomaly_map", anomaly_map.shape, anomaly_map.shape == mask.shape, f"of the mask's shape {mask.shape}")
    count, labels, stats, centroids = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    inside = labels > 0
    peaks = np.full(count, -np.inf, dtype=np.float32)
    np.maximum.at(peaks, labels[inside], anomaly_map[inside])
    kept = np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= min_area) + 1  # 0 is what is outside
    kept = kept[np.lexsort((stats[kept, cv2.CC_STAT_LEFT], stats[kept, cv2.CC_STAT_TOP], -peaks[kept]))]
    numbers = np.zeros(count, dtype=np.int32)
    numbers[kept] = np.arange(1, len(kept) + 1)
    scale = None if pixel_size is None else pixel_size**2
    defects = [
        Defect(x, y, width, height, centroid_x, centroid_y, area, None if scale is None else area * scale, peak)
        for (x, y, width, height, area), (centroid_x, centroid_y), peak in zip(
            stats[kept].tolist(), centroids[kept].tolist(), peaks[kept].tolist(), strict=True
        )
    ]
    return Regions(defects, numbers[labels])


def outline(labels: NDArray[np.int32], number: int, defect: Defect) -> NDArray[np.int32]:
    """Outer border of a defect along the edges of its pixels; holes are inside.

    Args:
        labels: Those of :class:`Regions`.
        number: The defect's number there.
        defect: The defect.

    Returns:
        Corners in order, (N, 2), as x and y, where a pixel is from its column and row to the next ones.

    Example:
        >>> mask = np.zeros((3, 4), dtype=bool)
        >>> mask[1, 1:3] = True
        >>> defects, labels = find_regions(mask, mask)
        >>> outline(labels, 1, defects[0]).tolist()
        [[1, 1], [1, 2], [3, 2], [3, 1]]
    """
    columns, rows = slice(defect.x, defect.x + defect.width), slice(defect.y, defect.y + defect.height)
    # OpenCV goes from centre to centre of the outer pixels. Of four small ones in place of each pixel, these centres
    # are a quarter of a pixel away from the edges.
    small = (labels[rows, columns] == number).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(small.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    corners = (contours[0][:, 0] + 1) // 2
    is_new = (corners != np.roll(corners, 1, axis=0)).any(axis=1)  # a corner that points inwards comes twice
    return corners[is_new] + np.array([defect.x, defect.y], dtype=np.int32)


def without_specks(mask: NDArray, kept: NDArray) -> NDArray:
    """A mask without the regions that are no defects in a mask of another size.

    Args:
        mask: Boolean, (h, w).
        kept: The same image with defects only, (H, W).
    """
    share = cv2.resize(kept.astype(np.float32), mask.shape[::-1], interpolation=cv2.INTER_AREA)
    # A pixel of the larger mask comes from the four around its place in the smaller one.
    near = cv2.dilate((share > 0).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return mask & np.isin(labels, np.unique(labels[near]))


def check_sizes(min_area: int, pixel_size: float | None) -> None:
    """Check arguments.

    Raises:
        ValueError: If ``min_area`` is negative, or ``pixel_size`` not above 0.
    """
    require("min_area", min_area, min_area >= 0, "at least 0")
    require("pixel_size", pixel_size, pixel_size is None or pixel_size > 0, "above 0")
