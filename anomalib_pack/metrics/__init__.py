"""Evaluation per group of test images.

    group_evaluator   GroupEvaluator: keeps test batches, computes each metric for each group, table and CSV
    image             the image metric that Anomalib lacks: AP
    pixel             AUROC, AP, F1Max and AUPRO of pixels, also per image, exact in little memory
    roc               the curve that they are read off
    samples           parts of batches

Metrics have Anomalib's names, so they are used with their module: ``pixel.AUROC``.
"""

from anomalib_pack.metrics.group_evaluator import GroupEvaluator, default_test_metrics

__all__ = ["GroupEvaluator", "default_test_metrics"]
