"""Neighbour masked encoder and layer-wise query decoder of UniAD (Sec. 3.2, Fig. 3, appendices B.2 and C.2).

Status: exact to the published code. Parameters have its names.

Shapes: B images, N tokens, D channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.packing import Linear

from .attention import Attention
from .dropout import Dropout

# The six ways in which two attentions fuse a layer's query embedding with the encoder's and the previous output, with
# the embedding as a query (appendix C.2, Table A3). For each the first attention's query and source of keys and values,
# then those of the second, which may be the first one's "result".
DECODERS = {
    "encoder_then_previous": ("embedding", "encoder", "result", "previous"),  # (a)
    "previous_then_encoder": ("embedding", "previous", "result", "encoder"),  # (b) or (f)
    "encoder_reads_previous": ("encoder", "previous", "embedding", "result"),  # (b) or (f)
    "previous_reads_encoder": ("previous", "encoder", "embedding", "result"),  # (c), (d) or (e), as the next two
    "encoder_for_previous": ("embedding", "encoder", "previous", "result"),
    "previous_for_encoder": ("embedding", "previous", "encoder", "result"),
}
VANILLA = ("previous", "previous", "result", "encoder")  # without an embedding of the layer's own (appendix B.1)


class EncoderLayer(nn.Module):
    """Attention and feed-forward network, each with residual connection and LayerNorm behind it.

    Args:
        channels: D.
        heads: Heads of the attention.
        hidden: Hidden channels of the feed-forward network (Table A1).
        dropout: Probability in attention, feed-forward network and residual branches.
    """

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(channels, heads, dropout)
        self.linear1 = Linear(channels, hidden)
        self.linear2 = Linear(hidden, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Encode tokens (B, N, D), given positions (N, D) and the mask of the attention (N, N)."""
        located = tokens + positions
        tokens = self.norm1(tokens + self.dropout(self.self_attn(located, located, tokens, mask)))
        return self.norm2(tokens + self.dropout(self._feed_forward(tokens)))

    def _feed_forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(tokens), inplace=True)))


class DecoderLayer(EncoderLayer):
    """Two attentions and a feed-forward network.

    What attends to what is one of :data:`DECODERS`, or, without a query embedding of its own, as in a layer of the
    vanilla transformer (appendix B.1): the previous layer's output attends to itself and then, with the result, to the
    encoder's output.

    Args:
        channels: D.
        heads: Heads of each attention.
        hidden: Hidden channels of the feed-forward network (Table A1).
        dropout: Probability in attentions, feed-forward network and residual branches.
        tokens: N, the number of learned queries, or ``None`` for a layer without its own.
        decoder: The design of a layer with its own queries, a key of :data:`DECODERS`.
    """

    def __init__(
        self, channels: int, heads: int, hidden: int, dropout: float, tokens: int | None, decoder: str
    ) -> None:
        super().__init__(channels, heads, hidden, dropout)
        self.roles = VANILLA if tokens is None else DECODERS[decoder]
        self.multihead_attn = Attention(channels, heads, dropout)
        self.norm3 = nn.LayerNorm(channels)
        self.learned_embed = None if tokens is None else nn.Embedding(tokens, channels)

    def forward(
        self,
        previous: torch.Tensor,
        memory: torch.Tensor,
        positions: torch.Tensor,
        masks: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """Decode.

        Args:
            previous: Output of the layer before, (B, N, D).
            memory: Output of the encoder, (B, N, D).
            positions: (N, D).
            masks: Of the first and the second attention, each (N, N) or ``None``.

        Returns:
            (B, N, D).
        """
        inputs = {"previous": previous, "encoder": memory}
        if self.learned_embed is not None:
            inputs["embedding"] = self.learned_embed.weight.unsqueeze(0)  # (1, N, D), the same for all images
        first_query, first_source, second_query, second_source = self.roles
        query, source = inputs[first_query], inputs[first_source]
        attended = self.self_attn(query + positions, source + positions, source, masks[0])
        inputs["result"] = self.norm1(query + self.dropout(attended))
        query, source = inputs[second_query], inputs[second_source]
        attended = self.multihead_attn(query + positions, source + positions, source, masks[1])
        query = self.norm2(query + self.dropout(attended))
        return self.norm3(query + self.dropout(self._feed_forward(query)))


class Encoder(nn.Module):
    """Stack of encoder layers, without a norm behind it."""

    def __init__(self, layer: EncoderLayer, number: int) -> None:
        super().__init__()
        self.layers = _copies(layer, number)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Encode tokens (B, N, D)."""
        for layer in self.layers:
            tokens = layer(tokens, positions, mask)
        return tokens


class Decoder(nn.Module):
    """Stack of decoder layers with a LayerNorm behind it.

    Args:
        layer: The layer to copy.
        number: Number of layers, 0 or more.
        first_query: Tokens N and channels D of one learned query for the first layer (1 q. of Table 5a), or ``None``.
    """

    def __init__(self, layer: DecoderLayer, number: int, first_query: tuple[int, int] | None) -> None:
        super().__init__()
        self.layers = _copies(layer, number)
        self.norm = nn.LayerNorm(layer.norm1.normalized_shape)
        self.first_query = None if first_query is None else nn.Embedding(*first_query)

    def forward(
        self, memory: torch.Tensor, positions: torch.Tensor, masks: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        """Decode the encoder's output (B, N, D)."""
        output = memory if self.first_query is None else self.first_query.weight.expand_as(memory)
        for layer in self.layers:
            output = layer(output, memory, positions, masks)
        return self.norm(output)


class Transformer(nn.Module):
    """Encoder and decoder (Fig. 3).

    Args:
        tokens: N.
        channels: D, 256 in the paper.
        heads: 8 in the published code.
        hidden: Hidden channels of the feed-forward networks, 1024 in Table A1.
        layers: Numbers of encoder and decoder layers, 4 and 4 in the paper (Table 5b).
        dropout: 0.1 in the published code.
        query: ``"layerwise"``, ``"first"`` or ``"none"`` (Table 5a).
        decoder: Design of layers with their own queries (Table A3), a key of :data:`DECODERS`.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        heads: int,
        hidden: int,
        layers: tuple[int, int],
        dropout: float,
        query: str,
        decoder: str = "encoder_then_previous",
    ) -> None:
        super().__init__()
        layerwise = tokens if query == "layerwise" else None
        first = (tokens, channels) if query == "first" else None
        self.encoder = Encoder(EncoderLayer(channels, heads, hidden, dropout), layers[0])
        self.decoder = Decoder(DecoderLayer(channels, heads, hidden, dropout, layerwise, decoder), layers[1], first)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, masks: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        """Reconstruct tokens.

        Args:
            tokens: (B, N, D).
            positions: (N, D).
            masks: Of the encoder's attention and of the decoder's first and second one, each (N, N) or ``None``.

        Returns:
            (B, N, D).
        """
        memory = self.encoder(tokens, positions, masks[0])
        return self.decoder(memory, positions, masks[1:])


def _copies(layer: nn.Module, number: int) -> nn.ModuleList:
    # Published code: the layers are copies of one, so that they start with the same attention and query embedding.
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(number))
