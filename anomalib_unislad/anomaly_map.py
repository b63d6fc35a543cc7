"""From distances to the anomaly map and the image score (UniSLAD, Sec. III-D, Eqs. 17, 18, 20 and 21)."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize


def class_similarity(tokens: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """w_p of Eq. 17, (B,): largest cosine of class tokens (B, D) with the bank's (n, D), within [0, 1].

    The inner product of tokens of length 1, which Eq. 18 needs: it takes w_p for a share.
    """
    return (normalize(tokens, dim=1) @ normalize(bank, dim=1).T).amax(dim=1).clamp(0, 1)


def fuse(first: torch.Tensor | None, second: torch.Tensor | None, weight: float | torch.Tensor) -> torch.Tensor | None:
    """(1 - weight) first + weight second, the form of Eqs. 18, 20 and 21; or the one that there is."""
    if first is None or second is None:
        return second if first is None else first
    return (1 - weight) * first + weight * second
