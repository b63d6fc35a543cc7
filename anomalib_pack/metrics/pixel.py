"""Pixel metrics with the values of the usual exact ones, in a fraction of their memory and time.

Differences from Anomalib's and torchmetrics' classes:

- Scores rank as they are. torchmetrics applies a sigmoid to scores outside [0, 1], which makes large ones equal.
- A NaN among the scores is an error.
- Sums over up to 1e8 pixels are integers or float64, where the others have float32.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from anomalib.metrics import AnomalibMetric
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from anomalib_pack.defect import Defect
from anomalib_pack.metrics.roc import RocCorners, check_limit, check_ranks, roc_corners
from anomalib_pack.metrics.spro import DEFAULT_LIMIT, weigh

DEFAULT_FPR_LIMIT = 0.3  # of AUPRO, as in MVTec AD's evaluation


class _PixelMetric(Metric):
    """Pixels of all batches, and the curve that the pixel metrics are read off.

    Each batch adds 4 bytes per normal and 12 per anomalous pixel. Computing, on the CPU, takes a fixed buffer and
    several times the memory of the anomalous pixels. The states of several processes are gathered as those of any
    torchmetrics metric, which makes three copies for a while.

    Attributes:
        curve: Set by ``compute``: the corners of the curve that the value was read off.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    normal: list[Tensor] | Tensor
    anomalous: list[Tensor] | Tensor
    weights: list[Tensor] | Tensor
    curve: RocCorners

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("normal", "anomalous", "weights"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor, inside: Tensor | None = None) -> None:
        """Add maps and masks.

        Args:
            preds: Anomaly maps, shape (B, 1, H, W) or (B, H, W), of any range; compared in float32.
            target: Masks of the same size, shape (B, 1, H, W) or (B, H, W), nonzero where anomalous.
            inside: Pixels that count, Boolean, shape (H, W); None for all. An anomalous region is its part in them.

        Raises:
            ValueError: If the shapes differ, or a score is NaN.
        """
        parts = self.split(preds, target, inside)
        for states, part in zip((self.normal, self.anomalous, self.weights), parts, strict=True):
            states.append(part)

    @staticmethod
    def split(preds: Tensor, target: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Split pixels into what the curve is made of. Metrics with the same split have one curve.

        Returns:
            Scores of normal pixels, scores of anomalous ones, and how much each of these adds to the overlaps.
        """
        scores, masks = _checked(preds, target)
        normal = ~masks
        if inside is not None:
            normal, masks = normal & inside, masks & inside
        # Not by indexing, which takes several times as long.
        return (
            scores.masked_select(normal),
            scores.masked_select(masks),
            _on(1 / region_areas(masks).cpu().double(), scores.device),
        )

    def compute(self) -> Tensor:
        """Value of the metric, a scalar."""
        normal = [part.cpu() for part in ([self.normal] if isinstance(self.normal, Tensor) else self.normal)]
        anomalous, weights = dim_zero_cat(self.anomalous).cpu(), dim_zero_cat(self.weights).cpu().double()
        for count, kind in ((sum(map(len, normal)), "normal"), (len(anomalous), "anomalous")):
            if not count:
                rank_zero_warn(f"There are no {kind} pixels: pixel metrics mean nothing.")
        self.curve = roc_corners(normal, anomalous, weights)
        return torch.tensor(self.value(self.curve), device=self.device)

    @abstractmethod
    def value(self, curve: RocCorners) -> float:
        """Read the metric off the curve."""


class CountsInside:
    """Mixin for metrics with which some pixels may not count; stands before ``AnomalibMetric``."""

    def update(self, batch: Any) -> None:
        """Add a batch; ``inside``, if it has that, tells which pixels count."""
        super().update(batch, inside=getattr(batch, "inside", None))


class PixelMetric(CountsInside, AnomalibMetric, _PixelMetric):
    """Base of the metrics here: they have their curve in common, which is nearly all the work."""

    default_fields = ("anomaly_map", "gt_mask")

    def curve_of(self, batches: Callable[[], Iterable[Any]]) -> RocCorners:
        """Curve of batches that can be gone through twice, of whose normal pixels nothing is kept.

        Args:
            batches: Gives the batches, with the metric's fields, each time that it is called.
        """
        of_anomalous = [split[1:] for split in self._splits(batches)]
        anomalous, weights = (torch.cat(parts) for parts in zip(*of_anomalous, strict=True))
        return roc_corners((normal for normal, _, _ in self._splits(batches)), anomalous, weights)

    def _splits(self, batches: Callable[[], Iterable[Any]]) -> Iterator[tuple[Tensor, ...]]:
        for batch in batches():
            fields = [getattr(batch, field) for field in self.fields]
            normal, anomalous, weights = self.split(*fields, inside=getattr(batch, "inside", None))
            yield normal.cpu(), anomalous.cpu(), weights.cpu().double()

    def _set_limit(self, fpr_limit: float, default: float) -> None:
        """Set a false positive rate, which is part of the name if it is not the default."""
        check_limit(fpr_limit)
        self.fpr_limit = fpr_limit
        if fpr_limit != default:
            self.name = f"{self.name}_{fpr_limit:g}"


class AUROC(PixelMetric):
    """Area under the ROC curve of all pixels; 0 if all pixels are of one kind, as in torchmetrics.

    Args:
        fpr_limit: False positive rate, in (0, 1], up to which the area counts; it is divided by the rate. A limit below
            1 is part of the metric's name (``pixel_AUROC_0.05``).
        **kwargs: Arguments of ``AnomalibMetric``.

    Raises:
        ValueError: If ``fpr_limit`` is not in (0, 1].

    Example:
        >>> from types import SimpleNamespace
        >>> maps = torch.tensor([[[0.1, 0.3, 0.2, 0.9]]])
        >>> batch = SimpleNamespace(anomaly_map=maps, gt_mask=torch.tensor([[[False, False, True, True]]]))
        >>> metric = AUROC()
        >>> metric.update(batch)
        >>> metric.compute()
        tensor(0.7500)
    """

    def __init__(self, fpr_limit: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_limit(fpr_limit, 1.0)

    def value(self, curve: RocCorners) -> float:
        """Read the metric off the curve."""
        return curve.auroc(self.fpr_limit)


class AP(PixelMetric):
    """Average precision of all pixels, as scikit-learn's ``average_precision_score``."""

    def value(self, curve: RocCorners) -> float:
        """Read the metric off the curve."""
        return curve.average_precision()


class F1Max(PixelMetric):
    """Largest F1 score that a threshold on all pixels reaches."""

    def value(self, curve: RocCorners) -> float:
        """Read the metric off the curve."""
        return curve.f1_max()


class AUPRO(PixelMetric):
    """Area under the curve of mean region overlap, normalised as in MVTec AD's evaluation.

    Regions are the connected components of a mask, with diagonal neighbours, as in Anomalib. A limit other than the
    default is part of the metric's name (``pixel_AUPRO_0.05``), so that both fit into one evaluator.

    Args:
        fpr_limit: False positive rate, in (0, 1], up to which the area counts.
        **kwargs: Arguments of ``AnomalibMetric``.

    Raises:
        ValueError: If ``fpr_limit`` is not in (0, 1].
    """

    def __init__(self, fpr_limit: float = DEFAULT_FPR_LIMIT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_limit(fpr_limit, DEFAULT_FPR_LIMIT)

    def value(self, curve: RocCorners) -> float:
        """Read the metric off the curve."""
        return curve.aupro(self.fpr_limit)


class SPRO(PixelMetric):
    """AUC-sPRO of MVTec LOCO AD: area under the curve of mean saturated overlap with defects, normalised.

    The saturated overlap with a defect is the share of its saturation area that is found, and 1 from there on.
    Normal are the pixels that are free of all defects. Values of all limits, and of kinds of defects, are in
    :mod:`anomalib_pack.metrics.spro`.

    Args:
        fpr_limit: False positive rate, in (0, 1], up to which the area counts; it is divided by the rate. A limit other
            than the default is part of the metric's name (``pixel_SPRO_0.3``).
        **kwargs: Arguments of ``AnomalibMetric``.

    Raises:
        ValueError: If ``fpr_limit`` is not in (0, 1].

    Example:
        >>> from types import SimpleNamespace
        >>> mask = torch.tensor([[False, True, True, True, False]])
        >>> maps = torch.tensor([[[0.1, 0.3, 0.2, 0.9, 0.4]]])
        >>> batch = SimpleNamespace(anomaly_map=maps, defects=[[Defect("hole", mask, saturation_area=1)]])
        >>> metric = SPRO()
        >>> metric.update(batch)
        >>> metric.compute()
        tensor(1.)
    """

    default_fields = ("anomaly_map", "defects")

    def __init__(self, fpr_limit: float = DEFAULT_LIMIT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_limit(fpr_limit, DEFAULT_LIMIT)

    @staticmethod
    def split(
        preds: Tensor, target: Sequence[Sequence[Defect]], inside: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split pixels into what the curve is made of.

        Args:
            preds: Anomaly maps of the size of the image files, shape (B, 1, H, W) or (B, H, W), of any range.
            target: Defects of each image.
            inside: Pixels that count, Boolean, shape (H, W); None for all.

        Returns:
            Scores of normal pixels, scores of those that are counted for defects, and how much each of these adds.

        Raises:
            ValueError: If the size of a map is not that of its defects, or a score is NaN.
        """
        scores = _checked_scores(preds)
        parts = [weigh(image, found, inside=inside) for image, found in zip(scores, target, strict=True)]
        empty = torch.empty(0)
        normal, counted, weights = map(torch.cat, zip((empty, empty, empty.double()), *parts, strict=True))
        return normal.to(scores.device), counted.to(scores.device), _on(weights, scores.device)

    def value(self, curve: RocCorners) -> float:
        """Read the metric off the curve."""
        return curve.aupro(self.fpr_limit)


class _AUPROPerImage(Metric):
    """One value for each image with an anomaly. Maps and masks are not kept; each is sorted on the CPU."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    values: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor, inside: Tensor | None = None) -> None:
        """Add maps and masks, as those of :class:`AUPRO`.

        Raises:
            ValueError: If the shapes differ, or a score is NaN.
        """
        scores, masks = (part.cpu() for part in _checked(preds, target))
        counted = torch.ones(masks.shape[1:], dtype=torch.bool) if inside is None else inside.cpu()
        found = [
            _curve(image, mask, counted).aupro(DEFAULT_FPR_LIMIT)
            for image, mask in zip(scores, masks, strict=True)
            if (mask & counted).any() and (~mask & counted).any()
        ]
        self.values.append(torch.tensor(found, device=preds.device))

    def compute(self) -> Tensor:
        """Mean over the images, a scalar."""
        values = dim_zero_cat(self.values)
        if not len(values):
            rank_zero_warn("There are no images with normal and anomalous pixels: AUPRO per image means nothing.")
            return torch.tensor(0.0, device=self.device)
        return values.mean()


class AUPROPerImage(CountsInside, AnomalibMetric, _AUPROPerImage):
    """Mean of the AUPROs of single images, called ``AUPRO_per_image``.

    Each image has a curve of its own: false positive rate and mean overlap count its own pixels and regions. So a
    threshold that suits one image need not suit another, and an image with many regions weighs as much as one with a
    few. Zhang et al. evaluate AeBAD in this way; :class:`AUPRO` has one curve for all images.

    Regions are those of :class:`AUPRO`, the limit of the false positive rate is its default. Images without anomalous
    pixels, or without normal ones, have no curve and are left out; without any that has one, the value is 0, with a
    warning.

    Args:
        prefix: Start of the metric's name, e.g. ``"pixel_"``.
        **kwargs: Other arguments of ``AnomalibMetric``.

    Example:
        >>> from types import SimpleNamespace
        >>> maps = torch.tensor([[[0.1, 0.2, 0.9]], [[0.1, 0.2, 0.0]], [[0.7, 0.8, 0.9]]])
        >>> batch = SimpleNamespace(anomaly_map=maps, gt_mask=torch.tensor([[[0, 0, 1]], [[0, 0, 1]], [[0, 0, 0]]]))
        >>> metric = AUPROPerImage(prefix="pixel_")
        >>> metric.update(batch)
        >>> metric.name, metric.compute()
        ('pixel_AUPRO_per_image', tensor(0.5000))
    """

    default_fields = ("anomaly_map", "gt_mask")

    def __init__(self, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(prefix=prefix, **kwargs)
        self.name = f"{prefix}AUPRO_per_image"


def _checked(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Float maps and boolean masks of shape (B, H, W).

    Raises:
        ValueError: If the shapes differ, or a score is NaN.
    """
    scores, is_anomalous = _checked_scores(maps), _without_channel(masks).bool()
    if scores.shape != is_anomalous.shape or scores.ndim != 3:
        msg = f"Maps and masks must have one shape (B, H, W), got {tuple(maps.shape)} and {tuple(masks.shape)}."
        raise ValueError(msg)
    return scores, is_anomalous


def _checked_scores(maps: Tensor) -> Tensor:
    scores = _without_channel(maps).float()
    check_ranks(scores)
    return scores


def _curve(image: Tensor, mask: Tensor, inside: Tensor) -> RocCorners:
    """Curve of a single image: map, mask and the pixels that count, of shape (H, W) on the CPU."""
    return roc_corners(*PixelMetric.split(image.unsqueeze(0), mask.unsqueeze(0), inside))


def region_areas(masks: Tensor) -> Tensor:
    """Number of pixels of the region that each anomalous pixel belongs to.

    Args:
        masks: Boolean masks of shape (B, H, W) with P anomalous pixels.

    Returns:
        Shape (P,), float32 (exact up to 2^24 pixels per region), in the order of ``masks.nonzero()``.
    """
    areas = [torch.empty(0)]
    for mask in masks[masks.flatten(1).any(dim=1)].cpu().numpy():
        # What Anomalib calls too, but its renumbering over the batch takes 30 times as long, 1000 times for speckles.
        _, labels = cv2.connectedComponents(mask.astype(np.uint8))
        regions = labels[mask]
        areas.append(torch.from_numpy(np.bincount(regions)[regions]).float())
    return torch.cat(areas).to(masks.device)


def _on(weights: Tensor, device: torch.device) -> Tensor:
    """Weights on a device; MPS has no float64."""
    return weights.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _without_channel(values: Tensor) -> Tensor:
    """Shape (B, 1, H, W) to (B, H, W); others stay."""
    return values.squeeze(1) if values.ndim == 4 else values
