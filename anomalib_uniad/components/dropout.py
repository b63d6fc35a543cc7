"""Dropout that is quick on a CPU, where PyTorch's draws take as long as the products around them.

Here four draws come from one random number of 64 bits: what is dropped has PyTorch's distribution, but for the
probability, which is rounded to a multiple of 2^-16.
"""

from __future__ import annotations

import torch
from torch import nn

LEVELS = 2**16  # of a draw


def draws_quickly(tensor: torch.Tensor) -> bool:
    """Whether :func:`draw` stands in for PyTorch's dropout: on a CPU in float32, unless a compiler fuses the draws."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and not torch.compiler.is_compiling()


def draw(shape: torch.Size, probability: float) -> tuple[torch.Tensor, float]:
    """Draw what is dropped.

    Args:
        shape: The shape of what is drawn for.
        probability: With which a value is dropped, at least 0 and below 1.

    Returns:
        float32 numbers of this shape, below 0 where a value is dropped and at least 0 where it is kept; and the factor
        of those that are kept, which leaves the expected sum as it is.
    """
    dropped = min(round(probability * LEVELS), LEVELS - 1)
    number = shape.numel()
    bits = torch.empty(-(-number // 4), dtype=torch.int64).random_(-(2**63), None)  # all values of 64 bits
    draws = bits.view(torch.int16)[:number].view(shape)  # uniform from -LEVELS / 2 to LEVELS / 2 - 1
    return draws.float().sub_(dropped - LEVELS // 2), LEVELS / (LEVELS - dropped)


class Dropout(nn.Dropout):
    """Dropout with PyTorch's arguments."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Drop values of a tensor of any shape in training."""
        if not self.training or self.p == 0 or not draws_quickly(values):
            return super().forward(values)
        draws, factor = draw(values.shape, self.p)
        return values * draws.ge_(0).mul_(factor)
