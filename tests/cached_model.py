"""A tiny model that is trained on a frozen network's features, with random numbers in its training step."""

import torch
from anomalib.data import InferenceBatch
from tiny_model import TinyModel
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.defaults import OneClassDefaults
from anomalib_pack.feature_cache import FeatureCache


class FrozenNet(nn.Module):
    """Predicts frozen features from what dropout leaves of them."""

    def __init__(self, trained: bool = False) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 4, 4, stride=4).requires_grad_(trained)
        self.learned = nn.Conv2d(4, 4, 3, padding=1)
        self.calls = 0

    def features(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.frozen(images)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        error = (self.learned(self.features(images)) - self.features(images)).square().mean(dim=1, keepdim=True)
        anomaly_map = F.interpolate(error, size=images.shape[-2:])
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=anomaly_map.amax(dim=(1, 2, 3)))


class Cached(OneClassDefaults, TinyModel):
    """The model."""

    def __init__(self, cache="auto", cache_budget=None, trained=False, **components) -> None:
        super().__init__(**components)
        self.feature_cache = FeatureCache(cache, cache_budget)
        self.model = FrozenNet(trained)

    def training_step(self, batch, _batch_idx):
        images, features = self.feature_cache(batch, lambda images: [images, self.model.features(images)])
        return F.mse_loss(self.model.learned(F.dropout(features, 0.3)), features + images.mean())
