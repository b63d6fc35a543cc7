"""The exact ROC curve of millions of pixels, by its corners, and what is read off it.

A curve has as many points as there are different scores, which are nearly as many as pixels. But it rises at scores of
anomalous pixels only, and those are a few percent. Between two of them it runs level, so its corners say it all::

                      ______x     x  corner; level parts: normal pixels alone
                     /            /  anomalous and normal pixels of equal score
          x_________x
          |                       |  anomalous pixels alone
    x_____x

So the normal scores need no companion (position, label) while they are sorted, can be sorted in parts, and need not be
where they are below all anomalous ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

PART = 2**25  # Scores that are sorted at a time: 128 MB.


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
        inside = int(torch.searchsorted(self.false_positives, int(limit), right=True))
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


def check_ranks(scores: Tensor) -> None:
    """Check that each of the scores, of any shape, has a rank.

    Raises:
        ValueError: If one is NaN.
    """
    if scores.numel() and scores.max().isnan():  # which propagates it, in one pass
        msg = f"{int(scores.isnan().sum())} of {scores.numel()} pixel scores are NaN, which has no rank."
        raise ValueError(msg)


def roc_corners(normal: Tensor | Iterable[Tensor], anomalous: Tensor, weights: Tensor) -> RocCorners:
    """Corners of the ROC curve. Equal scores form one threshold.

    Args:
        normal: Scores of normal pixels, shape (N,), without NaN, on the CPU; or parts of them, taken once each.
        anomalous: Scores of anomalous pixels, shape (P,), without NaN, on the CPU.
        weights: How much each anomalous pixel adds to the overlaps, shape (P,), float64: for a region, 1 / its pixels.
    """
    order = torch.from_numpy(np.argsort(anomalous.numpy())).flip(0)  # several times as fast as PyTorch's
    anomalous, overlap = anomalous[order], weights[order].cumsum(0)
    del order  # Here and below: with many anomalous pixels, what is not needed any more is gigabytes.
    scores, counts = anomalous.unique_consecutive(return_counts=True)
    true_positives = counts.cumsum(0)
    regions = overlap[true_positives - 1]
    del anomalous, counts, overlap
    false_positives = torch.zeros(2 * len(scores) + 2, dtype=torch.long)
    buffer, filled = np.empty(PART, dtype=scores.numpy().dtype), 0
    for part in [normal] if isinstance(normal, Tensor) else normal:
        false_positives[-1] += len(part)
        for piece in part.split(PART) if len(scores) else ():
            values = piece.numpy()
            found = values[values >= float(scores[-1])]  # The others are below all thresholds.
            if filled + len(found) > PART:
                _count_above(buffer[:filled], scores, false_positives)
                filled = 0
            buffer[filled : filled + len(found)] = found
            filled += len(found)
    if filled:
        _count_above(buffer[:filled], scores, false_positives)
    return RocCorners(
        false_positives=false_positives,
        true_positives=pad(true_positives, (1, 0)).repeat_interleave(2),
        regions=pad(regions, (1, 0)).repeat_interleave(2),
    )


def _count_above(normal: np.ndarray, scores: Tensor, counts: Tensor) -> None:
    """Sort normal scores, and add to the corners how many are beyond each of the anomalous ones, which fall."""
    # Not torch.sort, which makes a copy with positions: four times the memory, and here six times the time.
    normal.sort()
    rising = scores.flip(0).numpy()  # The search goes on from the score before, if they rise.
    below = np.searchsorted(normal, rising)
    counts[2::2] += len(normal) - torch.from_numpy(below).flip(0)
    tied = np.flatnonzero(normal[np.minimum(below, len(normal) - 1)] == rising)
    below[tied] = np.searchsorted(normal, rising[tied], side="right")  # from here on with those that are equal
    counts[1:-1:2] += len(normal) - torch.from_numpy(below).flip(0)
