"""Losses of ULSAD (Patra & Ben Taieb, TMLR 2024), Eqs. 1 and 3 to 6.

Status: exact to the published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.region import WHOLE_IMAGE, WholeImage

from .anomaly_map import feature_distance
from .torch_model import Branches


def attention(query: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Attention map over all locations: Z softmax(Z^T Q / sqrt(C)), the columns of Eqs. 3 and 4.

    The fused kernel never builds the (h w) x (h w) weights.

    Args:
        query: Z (self-attention, Eq. 3) or the autoencoder's output (cross-attention, Eq. 4), (B, C, h, w).
        features: Z as key and value, (B, C, h, w).

    Returns:
        A or its estimate, (B, C, h, w).
    """
    batch, channels, height, width = features.shape
    tokens = features.flatten(2).transpose(1, 2).unsqueeze(1)  # (B, C, h, w) -> (B, 1, h w, C)
    queries = query.flatten(2).transpose(1, 2).unsqueeze(1)
    attended = F.scaled_dot_product_attention(queries, tokens, tokens)  # scales by 1 / sqrt(C)
    return attended.squeeze(1).transpose(1, 2).reshape(batch, channels, height, width)


def attention_weights(
    query: torch.Tensor, features: torch.Tensor, locations: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Attention of chosen locations to all others: columns of W, Eqs. 3 and 4, as Figure 5 shows them.

    Args:
        query: Z (self-attention, Eq. 3) or the autoencoder's output (cross-attention, Eq. 4), (B, C, h, w).
        features: Z as key, (B, C, h, w).
        locations: The chosen ones, (row, column) on the grid of h x w.

    Returns:
        One map for each chosen location, (B, len(locations), h, w), which sums to 1.

    Example:
        >>> attention_weights(torch.zeros(1, 4, 2, 2), torch.rand(1, 4, 2, 2), [(0, 1)])
        tensor([[[[0.2500, 0.2500],
                  [0.2500, 0.2500]]]])
    """
    batch, channels, height, width = features.shape
    rows, columns = zip(*locations, strict=True)
    queries = query[:, :, rows, columns].transpose(1, 2)  # (B, C, h, w) -> (B, locations, C)
    scores = queries @ features.flatten(2) / math.sqrt(channels)  # (B, locations, h w)
    return scores.softmax(dim=-1).reshape(batch, len(locations), height, width)


class UlsadLoss(nn.Module):
    """L_pl + L_pg + L_lg (Algorithm 1, line 19).

    Args:
        lambda_l: Weight of the direction in the local loss, Eq. 1.
        lambda_g: Weight of the direction in the global losses, Eqs. 5 and 6.
        global_loss: ``"attention"`` for L_pg (Eq. 5), ``"feature"`` for L_pg^d of Table 3, which compares the
            autoencoder's output with the features directly, ``None`` without a global branch.
    """

    def __init__(self, lambda_l: float = 0.5, lambda_g: float = 0.5, global_loss: str | None = "attention") -> None:
        super().__init__()
        self.lambda_l = lambda_l
        self.lambda_g = lambda_g
        self.global_loss = global_loss

    def forward(self, branches: Branches, region: WholeImage = WHOLE_IMAGE) -> dict[str, torch.Tensor]:
        """Compute the loss terms.

        Args:
            branches: Output of the networks in training mode.
            region: At whose positions, for attention too.

        Returns:
            Scalars under the names ``local``, and ``global`` and ``local_global`` where those are switched on. The
            training loss is their sum.
        """
        branches = Branches(*(None if features is None else region.take(features) for features in branches))
        losses = {"local": feature_distance(branches.local_features, branches.features, self.lambda_l).mean()}  # Eq. 1
        if branches.autoencoder is not None:
            losses["global"] = self._global(branches.autoencoder, branches.features)
        if branches.global_features is not None:
            # Eq. 6; Algorithm 1 lets its gradient reach both networks.
            losses["local_global"] = feature_distance(
                branches.global_features, branches.autoencoder, self.lambda_g
            ).mean()
        return losses

    def _global(self, autoencoder: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if self.global_loss == "feature":  # L_pg^d of Table 3
            return feature_distance(autoencoder, features, self.lambda_g).mean()
        return feature_distance(attention(autoencoder, features), attention(features, features), self.lambda_g).mean()
