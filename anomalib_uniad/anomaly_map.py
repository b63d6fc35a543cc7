"""Anomaly map and image score of UniAD (You et al., NeurIPS 2022), Sec. 3.3 and appendix C.3.

Status: exact to the published code with the loss ``"mse"``; the other two follow the appendix.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.region import WHOLE_IMAGE, WholeImage

POOLING = 16  # side of the average pooling before the maximum, in pixels of the image; published code


def reconstruction_error(features: torch.Tensor, reconstruction: torch.Tensor, kind: str) -> torch.Tensor:
    """Error at each location, in the sense of the loss that the model was trained with.

    Args:
        features: f_org, (B, C, h, w).
        reconstruction: f_rec, (B, C, h, w).
        kind: ``"mse"`` for Eq. 5, ``"normalized_mse"`` for the same on unit vectors (appendix C.3), ``"cosine"`` for
            the cosine distance (Eq. A3).

    Returns:
        (B, h, w), at least 0 (up to rounding); at most 2 for the last two.

    Example:
        >>> reconstruction_error(torch.zeros(1, 2, 1, 1), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), "mse")
        tensor([[[5.]]])
    """
    features, reconstruction = features.float(), reconstruction.float()  # half precision would merge scores
    if kind == "cosine":
        # Differs from the paper: Eq. A3 prints the cosine where its text says cosine distance.
        return 1 - F.cosine_similarity(features, reconstruction, dim=1)
    if kind == "normalized_mse":
        features, reconstruction = F.normalize(features, dim=1), F.normalize(reconstruction, dim=1)
    return torch.linalg.vector_norm(features - reconstruction, dim=1)  # Eq. 5


def full_size(error: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bring errors (B, h, w) to the size (H, W) of the image: (B, 1, H, W)."""
    return F.interpolate(error.unsqueeze(1), size=size, mode="bilinear", align_corners=True)


def image_score(anomaly_map: torch.Tensor, kind: str = "max", region: WholeImage = WHOLE_IMAGE) -> torch.Tensor:
    """Score images by their maps.

    Args:
        anomaly_map: (B, 1, H, W); for ``"max"`` H and W are at least 16.
        kind: ``"max"`` for the maximum of the averagely pooled map (Sec. 3.3), ``"mean"`` and ``"std"`` for mean and
            standard deviation of the map (published code; its authors take the mean for CIFAR-10).
        region: What counts of the map. For ``"max"``, windows of which at least a half is inside.

    Returns:
        (B,), at least 0.
    """
    if kind == "mean":
        return region.take(anomaly_map).mean(dim=(1, 2, 3))
    if kind == "std":
        return region.take(anomaly_map).std(dim=(1, 2, 3), correction=0)  # of all pixels, not of a sample
    return region.smooth(anomaly_map, pooled, least=0.5).amax(dim=(1, 2, 3))


def pooled(anomaly_map: torch.Tensor) -> torch.Tensor:
    """Means of windows of a map, one at each pixel where a window fits."""
    columns = F.avg_pool2d(anomaly_map, (POOLING, 1), stride=1)  # of which each is averaged once, not for each window
    return F.avg_pool2d(columns, (1, POOLING), stride=1)
