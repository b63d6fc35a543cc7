"""Anomaly maps of ULSAD (Patra & Ben Taieb, TMLR 2024), Eqs. 2, 7 and 8 and Sec. 3.5.

Status: exact to the published code; differences from the paper's text are marked below.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.blur import gaussian_blur

BLUR_SIGMA = 4.0  # published code; the paper does not smooth its maps
BLUR_WIDTH = 33


def feature_distance(prediction: torch.Tensor, target: torch.Tensor, weight: float) -> torch.Tensor:
    """Distance of two feature maps in magnitude and direction: l_v + weight * l_d, Eq. 2, for Eqs. 1 and 5 to 8.

    Args:
        prediction: Features (B, C, h, w).
        target: Features (B, C, h, w).
        weight: lambda_l or lambda_g, at least 0.

    Returns:
        One distance for each location, (B, h, w), at least 0 up to rounding.

    Example:
        >>> ones = torch.ones(1, 2, 1, 1)
        >>> feature_distance(ones, 3 * ones, weight=0.5)
        tensor([[[4.]]])
    """
    # Differs from the paper: Eq. 2 sums the squared difference over the channels, the published code averages it, and
    # lambda = 0.5 belongs to that scale.
    prediction, target = prediction.float(), target.float()  # half precision would merge scores
    magnitude = (prediction - target).square().mean(dim=1)  # (B, C, h, w) -> (B, h, w)
    direction = 1 - F.cosine_similarity(prediction, target, dim=1)
    return magnitude + weight * direction


def smooth_map(distance: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bring a low-resolution map to the size of the image and blur it.

    Args:
        distance: Map of one branch, (B, h, w).
        size: (H, W) of the image, each at least 17 (the blur reflects 16 pixels at the border).

    Returns:
        Smoothed map (B, 1, H, W).
    """
    full = F.interpolate(distance.unsqueeze(1), size=size, mode="bilinear", align_corners=False)
    return gaussian_blur(full, BLUR_WIDTH, BLUR_SIGMA, border="reflect")


def normalise_map(maps: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
    """Map q_alpha to 0 and q_beta to 0.1: t(M) of Sec. 3.5.

    Differs from the paper: its printed equation divides q_alpha only; the text under it, EfficientAD and the published
    code divide the difference, as here. The published code normalises before the blur; a blur keeps constants and is
    linear, so the order makes no difference.

    Args:
        maps: Map of one branch, any shape.
        quantiles: (q_alpha, q_beta) of that branch.

    Example:
        >>> normalise_map(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([2.0, 4.0]))
        tensor([0.0000, 0.1000, 0.2000])
    """
    q_alpha, q_beta = quantiles
    return 0.1 * (maps - q_alpha) / (q_beta - q_alpha)
