"""The exact ROC curve of millions of pixels, by its corners, and what is read off it.

A curve has as many points as there are different scores, which are nearly as many as pixels. But it rises at scores of
anomalous pixels only, and those are a few percent. Between two of them it runs level, so its corners say it all::

                      ______x     x  corner; level parts: normal pixels alone
                     /            /  anomalous and normal pixels of equal score
          x_________x
          |                       |  anomalous pixels alone
    x_____x

So the normal scores need no companion (position, label) while they are sorted, and are sorted in place.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

PART = 2**23  # 32 MB of float32, from which on the C library maps memory of its own


@dataclass(frozen=True)
class RocCorners:
    """Corners of a ROC curve, from the highest threshold to the lowest: V = 2 K + 2 for K different anomalous scores.

    The first is (0, 0) and the last everything. Those of even index from 2 on are the thresholds at anomalous scores.

    Attributes:
        false_positives: Normal pixels at or above the threshold, shape (V,), integer.
        true_positives: Anomalous pixels at or above the threshold, shape (V,), integer.
        regions: Overlaps with the regions, added up over regions, shape (V,), float64. The overlap with a region is
            the share of its pixels that are at or above the threshold; with a defect's saturation area, of as many of
            its pixels as that is, the highest.
    """

    false_positives: Tensor
    true_positives: Tensor
    regions: Tensor

    @property
    def num_normal(self) -> int:
        """Number of normal pixels."""
        return int(self.false_positives[-1])

    @property
    def num_anomalous(self) -> int:
        """Number of anomalous pixels."""
        return int(self.true_positives[-1])

    def auroc(self, fpr_limit: float = 1.0) -> float:
        """Area under the ROC curve up to a false positive rate in (0, 1], divided by that rate.

        It is 0 if there are no anomalous or no normal pixels, as in torchmetrics.
        """
        if not self.num_anomalous or not self.num_normal:
            return 0.0
        if fpr_limit < 1:
            return self._area(self.true_positives.double(), fpr_limit)
        # Twice the area, in integers: exact to 4e18 pairs of a normal and an anomalous pixel.
        area = (self.false_positives.diff() * (self.true_positives[1:] + self.true_positives[:-1])).sum()
        return int(area) / (2 * self.num_anomalous * self.num_normal)

    def average_precision(self) -> float:
        """Sum of precision times rise in recall; 0 without anomalous and 1 without normal pixels."""
        if not self.num_anomalous:
            return 0.0
        tp, fp = self._at_thresholds()
        precision = tp / (tp + fp).double()
        return float((precision * tp.diff(prepend=tp.new_zeros(1))).sum()) / self.num_anomalous

    def f1_max(self) -> float:
        """Largest F1 score of all thresholds; 0 without anomalous and 1 without normal pixels."""
        if not self.num_anomalous:
            return 0.0
        tp, fp = self._at_thresholds()
        return float((2 * tp / (tp + fp + self.num_anomalous).double()).max())

    def aupro(self, fpr_limit: float) -> float:
        """Area under the curve of mean region overlap up to a false positive rate in (0, 1], divided by that rate.

        It is 0 if there are no anomalous or no normal pixels, as in Anomalib.
        """
        if not self.num_anomalous or not self.num_normal:
            return 0.0
        return self._area(self.regions, fpr_limit)

    def _area(self, heights: Tensor, fpr_limit: float) -> float:
        """Area under heights of the corners, shape (V,), up to a false positive rate, as a share of the largest."""
        limit = fpr_limit * self.num_normal
        inside = int((self.false_positives <= limit).sum())
        fp, below = self.false_positives[:inside].double(), heights[:inside]
        area = float(torch.trapezoid(below, fp))
        if inside < len(heights):  # The part from the last corner inside to the limit.
            fp_step = float(self.false_positives[inside] - fp[-1])
            slope = float(heights[inside] - below[-1]) / fp_step
            width = limit - float(fp[-1])
            area += width * (float(below[-1]) + slope * width / 2)
        return area / limit / float(heights[-1])

    def _at_thresholds(self) -> tuple[Tensor, Tensor]:
        """True and false positives at each anomalous score, shape (K,) both."""
        return self.true_positives[2::2], self.false_positives[2::2]


def check_limit(fpr_limit: float) -> None:
    """Check a false positive rate up to which an area counts.

    Raises:
        ValueError: If it is not in (0, 1].
    """
    if not 0 < fpr_limit <= 1:
        msg = f"fpr_limit must be in (0, 1], got {fpr_limit}."
        raise ValueError(msg)


def roc_corners(normal: Tensor, anomalous: Tensor, weights: Tensor) -> RocCorners:
    """Corners of the ROC curve. Equal scores form one threshold.

    Args:
        normal: Scores of normal pixels, shape (N,), without NaN, on the CPU; sorted in place.
        anomalous: Scores of anomalous pixels, shape (P,), without NaN, on the CPU.
        weights: How much each anomalous pixel adds to the overlaps, shape (P,), float64: for a region, 1 / its pixels.
    """
    # Not torch.sort, which makes a copy with positions: four times the memory, and here six times the time.
    normal.numpy().sort()
    anomalous, order = anomalous.sort(descending=True)
    overlap = weights[order].cumsum(0)
    del order  # Here and below: with many anomalous pixels, what is not needed any more is gigabytes.
    scores, counts = anomalous.unique_consecutive(return_counts=True)
    true_positives = counts.cumsum(0)
    regions = overlap[true_positives - 1]
    del anomalous, counts, overlap
    false_positives = torch.full((2 * len(scores) + 2,), len(normal))
    false_positives[0] = 0
    false_positives[1:-1:2], false_positives[2:-1:2] = _counts_above(normal, scores)
    return RocCorners(
        false_positives=false_positives,
        true_positives=pad(true_positives, (1, 0)).repeat_interleave(2),
        regions=pad(regions, (1, 0)).repeat_interleave(2),
    )


def _counts_above(normal: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """How many normal scores, in rising order, are above, and at or above, scores in falling order."""
    values, rising = (
        normal.numpy(),
        scores.flip(0).numpy(),
    )  # NumPy's search goes on from the score before, if they rise
    below = np.searchsorted(values, rising)
    not_above = below.copy()
    if len(values):
        tied = values[np.minimum(below, len(values) - 1)] == rising
        not_above[tied] = np.searchsorted(values, rising[tied], side="right")
    above, at_or_above = (torch.from_numpy(len(values) - count).flip(0) for count in (not_above, below))
    return above, at_or_above


def append(parts: list[Tensor], part: Tensor) -> None:
    """Append a tensor of shape (N,), joined with earlier parts that are as small.

    The memory of large parts goes back to the system as soon as they are let go of, and that of small ones need not.
    Each number is copied as often as its part doubles.
    """
    while parts and len(parts[-1]) < min(PART, len(part) + 1):
        part = torch.cat([parts.pop(), part])
    parts.append(part)


def merged(parts: list[Tensor]) -> Tensor:
    """Concatenate parts on the CPU, in any order. Each is let go of once it is copied: the list is emptied."""
    dtype = parts[0].cpu().numpy().dtype if parts else np.float32
    # NumPy's memory comes in large pages, which PyTorch's copies take six times as long without.
    whole = torch.from_numpy(np.empty(sum(len(part) for part in parts), dtype=dtype))
    start = 0
    while parts:
        part = parts.pop()
        whole[start : start + len(part)] = part
        start += len(part)
    return whole
