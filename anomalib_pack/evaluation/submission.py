"""What the server of MVTec AD 2 takes: maps and thresholded maps of the images whose ground truth it keeps.

Heckler-Kram, Neudeck, Scheler, König, Steger: The MVTec AD 2 Dataset: Advanced Scenarios for Unsupervised Anomaly
Detection, arXiv:2503.21622. The server, benchmark.mvtec.com, suggests the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch import distributed as dist

from anomalib_pack.evaluation.map_file import TIFF, write_map, write_mask
from anomalib_pack.statistics import channel_sums, mean_and_std

# Folders of a category with images whose ground truth the server keeps.
PRIVATE = {"test_private", "test_private_mixed"}

MAPS, THRESHOLDED = "anomaly_images", "anomaly_images_thresholded"

DEVIATIONS = 3  # of the scores of normal pixels, from their mean to the threshold

LEAST_STEPS = 16  # ours: steps of float16 within a standard deviation, below which ranks are lost


def is_private(place: Path) -> bool:
    """Whether the server keeps the ground truth of an image.

    Args:
        place: Path of its map, see :func:`~anomalib_pack.evaluation.layout.place`.
    """
    return len(place.parts) == 3 and place.parts[1] in PRIVATE


def write_submission(folder: Path, place: Path, anomaly_map: Tensor, threshold: float) -> None:
    """Write a map in float16, and where it exceeds the threshold.

    Args:
        folder: Folder of the submission.
        place: Path of the map, see :func:`is_private`.
        anomaly_map: The map, (H, W).
        threshold: Score above which pixels are anomalous.

    Raises:
        ValueError: If a score is beyond the range of float16.
        OSError: If a file cannot be written.
    """
    half = anomaly_map.half()
    if not half.isfinite().all():
        msg = f"Scores of {place} must be finite in float16, which the server takes and ends at 65504; they are not."
        raise ValueError(msg)
    write_map(folder / MAPS / place.with_name(place.name + TIFF), half.numpy())
    write_mask(folder / THRESHOLDED / place.with_name(place.name + ".png"), (anomaly_map > threshold).numpy())


def thresholds(maps: Iterable[tuple[str, Tensor]], world_size: int = 1) -> dict[str, float]:
    """Threshold of each category: mean and 3 standard deviations of the scores of normal pixels.

    Args:
        maps: Category and map, (H, W), of each normal validation image; with several processes, of this one's.
        world_size: Number of processes.
    """
    sums: dict[str, Tensor] = {}
    for category, anomaly_map in maps:
        found = channel_sums(anomaly_map[None, None])
        sums[category] = sums[category] + found if category in sums else found
    shares = [sums]
    if world_size > 1:
        shares = [{}] * world_size
        dist.all_gather_object(shares, sums)
    categories = sorted({category for share in shares for category in share})
    return {
        category: _threshold(sum(share[category] for share in shares if category in share), category)
        for category in categories
    }


def _threshold(sums: Tensor, category: str) -> float:
    mean, std = (value.item() for value in mean_and_std(sums))
    largest = max(abs(mean), torch.finfo(torch.float16).smallest_normal)
    step = 2.0 ** math.floor(math.log2(largest)) * torch.finfo(torch.float16).eps
    if std < LEAST_STEPS * step:
        rank_zero_warn(
            f"Scores of normal pixels of {category} have mean {mean:g} and standard deviation {std:g}. In float16, "
            f"which the server takes, they differ by steps of {step:g}, so that many become equal."
        )
    return mean + DEVIATIONS * std
