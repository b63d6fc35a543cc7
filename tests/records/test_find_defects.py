"""Defects of a mask, against SciPy's regions of each one."""

import cv2
import numpy as np
import pytest
from scipy import ndimage
from skimage.draw import polygon

from anomalib_pack.records import find_defects
from anomalib_pack.records.defects import find_regions, outline, without_specks


@pytest.fixture
def mask() -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(60, 90)), 1.5) > 0.15


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(60, 90)).astype(np.float32)


def slow_defects(mask: np.ndarray, scores: np.ndarray, min_area: int) -> list[tuple]:
    """Bounding box, centroid, area and largest score of each region, one at a time."""
    found, count = ndimage.label(mask, structure=np.ones((3, 3)))
    defects = []
    for number in range(1, count + 1):
        rows, columns = np.nonzero(found == number)
        x, y, area = columns.min(), rows.min(), len(rows)
        size = columns.max() - x + 1, rows.max() - y + 1
        if area >= min_area:
            defects.append((x, y, *size, columns.mean(), rows.mean(), area, scores[rows, columns].max()))
    return sorted(defects, key=lambda defect: -defect[-1])


@pytest.mark.parametrize("min_area", [0, 20])
def test_regions(mask: np.ndarray, scores: np.ndarray, min_area: int) -> None:
    defects = find_defects(mask, scores, min_area)
    slow = slow_defects(mask, scores, min_area)
    assert len(defects) > 5
    assert len(slow_defects(mask, scores, 20)) < len(slow_defects(mask, scores, 0))
    values = [
        (each.x, each.y, each.width, each.height, each.centroid_x, each.centroid_y, each.area, each.max_score)
        for each in defects
    ]
    np.testing.assert_allclose(values, slow, rtol=1e-6)
    assert {each.area_mm2 for each in defects} == {None}


def test_labels_number_the_defects(mask: np.ndarray, scores: np.ndarray) -> None:
    defects, labels = find_regions(mask, scores, min_area=20)
    assert labels.max() == len(defects)
    for number, defect in enumerate(defects, start=1):
        assert (labels == number).sum() == defect.area
        assert scores[labels == number].max() == defect.max_score
    assert not (labels[~mask] > 0).any()


def test_pixels_that_touch_at_corners_are_one_defect() -> None:
    [defect] = find_defects(np.eye(4, dtype=bool), np.zeros((4, 4)), pixel_size=0.1)
    assert (defect.area, defect.width, defect.area_mm2) == (4, 4, pytest.approx(0.04))


def test_nothing_anomalous() -> None:
    assert find_defects(np.zeros((4, 4), dtype=bool), np.zeros((4, 4))) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_area": -1}, "min_area must be at least 0, got -1"),
        ({"pixel_size": 0.0}, "pixel_size must be above 0, got 0.0"),
        ({"anomaly_map": np.zeros((4, 5))}, r"anomaly_map must be of the mask's shape \(4, 4\), got \(4, 5\)"),
    ],
)
def test_impossible_values_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_defects(**{"mask": np.zeros((4, 4), dtype=bool), "anomaly_map": np.zeros((4, 4))} | arguments)


def rasterised(corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centres are in a polygon, found by another library."""
    pixels = np.zeros(shape, dtype=bool)
    pixels[polygon(corners[:, 1] - 0.5, corners[:, 0] - 0.5, shape)] = True
    return pixels


@pytest.mark.parametrize("kind", ["blobs", "noise"])
def test_outlines(mask: np.ndarray, scores: np.ndarray, kind: str) -> None:
    """They go around the pixels of a defect and its holes, also where pixels touch at corners."""
    defects, labels = find_regions(mask if kind == "blobs" else scores > 0.3, scores)
    has_holes = []
    for number, defect in enumerate(defects, start=1):
        corners = outline(labels, number, defect)
        filled = ndimage.binary_fill_holes(labels == number)
        np.testing.assert_array_equal(rasterised(corners, mask.shape), filled)
        assert cv2.contourArea(corners) == filled.sum()
        assert len(corners) >= 4
        assert (corners != np.roll(corners, 1, axis=0)).any(axis=1).all()
        has_holes.append(filled.sum() > defect.area)
    assert any(has_holes) == (kind == "noise")


def test_specks_are_dropped_from_a_mask_of_another_size() -> None:
    small = np.zeros((20, 30), dtype=bool)
    small[2:8, 3:9] = True
    small[15, 25] = True
    large = small.repeat(4, axis=0).repeat(4, axis=1)
    kept = find_regions(large, large, min_area=17).labels > 0
    expected = small.copy()
    expected[15, 25] = False
    np.testing.assert_array_equal(without_specks(small, kept), expected)
    np.testing.assert_array_equal(without_specks(small, large), small)
    assert not without_specks(small, np.zeros_like(large)).any()
    np.testing.assert_array_equal(without_specks(large, small), large)
