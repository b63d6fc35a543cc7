"""Gaussian blur of anomaly maps."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F  # noqa: N812


def gaussian_blur(maps: torch.Tensor, width: int, sigma: float, border: Literal["reflect", "constant"]) -> torch.Tensor:
    """Smooth maps by a Gaussian that is cut off at a window, in the precision of the maps also under autocast.

    Args:
        maps: (B, 1, H, W).
        width: Side of the window in pixels, odd; 1 does not smooth.
        sigma: In pixels.
        border: What lies outside the image: its reflection, or zeros.

    Returns:
        (B, 1, H, W).

    Example:
        >>> gaussian_blur(torch.ones(1, 1, 3, 3), width=3, sigma=1.0, border="reflect").unique()
        tensor([1.])
    """
    # Computed where the maps are: the values would have to be waited for, or copied there.
    offsets = torch.arange(width, device=maps.device, dtype=maps.dtype) - width // 2
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    padded = F.pad(maps, [width // 2] * 4, mode=border)
    # On a CPU the images of a batch as channels of one are several times faster. An exported program cannot have them
    # so, because its batches are of any size.
    as_channels = maps.device.type == "cpu" and not torch.compiler.is_exporting()
    groups = len(maps) if as_channels else 1
    if as_channels:
        padded = padded.transpose(0, 1)
    with torch.autocast(maps.device.type, enabled=False):  # half precision would merge scores
        rows = F.conv2d(padded, weights.view(1, 1, 1, -1).expand(groups, -1, -1, -1), groups=groups)
        blurred = F.conv2d(rows, weights.view(1, 1, -1, 1).expand(groups, -1, -1, -1), groups=groups)
    return blurred.transpose(0, 1) if as_channels else blurred
