"""From which score on an image is anomalous, by any post-processor of Anomalib's."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from anomalib.post_processing import PostProcessor

from anomalib_pack.metadata import stock_raw_threshold
from anomalib_pack.post_processing import RankPreservingPostProcessor, threshold_and_scale


class Thresholds(NamedTuple):
    """Thresholds of images, with the sensitivity in them; NaN if they are unknown.

    Attributes:
        raw: Of the score as the model gives it.
        normalized: Of the score that the post-processor makes of it.
    """

    raw: float
    normalized: float


def image_thresholds(post_processor: Any) -> Thresholds:
    """Thresholds of a post-processor.

    The pack's calls a score that equals the threshold anomalous, Anomalib's own does not.
    """
    if not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
        return Thresholds(math.nan, math.nan)
    normalized = float(post_processor.normalized_image_threshold)
    threshold, low, high = post_processor.image_threshold, post_processor.image_min, post_processor.image_max
    is_normalizing = post_processor.enable_normalization and not (high - low).isnan()
    if isinstance(post_processor, RankPreservingPostProcessor):
        raw = float(post_processor.raw_image_threshold)
        return Thresholds(raw, normalized if is_normalizing else raw)
    if not is_normalizing:  # the threshold for normalised scores then meets raw ones
        return Thresholds(normalized, normalized)
    center, _ = threshold_and_scale(threshold, low, high)
    return Thresholds(float(stock_raw_threshold(center, high - low, normalized)), normalized)
