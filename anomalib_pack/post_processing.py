"""Post-processing that keeps the ranking of the scores, with thresholds from normal images where need be.

Anomalib computes metrics on the scores that its ``PostProcessor`` has normalised. That class clamps them to [0, 1],
which makes all scores beyond equal. With normal validation images only, everything above the largest of their scores
becomes 1.
"""

import logging
import math
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from anomalib_pack.metrics.samples import copied, select, unpadded_count
from anomalib_pack.passes import validation_loader
from anomalib_pack.quantiles import quantiles
from anomalib_pack.region import region_of

logger = logging.getLogger(__name__)

# Normalised scores move by this many units per range of the validation scores, before squashing. Ours: normal
# validation scores then spread from 0.1 (dark blue in Anomalib's heat maps) to 0.5, and the same range again above
# the threshold reaches 0.9 (dark red).
UNITS_PER_RANGE = 4.0

CHUNK = 2**22  # Scores looked up at a time: their 8-byte positions then need 32 MB.


def normalize(scores: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
    """Map scores into (0, 1) in their order, the threshold to exactly 0.5.

    It is (1 + z / (1 + abs(z))) / 2 with z = (scores - threshold) / scale. Each step of this form is monotone in
    floating point too, so rounding never swaps two scores. In float32 the result rounds to 1 from z = 1.7e7.

    Args:
        scores: Raw scores of any shape.
        threshold: Raw score that becomes 0.5; a scalar.
        scale: Difference to the threshold that becomes 0.25 or 0.75; a positive scalar.
    """
    z = (scores.float() - threshold) / scale
    tail = 0.5 / (1 + z.abs())
    return torch.where(z < 0, tail, 1 - tail)


def denormalize(normalized: float, threshold: Tensor, scale: Tensor) -> Tensor:
    """Inverse of :func:`normalize` for a number in [0, 1]; 0 and 1 give minus and plus infinity."""
    if normalized == 0.5:
        return threshold  # Exact even where the scale is unknown.
    tail = min(normalized, 1 - normalized)
    z = 0.5 / tail - 1 if tail > 0 else math.inf
    return threshold + math.copysign(z, normalized - 0.5) * scale


def f1_adaptive_threshold(scores: Tensor, is_anomalous: Tensor) -> Tensor:
    """Threshold t for which ``scores >= t`` has the largest F1 score; the lowest of several.

    It is Anomalib's threshold in a fifth of the memory, which counts with millions of pixels. The best threshold is
    the score of an anomaly: raising one to the next anomaly's score loses false positives only. So anomalies alone are
    sorted, and the others counted between them.

    Args:
        scores: Shape (N,).
        is_anomalous: Boolean mask of shape (N,), at least one of them True.
    """
    candidates, counts = scores[is_anomalous].unique(return_counts=True)  # ascending
    histogram = torch.zeros(len(candidates) + 1, dtype=torch.long, device=scores.device)
    for part, anomalous in zip(scores.split(CHUNK), is_anomalous.split(CHUNK), strict=True):
        below = torch.bucketize(part[~anomalous], candidates, right=True)  # number of candidates <= score
        histogram += torch.bincount(below, minlength=len(histogram))
    true_positives = counts.flip(0).cumsum(0).flip(0)
    false_positives = histogram.flip(0).cumsum(0).flip(0)[1:]
    tp, fp = true_positives.cpu().double(), false_positives.cpu()  # MPS has no float64
    f1 = 2 * tp / (tp + fp + tp[0])
    return candidates[f1.argmax()]


class NormalQuantileThreshold(F1AdaptiveThreshold):
    """F1-adaptive threshold that is a quantile of the scores where all of them are normal.

    Args:
        quantile: Probability in [0, 1].
        **kwargs: Arguments of ``F1AdaptiveThreshold``.
    """

    def __init__(self, quantile: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quantile = quantile

    def compute(self) -> Tensor:
        """Threshold, as a scalar tensor; NaN without scores."""
        scores, is_anomalous = dim_zero_cat(self.preds), dim_zero_cat(self.target).bool()
        if scores.numel() == 0:
            return torch.tensor(float("nan"))
        if is_anomalous.any():
            return f1_adaptive_threshold(scores, is_anomalous)
        return quantiles(scores, [self.quantile])[0]


class RankPreservingPostProcessor(PostProcessor):
    """Post-processor whose normalised scores rank like the raw scores, for any Anomalib model.

    - Scores are mapped to (0, 1) by a strictly increasing function, the threshold to 0.5. Nothing is clamped, so
      ranking metrics (AUROC, AUPR, AUPRO) are those of the raw scores.
    - Thresholds are F1-adaptive where the validation set has anomalies, and else quantiles of its normal scores.
      Without masks the pixel threshold is a quantile of the pixels of normal images.
    - Labels are raw scores ``>=`` the threshold, the rule under which the F1-adaptive threshold is chosen.
    - Where a model of the pack has a region, the pixels outside count for nothing.

    Without a validation run scores stay as they are and all labels are normal, with a warning.

    Args:
        enable_normalization: Normalise the scores.
        enable_thresholding: Choose thresholds and set labels and masks.
        enable_threshold_matching: Use the image threshold for pixels, or the reverse, where only one exists.
        image_sensitivity: In [0, 1]; images whose normalised score is at least 1 - sensitivity are anomalous.
        pixel_sensitivity: The same for pixels.
        image_quantile: In [0, 1]; share of the normal validation images below the threshold.
        pixel_quantile: The same for pixels.

    Raises:
        ValueError: If a sensitivity or quantile is outside [0, 1], or a sensitivity is given without normalisation; in
            validation, if scores are not finite.

    Example:
        >>> from anomalib.models import Patchcore
        >>> from anomalib_pack.post_processing import RankPreservingPostProcessor
        >>> model = Patchcore(pre_trained=False, post_processor=RankPreservingPostProcessor(image_quantile=0.95))
    """

    def __init__(
        self,
        enable_normalization: bool = True,
        enable_thresholding: bool = True,
        enable_threshold_matching: bool = True,
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
        image_quantile: float = 0.99,
        pixel_quantile: float = 0.99,
    ) -> None:
        probabilities = {
            "image_sensitivity": image_sensitivity,
            "pixel_sensitivity": pixel_sensitivity,
            "image_quantile": image_quantile,
            "pixel_quantile": pixel_quantile,
        }
        for name, value in probabilities.items():
            if not 0 <= value <= 1:
                msg = f"{name} must be in [0, 1], got {value}."
                raise ValueError(msg)
        if not enable_normalization and (image_sensitivity, pixel_sensitivity) != (0.5, 0.5):
            msg = "Sensitivities other than 0.5 are thresholds on normalised scores and need enable_normalization=True."
            raise ValueError(msg)
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            enable_threshold_matching=enable_threshold_matching,
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
        )
        self._image_threshold_metric = NormalQuantileThreshold(
            image_quantile, fields=["pred_score", "gt_label"], strict=False
        )
        self._pixel_threshold_metric = NormalQuantileThreshold(
            pixel_quantile, fields=["anomaly_map", "gt_mask"], strict=False
        )

    @property
    def image_quantile(self) -> float:
        """Share of the normal validation images below the threshold."""
        return float(self._image_threshold_metric.quantile)

    @image_quantile.setter
    def image_quantile(self, value: float) -> None:
        self._image_threshold_metric.quantile = value

    @property
    def pixel_quantile(self) -> float:
        """Share of the normal validation pixels below the threshold."""
        return float(self._pixel_threshold_metric.quantile)

    @pixel_quantile.setter
    def pixel_quantile(self, value: float) -> None:
        self._pixel_threshold_metric.quantile = value

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "image_quantile", "pixel_quantile")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the scores of a batch.

        Raises:
            ValueError: If a score is not finite.
        """
        if trainer.sanity_checking:  # An untrained model's scores mean nothing and may well be NaN.
            return
        count = unpadded_count(validation_loader(trainer), batch_idx, dataloader_idx)
        if count == 0:
            return
        fields = ("pred_score", "anomaly_map", "gt_label", "gt_mask", "image_path")
        samples = copied(select(outputs, fields, slice(count)))
        check_finite(samples)
        samples = region_of(pl_module).part_of(samples)
        super().on_validation_batch_end(trainer, pl_module, samples, batch, batch_idx, dataloader_idx)
        if self.enable_thresholding and samples.gt_mask is None and samples.gt_label is not None:
            self._update_with_normal_pixels(samples)

    def _update_with_normal_pixels(self, samples: SimpleNamespace) -> None:
        """Collect the pixels of normal images, which are normal without a mask saying so."""
        normal = select(samples, ("anomaly_map",), ~samples.gt_label.bool().cpu())
        if normal.anomaly_map is not None:
            normal.gt_mask = torch.zeros_like(normal.anomaly_map, dtype=torch.bool)
            self._pixel_threshold_metric.update(normal)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if labels cannot be told."""
        del trainer, pl_module
        self._warn_without_threshold()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if labels cannot be told."""
        del trainer, pl_module
        self._warn_without_threshold()

    def _warn_without_threshold(self) -> None:
        if self.enable_thresholding and self.image_threshold.isnan() and self.image_min.isnan():
            logger.warning("No validation run has set a threshold: all images will be labelled normal.")

    def post_process_batch(self, batch: Batch) -> None:
        """Set labels and masks from the raw scores, then normalise the scores, in place."""
        if self.enable_thresholding:
            self.threshold_batch(batch)
        if self.enable_normalization:
            self.normalize_batch(batch)

    def threshold_batch(self, batch: Batch) -> None:
        """Set the labels and masks that the batch does not have yet, from raw scores."""
        if batch.pred_label is None and batch.pred_score is not None:
            batch.pred_label = batch.pred_score.float() >= self.raw_image_threshold
        if batch.pred_mask is None and batch.anomaly_map is not None:
            batch.pred_mask = batch.anomaly_map.float() >= self.raw_pixel_threshold

    def normalize_batch(self, batch: Batch) -> None:
        """Normalise raw scores and anomaly maps."""
        if batch.pred_score is not None:
            batch.pred_score = self._normalized_image_score(batch.pred_score)
        if batch.anomaly_map is not None:
            batch.anomaly_map = self._normalized_map(batch.anomaly_map)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Labels, masks and normalised scores; a missing image score is the maximum of the map.

        Raises:
            ValueError: If there is neither a score nor a map.
        """
        score, anomaly_map = predictions.pred_score, predictions.anomaly_map
        if score is None and anomaly_map is None:
            msg = "At least one of pred_score or anomaly_map must be provided."
            raise ValueError(msg)
        if score is None:
            score = anomaly_map.amax(dim=(-2, -1))
        label = mask = None
        if self.enable_thresholding:
            label = score.float() >= self.raw_image_threshold
            mask = None if anomaly_map is None else anomaly_map.float() >= self.raw_pixel_threshold
        if self.enable_normalization:
            score = self._normalized_image_score(score)
            anomaly_map = None if anomaly_map is None else self._normalized_map(anomaly_map)
        return InferenceBatch(pred_label=label, pred_score=score, pred_mask=mask, anomaly_map=anomaly_map)

    @property
    def raw_image_threshold(self) -> Tensor:
        """Raw score from which on an image is anomalous, with the sensitivity in it; scalar, NaN if unknown."""
        return denormalize(1 - self.image_sensitivity, *self._image_statistics())

    @property
    def raw_pixel_threshold(self) -> Tensor:
        """Raw score from which on a pixel is anomalous, with the sensitivity in it; scalar, NaN if unknown."""
        return denormalize(1 - self.pixel_sensitivity, *self._pixel_statistics())

    def _normalized_image_score(self, score: Tensor) -> Tensor:
        return _normalize_if_known(score, *self._image_statistics())

    def _normalized_map(self, anomaly_map: Tensor) -> Tensor:
        return _normalize_if_known(anomaly_map, *self._pixel_statistics())

    def _image_statistics(self) -> tuple[Tensor, Tensor]:
        return threshold_and_scale(self.image_threshold, self.image_min, self.image_max)

    def _pixel_statistics(self) -> tuple[Tensor, Tensor]:
        return threshold_and_scale(self.pixel_threshold, self.pixel_min, self.pixel_max)


def check_finite(samples: SimpleNamespace) -> None:
    """Raise a ValueError that names the first image with a NaN or infinite score."""
    for field in ("pred_score", "anomaly_map"):
        scores = getattr(samples, field)
        if scores is None or scores.isfinite().all():
            continue
        broken = ~scores.isfinite().reshape(len(scores), -1).all(dim=1)  # (B,)
        index = int(broken.nonzero()[0])
        image = samples.image_path[index] if samples.image_path is not None else f"number {index} of the batch"
        msg = f"Scores must be finite, but {field} of image {image} is not."
        raise ValueError(msg)


def threshold_and_scale(threshold: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Threshold, or as in the base class the middle of the range where there is none, and scale of normalisation."""
    value_range = high - low
    scale = torch.where(value_range == 0, torch.ones_like(value_range), value_range / UNITS_PER_RANGE)
    return torch.where(threshold.isnan(), (high + low) / 2, threshold), scale


def _normalize_if_known(scores: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
    # torch.where and no branch on the value, because exported models take this path too.
    return torch.where((threshold + scale).isnan(), scores.float(), normalize(scores, threshold, scale))
