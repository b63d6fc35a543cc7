"""Anomaly map and image score of MiniMaxAD (Wang et al.), Eqs. 2 and 3.

Status: exact to the published code; differences from the paper's text are marked below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.blur import gaussian_blur
from anomalib_pack.region import WHOLE_IMAGE, WholeImage
from anomalib_pack.shares import whole_share

BLUR_SIGMA = 4.0  # published code; the paper does not smooth its maps


def cosine_distance(encoded: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """Distance of two feature maps at each location, M^k of Eq. 2.

    Args:
        encoded: f_E, (B, C, h, w).
        decoded: f_D, (B, C, h, w).

    Returns:
        (B, h, w), from 0 (up to rounding) to 2.

    Example:
        >>> cosine_distance(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([4.0, 3.0]).view(1, 2, 1, 1))
        tensor([[[0.0400]]])
    """
    # float: half precision would merge scores.
    return 1 - F.cosine_similarity(encoded.float(), decoded.float(), dim=1)  # Eq. 2


def full_size_map(
    distances: Sequence[torch.Tensor], size: tuple[int, int], region: WholeImage = WHOLE_IMAGE
) -> torch.Tensor:
    """Join the distances of all scales at the size of the image, S of Eq. 3.

    Differs from the paper: Eq. 3 adds the scales up, the published evaluation averages them. The ranking is the same.

    Args:
        distances: M^k, each (B, h_k, w_k).
        size: (H, W) of the image.
        region: Whose distances have weight.

    Returns:
        (B, 1, H, W), from 0 to 2.
    """

    def resized(maps: torch.Tensor) -> torch.Tensor:  # Psi, published code
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)

    full_size = [region.smooth(maps.unsqueeze(1), resized) for maps in distances]
    return torch.stack(full_size).mean(dim=0)  # Eq. 3


def blur(maps: torch.Tensor, width: int) -> torch.Tensor:
    """Smooth maps by a Gaussian that is cut off at a window; what lies outside the image counts as 0.

    Args:
        maps: (B, 1, H, W).
        width: Side of the window in pixels, odd; 1 does not smooth.

    Returns:
        (B, 1, H, W).
    """
    return gaussian_blur(maps, width, BLUR_SIGMA, border="constant")


def image_score(anomaly_map: torch.Tensor, top_ratio: float) -> torch.Tensor:
    """Mean of the largest values of a map: published code, the paper does not say.

    Args:
        anomaly_map: (B, 1, H, W), or the pixels of it that count.
        top_ratio: Share of the pixels that counts; with 0 the single largest.

    Returns:
        (B,).

    Example:
        >>> image_score(torch.arange(100.0).view(1, 1, 10, 10), top_ratio=0.02)
        tensor([98.5000])
    """
    pixels = anomaly_map.flatten(1)
    number = max(1, whole_share(top_ratio, pixels.shape[1]))
    return pixels.topk(number, dim=1, sorted=False).values.mean(dim=1)
