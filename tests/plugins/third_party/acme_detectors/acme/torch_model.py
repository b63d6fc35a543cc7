"""The network: pixels that look like none of the normal images."""

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn


class AcmeTorchModel(nn.Module):
    """Ranges of some mixtures of red, green and blue, which normal images fill.

    Args:
        width: Number of mixtures.
        scale: Factor of the score.
    """

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, width, 1).requires_grad_(requires_grad=False)
        self.scale = scale
        self.register_buffer("low", torch.full((1, width, 1, 1), torch.inf))
        self.register_buffer("high", torch.full((1, width, 1, 1), -torch.inf))

    def learn(self, images: Tensor) -> None:
        """Widen the ranges to what these images show."""
        mixtures = self.layer(images)  # (B, width, H, W)
        self.low = torch.minimum(self.low, mixtures.amin((0, 2, 3), keepdim=True))
        self.high = torch.maximum(self.high, mixtures.amax((0, 2, 3), keepdim=True))

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images by how far their pixels are outside the ranges."""
        mixtures = self.layer(images)
        outside = torch.maximum(self.low - mixtures, mixtures - self.high).clamp(min=0)
        anomaly_map = self.scale * outside.amax(1, keepdim=True)  # (B, 1, H, W)
        return InferenceBatch(pred_score=anomaly_map.amax((1, 2, 3)), anomaly_map=anomaly_map)
