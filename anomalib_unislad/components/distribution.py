"""The distribution of normal images' vectors, and distances from it (UniSLAD, Sec. III-C and III-D, Eqs. 15 and 19)."""

from __future__ import annotations

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import nn

from anomalib_pack.precision import Float32State
from anomalib_pack.statistics import in_float64

from .whitening import ridge


class NominalDistribution(Float32State, DynamicBufferMixin, nn.Module):
    """Mean and covariance of normal images' vectors.

    There are often fewer images than dimensions. The covariance S is then singular, and S + ridge I takes its place
    (the paper does not say what it does). Its inverse is never formed: with U the eigenvectors of S with eigenvalues
    s_i above zero, at most as many as images, and r the part of x - mean outside their span,

        (x - mean)^T (S + ridge I)^-1 (x - mean) = sum_i (u_i (x - mean))^2 / (s_i + ridge) + |r|^2 / ridge.

    Args:
        dimension: D.
        shrinkage: The ridge in units of the mean of all D eigenvalues.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    variances: torch.Tensor
    ridge: torch.Tensor

    def __init__(self, dimension: int, shrinkage: float) -> None:
        super().__init__()
        self.shrinkage = shrinkage
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("directions", torch.zeros(0, dimension))  # u_i, (r, D)
        self.register_buffer("variances", torch.zeros(0))  # s_i + ridge, (r,)
        self.register_buffer("ridge", torch.ones(()))

    def fit(self, vectors: torch.Tensor) -> None:
        """Measure mean and covariance of normal images' vectors (n, D): Eq. 15."""
        precise = in_float64(vectors)
        count, dimension = vectors.shape
        mean = precise.mean(dim=0)
        # The eigenvectors of the covariance are the right singular vectors of the centred data.
        _, singular, directions = torch.linalg.svd(precise - mean, full_matrices=False)
        variances = singular.square() / max(1, count - 1)
        added = ridge(torch.cat([variances, variances.new_zeros(max(0, dimension - len(variances)))]), self.shrinkage)
        real = variances > variances.sum() * torch.finfo(torch.float64).eps * dimension
        real[0] = True  # a direction without variance changes nothing, and OpenVINO takes no empty matrices
        like = self.mean
        self.mean = mean.to(like)
        self.directions = directions[real].to(like)
        self.variances = (variances[real] + added).to(like)
        self.ridge = added.to(like)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Mahalanobis distances (B,) of vectors (B, D) from the mean: Eq. 19."""
        centered = vectors - self.mean
        inside = centered @ self.directions.T  # (B, r)
        outside = centered - inside @ self.directions  # (B, D)
        squares = (inside.square() / self.variances).sum(dim=1) + outside.square().sum(dim=1) / self.ridge
        return squares.sqrt()
