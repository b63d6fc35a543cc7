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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

PART = 2**26  # Scores that are sorted at a time: 256 MB.


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


def roc_corners(normal: Tensor | Sequence[Tensor], anomalous: Tensor, weights: Tensor) -> RocCorners:
    """Corners of the ROC curve. Equal scores form one threshold.

    Args:
        normal: Scores of normal pixels, shape (N,), or parts of them, without NaN, on the CPU; each is sorted in place.
        anomalous: Scores of anomalous pixels, shape (P,), without NaN, on the CPU.
        weights: How much each anomalous pixel adds to the overlaps, shape (P,), float64: for a region, 1 / its pixels.
    """
    anomalous, order = anomalous.sort(descending=True)
    overlap = weights[order].cumsum(0)
    del order  # Here and below: with many anomalous pixels, what is not needed any more is gigabytes.
    scores, counts = anomalous.unique_consecutive(return_counts=True)
    true_positives = counts.cumsum(0)
    regions = overlap[true_positives - 1]
    del anomalous, counts, overlap
    false_positives = torch.zeros(2 * len(scores) + 2, dtype=torch.long)
    for part in filter(len, [normal] if isinstance(normal, Tensor) else normal):
        # Not torch.sort, which makes a copy with positions: four times the memory, and here six times the time.
        part.numpy().sort()
        _count_above(part.numpy(), scores, false_positives)
    return RocCorners(
        false_positives=false_positives,
        true_positives=pad(true_positives, (1, 0)).repeat_interleave(2),
        regions=pad(regions, (1, 0)).repeat_interleave(2),
    )


def _count_above(normal: np.ndarray, scores: Tensor, counts: Tensor) -> None:
    """Add to the corners how many normal scores, in rising order, are beyond each of the scores, in falling order."""
    rising = scores.flip(0).numpy()  # The search goes on from the score before, if they rise.
    below = np.searchsorted(normal, rising)
    counts[2::2] += len(normal) - torch.from_numpy(below).flip(0)
    tied = np.flatnonzero(normal[np.minimum(below, len(normal) - 1)] == rising)
    below[tied] = np.searchsorted(normal, rising[tied], side="right")  # from here on with those that are equal
    counts[1:-1:2] += len(normal) - torch.from_numpy(below).flip(0)
    counts[-1] += len(normal)


def append(parts: list[Tensor], part: Tensor) -> None:
    """Add a tensor of shape (N,) to parts, the large ones first; as many small ones as make a large one are joined.

    The memory of large parts goes back to the system as soon as they are let go of, and that of small ones need not.
    """
    parts.insert(len(parts) if len(part) < PART else 0, part)
    small = [each for each in parts if len(each) < PART]
    if sum(map(len, small)) >= PART:
        del parts[-len(small) :]
        parts.insert(0, merged(small))


def joined(parts: list[Tensor]) -> list[Tensor]:
    """Parts of :func:`append` on the CPU, with the small ones in one; the list is emptied."""
    large = [parts.pop(0).cpu() for part in list(parts) if len(part) >= PART]
    return [*large, merged(parts)]


def merged(parts: list[Tensor]) -> Tensor:
    """Concatenate parts on the CPU, in order. Each is let go of once it is copied: the list is emptied."""
    dtype = parts[0].cpu().numpy().dtype if parts else np.float32
    # NumPy's memory comes in large pages, which PyTorch's copies take six times as long without.
    whole = torch.from_numpy(np.empty(sum(len(part) for part in parts), dtype=dtype))
    start = 0
    parts.reverse()
    while parts:
        part = parts.pop()
        whole[start : start + len(part)] = part
        start += len(part)
    return whole
