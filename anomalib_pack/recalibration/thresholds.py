"""Thresholds and normalisation of a post-processor, from the raw scores of images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from anomalib.post_processing import PostProcessor
from torch import Tensor, nn

from anomalib_pack.checks import require
from anomalib_pack.metadata import normalizations
from anomalib_pack.post_processing import RankPreservingPostProcessor, f1_adaptive_threshold
from anomalib_pack.quantiles import quantiles

from .measuring import Measured

FALSE_ALARMS = 0.01  # share of normal images, and of their pixels, where nothing else is asked for


@dataclass(frozen=True)
class Goal:
    """What the threshold of images is to come to. With neither, the best F1 score, or without anomalies 1 % alarms.

    Args:
        false_alarms: Share of the normal images that is to be anomalous.
        threshold: The raw score itself.

    Raises:
        ValueError: If both are given, or one is impossible.
    """

    false_alarms: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        share, raw = self.false_alarms, self.threshold
        require("false_alarms", share, share is None or 0 < share < 1, "above 0 and below 1")
        require("threshold", raw, raw is None or math.isfinite(raw), "a finite number")
        require("threshold", raw, raw is None or share is None, "None with false_alarms")

    def share(self, *, anomalies: bool) -> float | None:
        """Share of the normal images that is to be anomalous; ``None`` if the threshold is chosen otherwise."""
        if self.threshold is not None or (self.false_alarms is None and anomalies):
            return None
        return FALSE_ALARMS if self.false_alarms is None else self.false_alarms


def check_post_processor(post_processor: nn.Module | None) -> None:
    """Check that thresholds have an effect, and that it is known how they have it.

    Raises:
        ValueError: If not.
    """
    kinds = (PostProcessor, RankPreservingPostProcessor)
    if type(post_processor) not in kinds:
        found = "none" if post_processor is None else type(post_processor).__name__
        msg = f"The post-processor must be {' or '.join(kind.__name__ for kind in kinds)}, got {found}."
        raise ValueError(msg)
    if not post_processor.enable_thresholding:
        msg = "The post-processor sets no labels: enable_thresholding is False in the checkpoint."
        raise ValueError(msg)
    if type(post_processor) is PostProcessor and not post_processor.enable_normalization:
        msg = (
            "Anomalib's PostProcessor compares scores with 1 - sensitivity where enable_normalization is False, and "
            "with no threshold."
        )
        raise ValueError(msg)
    for kind in ("image", "pixel"):
        sensitivity = getattr(post_processor, f"{kind}_sensitivity")
        allowed = "above 0 and below 1 in the checkpoint: otherwise all labels are equal, whatever the threshold"
        require(f"{kind}_sensitivity", sensitivity, 0 < sensitivity < 1, allowed)


def recalibrate(
    post_processor: PostProcessor, normal: Measured, anomalous: Measured | None = None, *, goal: Goal
) -> None:
    """Set thresholds and normalisation anew.

    The range of all scores is that of normalisation, as in a validation. The pixels of the normal images tell the pixel
    threshold, because there are no masks: the share of false alarms that is asked for, otherwise the post-processor's
    own quantile, is above it.

    Args:
        post_processor: One that :func:`check_post_processor` has checked.
        normal: Scores of normal images.
        anomalous: Scores of anomalous ones.
        goal: What the image threshold is to come to.
    """
    both = [normal] if anomalous is None else [normal, anomalous]
    scores = torch.cat([each.scores for each in both])
    _set(post_processor, "image", _image_threshold(normal, anomalous, goal), torch.stack(scores.aminmax()))
    if normal.pixels is None:
        return
    ranges = torch.stack([each.pixel_range for each in both])
    quantile = getattr(post_processor, "pixel_quantile", 1 - FALSE_ALARMS)
    if goal.false_alarms is not None:
        quantile = 1 - goal.false_alarms
    [threshold] = quantiles(normal.pixels, [quantile])
    _set(post_processor, "pixel", threshold, torch.stack([ranges[:, 0].min(), ranges[:, 1].max()]))


def raw_threshold(post_processor: PostProcessor, kind: Literal["image", "pixel"]) -> float | None:
    """Raw score from which on an image or pixel is anomalous, with the sensitivity in it; ``None`` if it is unknown."""
    of_images, of_pixels = normalizations(post_processor)
    return (of_images if kind == "image" else of_pixels).raw_threshold


def _image_threshold(normal: Measured, anomalous: Measured | None, goal: Goal) -> Tensor | float:
    if goal.threshold is not None:
        return goal.threshold
    share = goal.share(anomalies=anomalous is not None)
    if share is not None:
        return quantiles(normal.scores, [1 - share])[0]
    return best_f1(normal.scores, anomalous.scores)


def best_f1(normal: Tensor, anomalous: Tensor) -> Tensor:
    """Threshold with the best F1 score, midway between the lowest score above it and the next one.

    Validations take that lowest score itself, which Anomalib's post-processor then calls normal, and which is another
    after rounding, as in a batch of another size.

    Example:
        >>> best_f1(torch.tensor([1.0, 4.0]), torch.tensor([6.0, 8.0]))
        tensor(5.)
    """
    scores = torch.cat([normal, anomalous])
    best = f1_adaptive_threshold(scores, torch.arange(len(scores)) >= len(normal))
    lower = scores[scores < best]
    return (best + lower.max()) / 2 if len(lower) > 0 else best - best.abs() - 1


def _set(
    post_processor: PostProcessor, kind: Literal["image", "pixel"], threshold: Tensor | float, value_range: Tensor
) -> None:
    """Set a threshold and the range of scores, so that labels change at the threshold whatever the sensitivity."""
    if post_processor.enable_normalization:
        for name, value in zip(("min", "max"), value_range, strict=True):
            getattr(post_processor, f"{kind}_{name}").copy_(value)
    buffer = getattr(post_processor, f"_{kind}_threshold")
    buffer.fill_(threshold)
    buffer -= raw_threshold(post_processor, kind) - float(buffer)  # what the sensitivity adds
