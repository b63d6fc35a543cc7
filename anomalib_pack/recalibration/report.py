"""What a recalibration does to misses and false alarms."""

from __future__ import annotations

import math
from collections.abc import Iterator

from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from torch import Tensor

from anomalib_pack.tables import aligned

from .measuring import Measured
from .thresholds import Goal, raw_threshold

Column = dict[str, str]


def column(post_processor: PostProcessor, normal: Measured, anomalous: Measured | None = None) -> Column:
    """What the post-processor makes of the images now, by the name of the row."""
    alarms = _labels(post_processor, normal)
    rows = {
        "image threshold": _number(raw_threshold(post_processor, "image")),
        "false alarms": _count(alarms),
    }
    if anomalous is not None:
        rows["misses"] = _count(~_labels(post_processor, anomalous))
    threshold = raw_threshold(post_processor, "pixel")
    if normal.pixels is not None:
        rows["pixel threshold"] = _number(threshold)
        share = None if threshold is None else (normal.pixels >= threshold).float().mean()
        rows["false pixels"] = "unknown" if share is None else f"{float(share):.2%}"
    return rows


def as_text(before: Column, after: Column, goal: Goal, normal: Measured, anomalous: Measured | None = None) -> str:
    """The table, and what it is worth."""
    table = aligned([("", "before", "after"), *((name, before[name], after[name]) for name in before)])
    count = f"{len(normal.scores)} normal" + ("" if anomalous is None else f" and {len(anomalous.scores)} anomalous")
    note = (
        f"Raw scores. Counted on the {count} images that the thresholds come from: on others there are more mistakes. "
        "False pixels are those of the normal images."
    )
    return "\n".join([*_warnings(goal, normal, anomalous), *table, "", note])


def _warnings(goal: Goal, normal: Measured, anomalous: Measured | None) -> Iterator[str]:
    share = goal.share(anomalies=anomalous is not None)
    if share is not None and len(normal.scores) * share < 1:
        yield (
            f"WARNING  {len(normal.scores)} normal images cannot resolve {100 * share:g} % of false alarms, which "
            f"takes at least {math.ceil(1 / share)}: the threshold lies just below their highest score."
        )


def _labels(post_processor: PostProcessor, images: Measured) -> Tensor:
    """Which images are anomalous, (N,), as the post-processor itself says."""
    return post_processor(
        InferenceBatch(pred_score=images.scores.to(post_processor.image_min.device))
    ).pred_label.bool()


def _count(which: Tensor) -> str:
    return f"{int(which.sum())} of {len(which)} ({float(which.float().mean()):.1%})"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"
