"""Mean and standard deviation of each channel over many images, in one pass.

Sums in float64 keep all digits of float32 features as long as a mean is not ten thousand times its deviation.
"""

from __future__ import annotations

import torch


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, on the CPU where the device, MPS, has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def channel_sums(maps: torch.Tensor) -> torch.Tensor:
    """Sum up a batch; sums of batches and of processes add up.

    Args:
        maps: (B, C, h, w).

    Returns:
        Count, sum and sum of squares of each channel, (3, C) in float64.
    """
    values = in_float64(maps)
    total, squares = values.sum(dim=(0, 2, 3)), values.square().sum(dim=(0, 2, 3))
    return torch.stack([torch.full_like(total, values[:, 0].numel()), total, squares])


def mean_and_std(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation, each (1, C, 1, 1) in float32, of summed :func:`channel_sums`.

    A channel that never changed has standard deviation 1, so that dividing by it is harmless.

    Example:
        >>> mean, std = mean_and_std(channel_sums(torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)))
        >>> mean.item(), std.item()
        (2.0, 1.0)
    """
    count, total, squares = sums
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std > 0, std, 1)
    return mean.float().view(1, -1, 1, 1), std.float().view(1, -1, 1, 1)
