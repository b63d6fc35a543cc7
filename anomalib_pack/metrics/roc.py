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

import torch
from torch import Tensor
from torch.nn.functional import pad


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
    scores, counts = anomalous.unique_consecutive(return_counts=True)
    true_positives = counts.cumsum(0)
    above = len(normal) - torch.searchsorted(normal, scores, right=True)
    at_or_above = len(normal) - torch.searchsorted(normal, scores)
    return RocCorners(
        false_positives=pad(pad(torch.stack([above, at_or_above], dim=1).flatten(), (1, 0)), (0, 1), value=len(normal)),
        true_positives=pad(true_positives, (1, 0)).repeat_interleave(2),
        regions=pad(overlap[true_positives - 1], (1, 0)).repeat_interleave(2),
    )


def merged(parts: list[Tensor]) -> Tensor:
    """Concatenate tensors of shape (N,) on the CPU, each of which is let go of once it is copied: the list is emptied.

    The last ones come first, because memory that was taken last is given back at once.
    """
    whole = torch.empty(sum(len(part) for part in parts), dtype=parts[0].dtype if parts else None)
    start = 0
    while parts:
        part = parts.pop()
        whole[start : start + len(part)] = part
        start += len(part)
    return whole
