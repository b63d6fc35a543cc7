"""Image metrics that Anomalib lacks."""

from anomalib.metrics import AnomalibMetric
from torch import Tensor
from torchmetrics.classification import BinaryAveragePrecision


class _FlatAveragePrecision(BinaryAveragePrecision):
    """Average precision that takes scores of shape (B, 1) as well, which some of Anomalib's models give."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add scores and labels, of shape (B,) or (B, 1) each."""
        super().update(preds.flatten(), target.flatten())


class AP(AnomalibMetric, _FlatAveragePrecision):
    """Average precision of image scores.

    Anomalib's ``AUPR`` has the same value in version 2.7, under a name that papers use for the trapezoidal area too.
    """

    default_fields = ("pred_score", "gt_label")
