"""Locally aware patch features of a CNN's blocks (UniSLAD, Sec. III-A, Eqs. 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool1d, avg_pool2d, conv2d, interpolate


class LocalAggregator(nn.Module):
    """Join the outputs of several blocks to one vector for each patch.

    The reading of Eq. 2: averages over each patch's neighbourhood (PatchCore's locally aware pooling), bilinear resize
    to one grid, concatenation of all channels, adaptive average pooling of the channels. All steps are linear, and the
    pooling of channels acts alike everywhere; it is therefore done first, on each block's own grid, and the many
    channels of all blocks never exist on the fine grid. The outcome is the same up to rounding.

    Args:
        channels: Channels of each block.
        dimension: Length of the vectors, at most the sum of ``channels``.
        patch_size: Side p of the neighbourhood, odd.
    """

    def __init__(self, channels: Sequence[int], dimension: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.dimension = dimension
        # Row j of the pooling matrix: the weights of all channels in output channel j.
        total = sum(channels)
        weights = adaptive_avg_pool1d(torch.eye(total), dimension).T
        self.parts: list[slice] = []
        for block, columns in enumerate(weights.split(list(channels), dim=1)):
            start, stop = sum(channels[:block]), sum(channels[: block + 1])
            part = slice(start * dimension // total, -(-stop * dimension // total))
            self.parts.append(part)
            self.register_buffer(f"weight{block}", columns[part, :, None, None].contiguous(), persistent=False)

    def forward(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B, C_k, h_k, w_k) for each block -> (B, D, h_1, w_1), on the first block's grid."""
        padding = self.patch_size // 2
        batch_size, _, *grid = blocks[0].shape
        joined = blocks[0].new_zeros(batch_size, self.dimension, *grid)
        for number, (block, part) in enumerate(zip(blocks, self.parts, strict=True)):
            pooled = conv2d(block, getattr(self, f"weight{number}"))
            averages = avg_pool2d(pooled, self.patch_size, stride=1, padding=padding)
            joined[:, part] += interpolate(averages, size=grid, mode="bilinear", align_corners=False)
        return joined
