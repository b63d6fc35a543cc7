"""The Mahalanobis transform of patch features (UniSLAD, Sec. III-B, Eqs. 6 to 10)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize

from anomalib_pack.packing import product
from anomalib_pack.statistics import in_float64


class Whitening(nn.Module):
    """Centre and decorrelate features, and bring each to length 1; or one of these, or neither.

    Eigenvalues are computed in double precision.

    Args:
        dimension: D.
        shrinkage: What is added to the covariance's diagonal, in units of its mean eigenvalue. The paper regularises
            (step 2 of four) without saying how.
        enabled: Eqs. 6 to 9.
        unit_length: Eq. 10.
    """

    mean: torch.Tensor
    matrix: torch.Tensor

    def __init__(self, dimension: int, shrinkage: float, enabled: bool, unit_length: bool) -> None:
        super().__init__()
        self.shrinkage = shrinkage
        self.enabled = enabled
        self.unit_length = unit_length
        if enabled:
            self.register_buffer("mean", torch.zeros(dimension))
            self.register_buffer("matrix", torch.eye(dimension))  # L_2

    def fit(self, features: torch.Tensor) -> None:
        """Measure mean and covariance of the selected features, (n, D)."""
        if not self.enabled:
            return
        precise = in_float64(features)
        mean = precise.mean(dim=0)
        centered = precise - mean
        covariance = centered.T @ centered / max(1, len(features) - 1)  # Eq. 6
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        regularised = eigenvalues.clamp_min(0) + ridge(eigenvalues.clamp_min(0), self.shrinkage)
        # Eqs. 7 and 8: the eigenvectors of the inverse are those of the matrix. Regularised eigenvalues are positive.
        matrix = (vectors * regularised.rsqrt()) @ vectors.T
        self.mean.copy_(mean)
        self.matrix.copy_(matrix)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Transform features (..., D)."""
        if self.enabled:
            features = product(features - self.mean, self.matrix)  # Eq. 9
        return normalize(features, dim=-1) if self.unit_length else features  # Eq. 10


def ridge(eigenvalues: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """What shrinkage adds to all D eigenvalues: a share of their mean, or 1 where they are all zero."""
    mean = eigenvalues.mean()
    return torch.where(mean > 0, shrinkage * mean, torch.ones_like(mean))
