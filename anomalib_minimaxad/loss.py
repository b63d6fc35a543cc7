"""Losses of MiniMaxAD (Wang et al.), Eqs. 1 and 6 to 8.

Status: exact to the published code; the two that it lacks (Eqs. 6 and 8) follow the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.region import WHOLE_IMAGE, WholeImage

from .anomaly_map import cosine_distance
from .torch_model import Pyramids

# Pixels that a location of the finest scale stands for, in maps that grow to the image's size by copying values.
PIXELS = 16  # stride 4 in both directions


def global_loss(encoded: Sequence[torch.Tensor], decoded: Sequence[torch.Tensor]) -> torch.Tensor:
    """Cosine distance of whole feature maps, averaged over the batch, L_global.

    Args:
        encoded: f_E, (B, C_k, h_k, w_k) for each scale.
        decoded: f_D, likewise.
    """
    similarities = [
        F.cosine_similarity(theirs.float().flatten(1), ours.float().flatten(1), dim=1)  # F of Eq. 1; (B,)
        for theirs, ours in zip(encoded, decoded, strict=True)
    ]
    return (1 - torch.stack(similarities)).sum(dim=0).mean()  # Eq. 1


def training_map(encoded: Sequence[torch.Tensor], decoded: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the distances of all scales on the grid of the finest (Eqs. 2 and 3).

    The published losses take the map at the size of the image, where each value stands 16 times, because it is resized
    to the nearest value. The other functions of this file count each value 16 times instead.

    Args:
        encoded: f_E, (B, C_k, h_k, w_k) for each scale, the finest first.
        decoded: f_D, likewise.

    Returns:
        S, (B, h_1, w_1), at least 0 (up to rounding).
    """
    distances = [cosine_distance(*pair) for pair in zip(encoded, decoded, strict=True)]
    grid = distances[0].shape[1:]
    resized = [F.interpolate(maps.unsqueeze(1), size=grid, mode="nearest") for maps in distances]
    return torch.cat(resized, dim=1).sum(dim=1)  # Eq. 3


def pixel_quantile(values: torch.Tensor, probability: float) -> torch.Tensor:
    """Quantile, linearly interpolated as by ``torch.quantile``, of values of which each stands for 16 pixels.

    For any number of values, whereas ``torch.quantile`` refuses more than 2^24.

    Args:
        values: Any shape.
        probability: From 0 to 1.

    Returns:
        Scalar tensor without gradient.
    """
    ordered = values.detach().flatten().sort().values
    rank = probability * (PIXELS * len(ordered) - 1)
    below = floor(rank)
    above = min(below + 1, PIXELS * len(ordered) - 1)
    return torch.lerp(ordered[below // PIXELS], ordered[above // PIXELS], rank - below)


def mean_above(values: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Mean of the values at or above a threshold, E of Eqs. 7 and 8: the others get no gradient."""
    kept = values >= threshold
    return (values * kept).sum() / kept.sum()


def local_loss(maps: torch.Tensor) -> torch.Tensor:
    """L_local of a map S, any shape."""
    return maps.square().mean()  # Eq. 6


def hard_mining_loss(maps: torch.Tensor, p_lim: float) -> torch.Tensor:
    """L_local-hm of a map S: a fixed share 1 - p_lim counts."""
    squared = maps.square()
    return mean_above(squared, pixel_quantile(squared, p_lim))  # Eq. 8


def contraction_threshold(maps: torch.Tensor, p_hard: float, p_lim: float) -> torch.Tensor:
    """Threshold of Eq. 7, which adapts to how well features are reconstructed.

    Args:
        maps: S, any shape.
        p_hard: Primary mining factor, 0 to 1.
        p_lim: Mining factor that limits it from below, at least 0 and below 1.

    Returns:
        Scalar tensor without gradient.
    """
    maps = maps.detach()
    squared = maps.square()
    pixels = PIXELS * maps.numel()
    variance = maps.var(correction=0) * pixels / (pixels - 1)  # sigma^2, unbiased over the pixels
    adaptive = pixel_quantile(maps, p_hard) - variance  # alpha - sigma^2: a quantile of S, compared with S^2
    limit = pixel_quantile(squared, p_lim) - variance  # beta - sigma^2
    enough = PIXELS * (squared >= adaptive).sum() >= pixels * (1 - p_lim)  # A >= B
    return torch.where(enough, adaptive, limit)


def adaptive_contraction_loss(maps: torch.Tensor, p_hard: float, p_lim: float) -> torch.Tensor:
    """L_adc of a map S."""
    return mean_above(maps.square(), contraction_threshold(maps, p_hard, p_lim))  # Eq. 7


class MiniMaxAdLoss(nn.Module):
    """One of the losses of Table 4.

    Args:
        kind: ``"adc"`` (Eq. 7), ``"global"`` (Eq. 1), ``"local"`` (Eq. 6) or ``"local_hm"`` (Eq. 8).
        p_hard: Primary mining factor of ``"adc"`` (Table 11).
        p_lim: Mining factor of ``"adc"`` and ``"local_hm"`` (Tables 10 and 11).
    """

    def __init__(self, kind: str = "adc", p_hard: float = 0.9999, p_lim: float = 0.9995) -> None:
        super().__init__()
        self.kind = kind
        self.p_hard = p_hard
        self.p_lim = p_lim

    def forward(self, pyramids: Pyramids, region: WholeImage = WHOLE_IMAGE) -> torch.Tensor:
        """Compute the loss, a scalar, from the networks' output in training mode, at the positions of a region."""
        if self.kind == "global":
            return global_loss(*([region.take(maps) for maps in features] for features in pyramids))
        maps = region.take(training_map(*pyramids))
        if self.kind == "local":
            return local_loss(maps)
        if self.kind == "local_hm":
            return hard_mining_loss(maps, self.p_lim)
        return adaptive_contraction_loss(maps, self.p_hard, self.p_lim)
