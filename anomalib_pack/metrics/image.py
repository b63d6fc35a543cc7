"""Image metrics that Anomalib lacks."""

from anomalib.metrics import AnomalibMetric
from torchmetrics.classification import BinaryAveragePrecision


class AP(AnomalibMetric, BinaryAveragePrecision):
    """Average precision of image scores.

    Anomalib's ``AUPR`` has the same value in version 2.7, under a name that papers use for the trapezoidal area too.
    """

    default_fields = ("pred_score", "gt_label")
