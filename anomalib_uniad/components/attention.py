"""Neighbour masked attention of UniAD (Sec. 3.2, Fig. 5).

Shapes: B images, h x w the feature grid, N = h w tokens in row-major order, D channels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


def neighbor_mask(grid: tuple[int, int], neighbors: tuple[int, int]) -> torch.Tensor:
    """Mask that hides each token and its neighbours from itself.

    Args:
        grid: (h, w).
        neighbors: (height, width) of the hidden window, which is centred on the token.

    Returns:
        What is added to attention logits, (N, N): -inf for hidden tokens, else 0.

    Raises:
        ValueError: If a token would see nothing; its attention would be NaN.

    Example:
        >>> neighbor_mask((1, 4), (1, 3))
        tensor([[-inf, -inf, 0., 0.],
                [-inf, -inf, -inf, 0.],
                [0., -inf, -inf, -inf],
                [0., 0., -inf, -inf]])
    """
    h, w = grid
    if h // 2 <= neighbors[0] // 2 and w // 2 <= neighbors[1] // 2:  # the token in the middle sees the least
        msg = (
            f"neighbor_size must leave every token something to attend to, got {neighbors[0]} x {neighbors[1]} on a "
            f"feature_size of {h} x {w}. Choose a smaller neighbor_size or a larger feature_size."
        )
        raise ValueError(msg)
    rows, columns = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    near_rows = (rows.unsqueeze(1) - rows).abs() <= neighbors[0] // 2
    near_columns = (columns.unsqueeze(1) - columns).abs() <= neighbors[1] // 2
    hidden = near_rows & near_columns  # (N, N)
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))


class Attention(nn.Module):
    """Multi-head attention through PyTorch's fused kernels, which never build the N x N weights.

    The parameters are those of ``nn.MultiheadAttention``. Unlike that class it takes queries that are the same for the
    whole batch and then projects them once.

    Args:
        channels: D.
        heads: Number of heads, a divisor of D.
        dropout: Probability that an attention weight is dropped in training.
    """

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)  # of the packed matrix, as nn.MultiheadAttention does

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: (B, N, D), or (1, N, D) for a whole batch.
            key: (B, N, D).
            value: (B, N, D).
            mask: Added to the logits, (N, N), or ``None``.

        Returns:
            (B, N, D).
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            self._split_heads(F.linear(tokens, weight, bias))
            for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        attended = F.scaled_dot_product_attention(
            q.expand_as(k), k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, heads, N, D / heads) -> (B, N, D)

    def _split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, heads, N, D / heads)
