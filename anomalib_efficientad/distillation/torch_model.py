"""What a teacher learns: PatchCore's features.

Paper: Batzner et al., "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies", WACV 2024,
https://arxiv.org/abs/2303.14535, supplement, Sec. 1.2 and Algorithm 3. No code of the distillation is published.
The features: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022,
https://arxiv.org/abs/2106.08265; published code https://github.com/amazon-science/patchcore-inspection (facts only).
Status: PatchCore's post-processing as one convolution for each layer, equal up to rounding.

Shapes: B images, C channels of a layer, h x w its grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.backbones import FrozenBackbone

PATCH_SIZE = 3  # PatchCore, Sec. 3.1; default of its published code
LAYER_CHANNELS = 1024  # default of PatchCore's published code: "pretrain_embed_dimension"


def averaging(inputs: int, outputs: int) -> torch.Tensor:
    """Matrix (outputs, inputs) of adaptive average pooling: each output is the mean of neighbouring inputs.

    Example:
        >>> averaging(3, 2)
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 0.5000, 0.5000]])
    """
    matrix = torch.zeros(outputs, inputs)
    for row in range(outputs):
        start, end = row * inputs // outputs, -(-(row + 1) * inputs // outputs)  # rounded down and up
        matrix[row, start:end] = 1 / (end - start)
    return matrix


def patch_kernels(layer_channels: Sequence[int], channels: int) -> list[torch.Tensor]:
    """Convolution kernels of PatchCore's post-processing, one (channels, C, 3, 3) for each layer.

    PatchCore flattens the 3 x 3 patch around each location (zeros outside the map), channel by channel and row by row,
    averages its C * 9 numbers to 1024 for each layer, joins the layers and averages again. Each step is linear.
    """
    joined = averaging(len(layer_channels) * LAYER_CHANNELS, channels)
    return [
        (part @ averaging(count * PATCH_SIZE**2, LAYER_CHANNELS)).unflatten(1, (count, PATCH_SIZE, PATCH_SIZE))
        for count, part in zip(layer_channels, joined.split(LAYER_CHANNELS, dim=1), strict=True)
    ]


class PatchFeatures(nn.Module):
    """Psi: what PatchCore gives its coreset selection, on the grid of the first layer (Sec. 1.2).

    PatchCore's way through patches and averages is a convolution of each layer; the coarser layers' results are resized
    where PatchCore resizes their patches, which is the same, and all are summed. That needs a fraction of the memory.

    Args:
        backbone: Name of a timm network.
        layers: Layers of it, the finest grid first.
        weights: See :meth:`anomalib_pack.backbones.FrozenBackbone.load_weights`.
        channels: Length of a feature vector.

    Raises:
        ValueError: If timm does not know the network or the layers, or another layer has a finer grid than the first.

    Example:
        >>> features = PatchFeatures("resnet18", ["layer2", "layer3"], weights=None, channels=24)
        >>> features(torch.rand(1, 3, 64, 96)).shape
        torch.Size([1, 24, 8, 12])
    """

    def __init__(self, backbone: str, layers: Sequence[str], weights: str | Path | None, channels: int = 384) -> None:
        super().__init__()
        self.backbone = FrozenBackbone(backbone, layers, weights)
        if min(self.backbone.strides) != self.backbone.strides[0]:
            msg = f"layers must start with the finest grid, got {list(layers)} with strides {self.backbone.strides}."
            raise ValueError(msg)
        for index, kernel in enumerate(patch_kernels(self.backbone.channels, channels)):
            self.register_buffer(f"kernel{index}", kernel, persistent=False)

    @property
    def stride(self) -> int:
        """Pixels between two locations of the grid."""
        return int(self.backbone.strides[0])

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Describe images: RGB in [0, 1], (B, 3, H, W) -> (B, channels, H / stride, W / stride)."""
        parts = [
            F.conv2d(maps, self.get_buffer(f"kernel{index}"), padding=PATCH_SIZE // 2)
            for index, maps in enumerate(self.backbone(images))
        ]
        grid = parts[0].shape[-2:]
        # Bilinear without aligned corners: PatchCore's published code.
        same_grid = [parts[0], *(F.interpolate(coarser, size=grid, mode="bilinear") for coarser in parts[1:])]
        return torch.stack(same_grid).sum(dim=0)
