"""Neighbour masked attention of UniAD (Sec. 3.2, Fig. 5).

Shapes: B images, h x w the feature grid, N = h w tokens in row-major order, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.packing import Linear, linear, pack_matrix

from .dropout import draw, draws_quickly

CACHED = 2**20  # logits that are worked on together, so that they stay in a processor's cache


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


class DropoutAttention(torch.autograd.Function):
    """Attention with dropout in float32 on a CPU, for which PyTorch has no fused kernel.

    PyTorch then builds the N x N weights of the whole batch in several copies. Here a few images are worked on at a
    time, and of the weights one copy is kept, whose signs say which are dropped.
    """

    @staticmethod
    def forward(
        context: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float
    ) -> torch.Tensor:
        """Attend.

        Args:
            context: For the backward pass.
            q: (B, heads, N, d).
            k: (B, heads, N, d).
            v: (B, heads, N, d).
            mask: Added to the logits, (N, N), or ``None``.
            dropout: Probability that a weight is dropped.

        Returns:
            (B, heads, N, d).
        """
        signed = q.new_empty(*q.shape[:3], k.shape[2])  # weights, negative where they are dropped
        attended = torch.empty_like(k)
        bias = q.new_zeros(()) if mask is None else mask
        for images in _parts(signed):
            weights, queries, keys, values = (_joined(tensor[images]) for tensor in (signed, q, k, v))
            torch.baddbmm(bias, queries, keys.mT, alpha=k.shape[3] ** -0.5, out=weights)
            torch.softmax(weights, dim=2, out=weights)
            draws, factor = draw(weights.shape, dropout)
            torch.copysign(weights, draws, out=weights)
            kept = torch.clamp_min(weights, 0, out=draws)
            attended[images] = torch.bmm(kept, values).mul_(factor).view(attended[images].shape)
        context.save_for_backward(q, k, v, signed, attended)
        context.factor = factor  # pyrefly: ignore [unbound-name]  # there is a part, as there are images
        return attended

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, signed, attended = context.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in (k, k, v)]  # q may be expanded
        total = (gradient * attended).sum(dim=3, keepdim=True)  # of each query's weights times their gradients
        gradient = gradient * context.factor
        for images in _parts(signed):
            inputs = (signed, q, k, v, gradient, total)
            weights, queries, keys, values, outer, sums = (_joined(tensor[images]) for tensor in inputs)
            kept = weights.clamp_min(0)
            of_values = torch.bmm(kept.mT, outer)
            of_logits = torch.bmm(outer, values.mT).mul_(kept)
            of_logits.addcmul_(torch.abs(weights, out=kept), sums, value=-1)
            parts = torch.bmm(of_logits, keys), torch.bmm(of_logits.mT, queries), of_values
            for whole, part in zip(gradients, parts, strict=True):
                whole[images] = part.view(whole[images].shape)
        scale = k.shape[3] ** -0.5
        return gradients[0].mul_(scale), gradients[1].mul_(scale), gradients[2], None, None


def _parts(logits: torch.Tensor) -> list[slice]:
    """Consecutive images of (B, heads, N, N) that are worked on together."""
    number = max(CACHED // logits[0].numel(), 1)
    return [slice(start, start + number) for start in range(0, len(logits), number)]


def _joined(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(0, 1)  # (B, heads, N, d) -> (B heads, N, d)


class Attention(nn.Module):
    """Multi-head attention, through PyTorch's fused kernels wherever there is one.

    These never build the N x N weights. With dropout there is none on a CPU; see :class:`DropoutAttention`.

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
        self.out_proj = Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)  # of the joined matrix, as nn.MultiheadAttention does
        self._packed: list[torch.Tensor] | None = None

    def pack_weights(self) -> None:
        """See :class:`~anomalib_pack.packing.PacksItself`."""
        self._packed = [pack_matrix(weight) for weight in self.in_proj_weight.chunk(3)]

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
        weights, biases = self._packed or self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            self._split_heads(linear(tokens, weight, bias))
            for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        q = q.expand_as(k)
        dropout = self.dropout if self.training else 0.0
        if dropout and draws_quickly(q):
            attended = DropoutAttention.apply(q, k, v, mask, dropout)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, heads, N, D / heads) -> (B, N, D)

    def _split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, heads, N, D / heads)
