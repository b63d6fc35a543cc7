"""Metrics by their names, as tables of papers ask for them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from anomalib.metrics import AUROC, AnomalibMetric, F1Max

from anomalib_pack.metrics import GroupEvaluator, image, pixel
from anomalib_pack.metrics.tables import MAD_METRICS

_SCORES = ["pred_score", "gt_label"]
_IMAGE = {"image_AUROC": AUROC, "image_AP": image.AP, "image_F1Max": F1Max}
_PIXEL = {"pixel_AP": pixel.AP, "pixel_F1Max": pixel.F1Max, "pixel_AUPRO_per_image": pixel.AUPROPerImage}
_AREAS = {"pixel_AUROC": pixel.AUROC, "pixel_AUPRO": pixel.AUPRO, "pixel_SPRO": pixel.SPRO}
_WITH_LIMIT = re.compile(rf"({'|'.join(_AREAS)})_(0\.\d+|1)")  # of the false positive rate
MEAN_OF_SEVEN = "mAD"
NAMES = [*_IMAGE, *_PIXEL, *_AREAS, MEAN_OF_SEVEN]


def check_metric(name: str, where: str) -> None:
    """Check the name of a metric.

    Raises:
        ValueError: If there is none of this name. The message lists those that there are.
    """
    if name not in NAMES and not _WITH_LIMIT.fullmatch(str(name)):
        msg = (
            f"{where} must be one of {', '.join(NAMES)}, or {', '.join(_AREAS)} with a limit of the false positive "
            f"rate, e.g. pixel_AUPRO_0.05; got {name!r}."
        )
        raise ValueError(msg)
    if _WITH_LIMIT.fullmatch(str(name)) and _metric(name).name != name:  # the limit is the default, which has no number
        msg = f"{where} must be {_metric(name).name}, which has this limit, got {name}."
        raise ValueError(msg)


def evaluator_of(names: Iterable[str], map_size: str) -> GroupEvaluator:
    """An evaluator that has these metrics, and those that `mAD` is the mean of where it is among them."""
    wanted = dict.fromkeys(part for name in names for part in (MAD_METRICS if name == MEAN_OF_SEVEN else [name]))
    return GroupEvaluator(test_metrics=[_metric(name) for name in wanted], map_size=map_size)


def _metric(name: str) -> AnomalibMetric:
    if name in _IMAGE:
        return _IMAGE[name](fields=_SCORES, prefix="image_")
    limited = _WITH_LIMIT.fullmatch(name)
    if limited:
        return _AREAS[limited[1]](fpr_limit=float(limited[2]), prefix="pixel_", strict=False)
    return (_PIXEL | _AREAS)[name](prefix="pixel_", strict=False)
