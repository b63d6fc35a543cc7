"""MLP and CNN that UniAD is compared with (Figs. 2 and 4, appendix B.1).

Status: from the paper; they are not in the published code. Where its text leaves a choice, a comment says what is ours.

Shapes: B images, h x w the feature grid, N = h w tokens in row-major order, D channels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.resnet import BasicBlock

from anomalib_pack.packing import Linear

from .transformer import Transformer

RESNET34_BLOCKS = (3, 4, 6, 3)  # of its four stages


class Projection(nn.Module):
    """What the MLP has instead of an attention: linear projection, LayerNorm and ReLU.

    Args:
        channels: D.
        cross: Whether it stands for an attention between two sets of tokens, which are then concatenated.
    """

    def __init__(self, channels: int, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.linear = Linear((2 if cross else 1) * channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(
        self, query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, _mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Project tokens (B, N, D), with the arguments of :class:`~.attention.Attention`."""
        tokens = torch.cat([query, value], dim=2) if self.cross else value
        return F.relu(self.norm(self.linear(tokens)))


class Mlp(nn.Module):
    """The vanilla transformer without attention and positions; queries are learned for the first decoder layer.

    Ours: the transformer's residual connections and LayerNorms stay around what replaces the attentions.

    Args:
        tokens: N.
        channels: D, 256 in the paper.
        hidden: Hidden channels of the feed-forward networks, 1024 in Table A1.
        layers: Numbers of encoder and decoder layers, 4 and 4 in the paper.
        dropout: Probability in feed-forward networks and residual branches. Ours: as in the transformer.
    """

    def __init__(self, tokens: int, channels: int, hidden: int, layers: tuple[int, int], dropout: float) -> None:
        super().__init__()
        self.transformer = Transformer(tokens, channels, 1, hidden, layers, dropout, query="first")
        for layer in self.transformer.encoder.layers:
            layer.self_attn = Projection(channels, cross=False)
        for layer in self.transformer.decoder.layers:
            layer.self_attn = Projection(channels, cross=False)
            layer.multihead_attn = Projection(channels, cross=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reconstruct tokens (B, N, D)."""
        return self.transformer(tokens, torch.zeros_like(tokens[0]), (None, None, None))


class Cnn(nn.Module):
    """ResNet-34 without what stands before its stages, without strides, with D, D/2, D/2 and D channels.

    Args:
        grid: (h, w).
        channels: D, even, 256 in the paper.
    """

    def __init__(self, grid: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.grid = grid
        widths = (channels, channels // 2, channels // 2, channels)
        blocks = [width for width, number in zip(widths, RESNET34_BLOCKS, strict=True) for _ in range(number)]
        before = [channels, *blocks[:-1]]
        self.blocks = nn.Sequential(*(_block(*change) for change in zip(before, blocks, strict=True)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reconstruct tokens (B, N, D)."""
        maps = tokens.transpose(1, 2).unflatten(2, self.grid)  # (B, N, D) -> (B, D, h, w)
        return self.blocks(maps).flatten(2).transpose(1, 2)


def _block(in_channels: int, out_channels: int) -> BasicBlock:
    if in_channels == out_channels:
        return BasicBlock(in_channels, out_channels)
    shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)  # as in ResNet where channels change
    return BasicBlock(in_channels, out_channels, downsample=nn.Sequential(shortcut, nn.BatchNorm2d(out_channels)))
