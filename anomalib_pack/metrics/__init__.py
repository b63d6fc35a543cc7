"""Evaluation per group of test images.

Map::

    group_evaluator.py  GroupEvaluator: keeps test batches, computes each metric for each group
    original_size.py    maps, masks and defects at the size of the image files
    image.py            the image metric that Anomalib lacks: AP
    pixel.py            AUROC, AP, F1Max and AUPRO of pixels, also per image, exact in little memory
    roc.py              the curve that they are read off
    spro.py             AUC-sPRO, by which MVTec LOCO is judged
    samples.py          parts of batches
    tables.py           tables of metrics, for the console and as CSV

Metrics have Anomalib's names, so they are used with their module: ``pixel.AUROC``.
"""

from anomalib_pack.metrics.group_evaluator import GroupEvaluator, default_test_metrics

__all__ = ["GroupEvaluator", "default_test_metrics"]
