"""Reconstruction losses of UniAD (You et al., NeurIPS 2022), Eqs. 4 and A1 to A3.

Status: ``"mse"`` is exact to the published code; the other two follow the appendix.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.region import WHOLE_IMAGE, WholeImage

from .anomaly_map import reconstruction_error
from .torch_model import Reconstruction


class UniadLoss(nn.Module):
    """Distance of the reconstructed features from the clean ones.

    Args:
        kind: ``"mse"``, ``"normalized_mse"`` or ``"cosine"`` (Table A4).
    """

    def __init__(self, kind: str = "mse") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, outputs: Reconstruction, region: WholeImage = WHOLE_IMAGE) -> torch.Tensor:
        """Compute the loss, a scalar, from the networks' output in training mode, at the positions of a region."""
        features, reconstruction = map(region.take, outputs)
        if self.kind == "mse":
            # Differs from the paper: Eqs. 4 and A1 sum over the channels, the published criterion averages.
            return F.mse_loss(reconstruction, features)
        error = reconstruction_error(features, reconstruction, self.kind)
        if self.kind == "normalized_mse":
            return error.square().mean()  # Eq. A2
        return error.mean()  # Eq. A3
