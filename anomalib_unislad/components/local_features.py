"""Locally aware patch features of a CNN's blocks (UniSLAD, Sec. III-A, Eqs. 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import interpolate

from anomalib_pack.folding import Folding

AGGREGATIONS = ("patchcore", "channels")


class LocalAggregator(nn.Module):
    """Join the outputs of several blocks to one vector for each patch.

    Two readings of Eq. 2. Both give a patch its p x p neighbourhood, with zeros beyond the border, bring all blocks to
    one grid (bilinear), and pool averages adaptively:

    - ``"patchcore"``: the values of a neighbourhood stand side by side, channel after channel. Each block's are pooled
      to ``dimension``, then those of all blocks, block after block, to ``dimension`` again. Each block has an equal
      share of the vector. This is what Eq. 2 says: it concatenates the neighbourhoods and takes the aggregator of
      PatchCore.
    - ``"channels"``: each channel is averaged over the neighbourhood, and the channels of all blocks together are
      pooled to ``dimension``. Each channel has an equal share, and a block with few, as the first ones, a small one.

    All steps are linear and the resize acts on each channel alone, so what comes before and after it is one convolution
    on the block's own grid: neither neighbourhoods nor the channels of all blocks ever exist on the fine grid. The
    outcome is the same up to rounding.

    Args:
        channels: Channels of each block.
        dimension: Length of the vectors, at most :func:`pooled_values`.
        patch_size: Side p of the neighbourhood, odd.
        aggregation: ``"patchcore"`` or ``"channels"``.
    """

    def __init__(self, channels: Sequence[int], dimension: int, patch_size: int, aggregation: str) -> None:
        super().__init__()
        self.parts: list[slice] = []  # of the vector, those to which a block adds something
        self.convolutions = nn.ModuleList()
        area = patch_size**2
        for block, count in enumerate(channels):
            if aggregation == "patchcore":
                inputs, start, stop = len(channels) * dimension, block * dimension, (block + 1) * dimension
            else:
                inputs, start, stop = sum(channels), sum(channels[:block]), sum(channels[: block + 1])
            part = range(start * dimension // inputs, -(-stop * dimension // inputs))
            weight = pooling_matrix(inputs, dimension, part)[:, start:stop]
            if aggregation == "patchcore":
                weight = weight @ pooling_matrix(count * area, dimension, range(dimension))
            else:
                weight = weight.repeat_interleave(area, dim=1) / area
            self.parts.append(slice(part.start, part.stop))
            self.convolutions.append(fixed_convolution(weight.view(len(part), count, patch_size, patch_size)))
        self.dimension = dimension
        self._folding = Folding()

    def forward(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B, C_k, h_k, w_k) for each block -> (B, D, h_1, w_1), on the first block's grid."""
        return self._folding.run(self, blocks, LocalAggregator._join)

    def _join(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        shares = [convolution(block) for convolution, block in zip(self.convolutions, blocks, strict=True)]
        grid = blocks[0].shape[-2:]
        for number, share in enumerate(shares):
            if share.shape[-2:] != grid:
                shares[number] = interpolate(share, size=grid, mode="bilinear", align_corners=False)
        return side_by_side(shares, self.parts)


def fixed_convolution(weight: torch.Tensor) -> nn.Conv2d:
    """Convolution that keeps the size of maps, with a weight that no state dict holds."""
    channels, inputs, *sides = weight.shape
    convolution = nn.Conv2d(inputs, channels, sides, padding=[side // 2 for side in sides], bias=False, device="meta")
    del convolution.weight
    convolution.register_buffer("weight", weight, persistent=False)
    return convolution


def side_by_side(shares: Sequence[torch.Tensor], parts: Sequence[slice]) -> torch.Tensor:
    """Join shares (B, d_k, h, w) of parts of D channels to (B, D, h, w).

    A part begins where the one before ends, or with its last channel, to which both then add.
    """
    pieces = [shares[0]]
    for share, before, part in zip(shares[1:], parts, parts[1:], strict=False):
        fresh = share[:, before.stop - part.start :]
        if part.start < before.stop:
            last = pieces.pop()
            pieces += [last[:, :-1], last[:, -1:] + share[:, :1]]
        pieces = [piece for piece in (*pieces, fresh) if piece.shape[1]]  # OpenVINO takes no empty ones
    return torch.cat(pieces, dim=1)


def pooled_values(channels: Sequence[int], patch_size: int, aggregation: str) -> int:
    """How many values of a patch are pooled to its vector, which cannot be longer."""
    return sum(channels) * (patch_size**2 if aggregation == "patchcore" else 1)


def pooling_matrix(inputs: int, outputs: int, rows: range) -> torch.Tensor:
    """Rows of the matrix (outputs, inputs) of adaptive average pooling, as of ``torch.nn.AdaptiveAvgPool1d``."""
    row = torch.tensor(rows).unsqueeze(1)
    column = torch.arange(inputs)
    start, stop = row * inputs // outputs, -(-(row + 1) * inputs // outputs)
    return ((start <= column) & (column < stop)) / (stop - start)
