"""Position embeddings of UniAD (Sec. 3.3), added to the queries and keys of every attention.

Shapes: h x w the feature grid, N = h w tokens in row-major order, D channels.
"""

from __future__ import annotations

import math

import torch
from torch import nn

SINE_TEMPERATURE = 10_000  # as in Vaswani et al. 2017


class LearnedPositions(nn.Module):
    """One learned vector for each row and each column (the default). Published parameter names.

    Args:
        grid: (h, w).
        channels: D, even: one half tells the column, the other the row.
    """

    def __init__(self, grid: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(grid[0], channels // 2)
        self.col_embed = nn.Embedding(grid[1], channels // 2)
        nn.init.uniform_(self.row_embed.weight)  # published code: [0, 1)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self) -> torch.Tensor:
        """Join the tables to one embedding for each token, (N, D), the column's half first."""
        rows, columns = self.row_embed.weight, self.col_embed.weight
        h, w = len(rows), len(columns)
        return torch.cat([columns.repeat(h, 1), rows.repeat_interleave(w, dim=0)], dim=1)


class SinePositions(nn.Module):
    """Fixed sines and cosines of the row and the column, the row's half first.

    Args:
        grid: (h, w).
        channels: D, a multiple of 4: sine and cosine for row and column.
    """

    embedding: torch.Tensor

    def __init__(self, grid: tuple[int, int], channels: int) -> None:
        super().__init__()
        h, w = grid
        rows = _sines(h, channels // 2).repeat_interleave(w, dim=0)
        columns = _sines(w, channels // 2).repeat(h, 1)
        self.register_buffer("embedding", torch.cat([rows, columns], dim=1), persistent=False)

    def forward(self) -> torch.Tensor:
        """Return the embedding of each token, (N, D)."""
        return self.embedding


def _sines(length: int, channels: int) -> torch.Tensor:
    """Sines (even channels) and cosines (odd ones) along one axis, whose end is at 2 pi: (length, channels)."""
    positions = 2 * math.pi * torch.arange(1, length + 1) / length
    periods = SINE_TEMPERATURE ** (torch.arange(0, channels, 2) / channels)
    angles = positions.unsqueeze(1) / periods
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
