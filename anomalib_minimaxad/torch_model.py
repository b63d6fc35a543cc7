"""MiniMaxAD's networks, anomaly map and score.

Paper: Wang et al., "MiniMaxAD: A Lightweight Autoencoder for Feature-Rich Anomaly Detection".
Published code: https://github.com/WangFengJiee/MiniMaxAD (facts only; written from the paper); its blocks are those of
https://github.com/AILab-CVC/UniRepLKNet (Apache-2.0).
Status: agrees with the published code to 1e-4, merged or not. Where paper and code differ the code is the default,
because the paper's numbers come from it; each such place is marked and listed in the README.

Shapes: B images, H x W pixels; three scales k at strides 4, 8 and 16 with C_k channels and h_k x w_k locations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.backbones import load_fitting
from anomalib_pack.checks import require
from anomalib_pack.folding import Folding
from anomalib_pack.region import Polygons, WholeImage, build_region
from anomalib_pack.tiling import TakesTiles

from .anomaly_map import blur, cosine_distance, full_size_map, image_score
from .components import VARIANTS, Block, ChannelNorm, FoldedSequential, TimmEncoder, build_encoder, stages

BLOCKS = ("large", "small")
SIZE_STEP = 32  # stride of the bottleneck: from other sizes the decoder would come back with other grids
MINIMUM_SIZE = 64  # ours: a bottleneck of one location would leave BatchNorm with one value for an image


class Pyramids(NamedTuple):
    """What the networks make of a batch: three tensors each, (B, C_k, h_k, w_k), the finest first."""

    encoded: list[torch.Tensor]  # f_E
    decoded: list[torch.Tensor]  # f_D


class Bottleneck(nn.Module):
    """Condenses the three features into one at stride 32 (Sec. 3.1, Fig. 3a). Published parameter names.

    Args:
        channels: C_k.
        depth: Number of blocks.
        grn: Blocks with GRN.
    """

    def __init__(self, channels: Sequence[int], depth: int, grn: bool) -> None:
        super().__init__()
        first, second, third = channels
        self.conv1, self.bn1 = halving(first, second), nn.BatchNorm2d(second)
        self.conv2, self.bn2 = halving(second, third), nn.BatchNorm2d(third)
        self.conv3, self.bn3 = halving(second, third), nn.BatchNorm2d(third)
        self.conv4 = halving(3 * third, 2 * third)  # published code: neither norm nor activation behind it
        self.stages = nn.ModuleList([nn.Sequential(*(Block(2 * third, large=False, grn=grn) for _ in range(depth)))])
        self._folding = Folding()  # of the convolutions alone: the blocks do it themselves
        initialise(self)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B, C_k, h_k, w_k) for three scales -> (B, 2 C_3, h_3 / 2, w_3 / 2)."""
        return self.stages[0](self._folding.run(self, features, Bottleneck._condense))

    def _condense(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        first, second, third = features
        first = F.relu(self.bn1(self.conv1(first)))  # stride 4 -> 8
        first = F.relu(self.bn2(self.conv2(first)))  # stride 8 -> 16
        second = F.relu(self.bn3(self.conv3(second)))  # stride 8 -> 16
        # In the kernel's layout: its 5.5 million values would else be copied to that of the maps in each pass.
        return self.conv4(torch.cat([first, second, third], dim=1).contiguous())

    def train(self, mode: bool = True) -> Bottleneck:
        """Switch; the folded copy is made anew."""
        self._folding.clear()
        return super().train(mode)


def halving(in_channels: int, out_channels: int) -> nn.Conv2d:
    """3 x 3 convolution that halves the grid, without bias."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)


class Decoder(nn.Module):
    """Mirror of the encoder (Sec. 3.1, Fig. 3a). Published parameter names.

    Args:
        channels: C_k.
        depths: Number of blocks for each scale.
        large: 13 x 13 kernels in the second and third scale.
        grn: Blocks with GRN.
        alternating: Only every other block of the third scale has a large kernel.
    """

    def __init__(
        self, channels: Sequence[int], depths: Sequence[int], large: bool, grn: bool, alternating: bool = False
    ) -> None:
        super().__init__()
        widths = [2 * channels[2], *channels[::-1]]
        self.upsample_layers = nn.ModuleList(
            FoldedSequential(nn.ConvTranspose2d(wide, narrow, kernel_size=2, stride=2, bias=False), ChannelNorm(narrow))
            for wide, narrow in pairwise(widths)
        )
        self.stages = stages(depths, channels, large, grn, alternating)
        initialise(self)

    def forward(self, condensed: torch.Tensor) -> list[torch.Tensor]:
        """(B, 2 C_3, h_3 / 2, w_3 / 2) -> f_D: (B, C_k, h_k, w_k) for three scales, the finest first."""
        features = []
        for upsample, blocks in zip(self.upsample_layers, reversed(self.stages), strict=True):
            condensed = blocks(upsample(condensed))
            features.append(condensed)
        return features[::-1]


def initialise(network: nn.Module) -> None:
    """Initial weights of the trained networks: published code for convolutions, UniRepLKNet's for linear layers."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class MiniMaxAdModel(TakesTiles):
    """MiniMaxAD (Fig. 3a): frozen encoder, bottleneck, decoder, anomaly map and score.

    Images are RGB in [0, 1] with sides that are multiples of 32 and at least 64 pixels; the encoder normalises them
    itself. In eval mode the blocks run merged, and the parameters that were merged get no gradient.

    Args:
        encoder: ``"unireplknet_n"`` (paper), its sizes ``a``, ``f``, ``p`` and ``t``, or ``timm:`` and the name of a
            timm network with features at strides 4, 8 and 16.
        weights: Weights of the encoder, see ``load_weights`` of the encoders.
        grn: Blocks with GRN (Table 5).
        encoder_block: ``"large"`` (LarK) or ``"small"`` (SmaK) at strides 8 and 16 of the encoder (Table 5).
        decoder_block: The same in the decoder.
        top_ratio: Share of a map's pixels whose mean is the image score, 0 for the maximum.
        blur_width: Side of the Gaussian's window, odd.
        region: What of the image counts, see :func:`~anomalib_pack.region.build_region`.

    Raises:
        ValueError: If a value is impossible; the message names the argument.

    Example:
        >>> model = MiniMaxAdModel("unireplknet_a", weights=None).eval()
        >>> model(torch.rand(1, 3, 64, 64)).anomaly_map.shape
        torch.Size([1, 1, 64, 64])
    """

    def __init__(
        self,
        encoder: str = "unireplknet_n",
        weights: str | Path | None = "hub",
        *,
        grn: bool = True,
        encoder_block: str = "large",
        decoder_block: str = "large",
        top_ratio: float = 0.01,
        blur_width: int = 5,
        region: Polygons | str | Path | None = None,
    ) -> None:
        super().__init__()
        require("encoder_block", encoder_block, encoder_block in BLOCKS, f"one of {BLOCKS}")
        require("decoder_block", decoder_block, decoder_block in BLOCKS, f"one of {BLOCKS}")
        require("top_ratio", top_ratio, 0 <= top_ratio <= 1, "between 0 and 1")
        require("blur_width", blur_width, blur_width >= 1 and blur_width % 2 == 1, "odd and at least 1")
        self.top_ratio = top_ratio
        self.blur_width = blur_width
        self.region = build_region(region)
        self.encoder = build_encoder(encoder, encoder_block == "large", grn)
        of_timm = isinstance(self.encoder, TimmEncoder)
        fits = encoder_block == "large" or not of_timm
        require(
            "encoder_block", encoder_block, fits, "'large', the default, with a timm encoder: its blocks are its own"
        )
        self.encoder.load_weights(weights)
        variant = VARIANTS["unireplknet_n" if of_timm else encoder]  # ours: the paper's depths behind a timm encoder
        channels = self.encoder.channels
        self.bottleneck = Bottleneck(channels, variant.bottleneck_depth, grn)
        self.decoder = Decoder(channels, variant.depths, decoder_block == "large", grn, variant.alternating)

    @staticmethod
    def check_image_size(size: Sequence[int]) -> None:
        """Check that the networks can take images of this (height, width).

        Raises:
            ValueError: If a side is below 64 or no multiple of 32.
        """
        if any(side < MINIMUM_SIZE or side % SIZE_STEP for side in size):
            msg = (
                f"MiniMaxAd takes images with sides that are multiples of {SIZE_STEP} and at least {MINIMUM_SIZE} "
                f"pixels, got {tuple(size)} (height, width). Set the pre-processor's Resize accordingly."
            )
            raise ValueError(msg)

    def encode(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract f_E from RGB images in [0, 1], (B, 3, H, W).

        Raises:
            ValueError: If the networks cannot take images of this size.
        """
        self.check_image_size(images.shape[-2:])
        return self.encoder(images)

    def decode(self, encoded: list[torch.Tensor]) -> Pyramids:
        """Reconstruct f_E."""
        return Pyramids(encoded, self.decoder(self.bottleneck(encoded)))

    def forward(self, images: torch.Tensor) -> Pyramids | InferenceBatch:
        """Run the model.

        Args:
            images: RGB in [0, 1], (B, 3, H, W).

        Returns:
            In training mode what :class:`~anomalib_minimaxad.loss.MiniMaxAdLoss` takes; in eval mode the anomaly map
            (B, 1, H, W) and the image score (B,), from 0 to 2.
        """
        if self.training:
            return self.decode(self.encode(self.drawn(images)))
        result = self.over_tiles(images, self._detect)
        if self.tiler is None:
            return result
        return result._replace(anomaly_map=self._blur(result.anomaly_map, self.region))

    def _detect(self, images: torch.Tensor) -> InferenceBatch:
        """Score images; the map of a tile is not blurred yet, because the blur would darken its edges."""
        distances = [cosine_distance(*pair) for pair in zip(*self.decode(self.encode(images)), strict=True)]
        anomaly_map = full_size_map(distances, images.shape[-2:], self.counted)
        blurred = self._blur(anomaly_map, self.counted)
        score = image_score(self.counted.take(blurred), self.top_ratio)
        return InferenceBatch(pred_score=score, anomaly_map=blurred if self.tiler is None else anomaly_map)

    def _blur(self, anomaly_map: torch.Tensor, region: WholeImage) -> torch.Tensor:
        return region.clear(region.smooth(anomaly_map, lambda maps: blur(maps, self.blur_width)))

    def load_official_state_dict(self, checkpoint: dict[str, dict[str, torch.Tensor]]) -> None:
        """Load a trained bottleneck and decoder under the names of the published code.

        Args:
            checkpoint: ``{"bn": ..., "decoder": ...}`` with names such as ``conv1.weight`` and
                ``stages.0.0.dwconv.weight``. The encoder is not part of it: see ``load_weights`` of the encoders.

        Raises:
            ValueError: If a part or tensors are missing, foreign or of another shape; the message names them.
        """
        parts = {"bn": self.bottleneck, "decoder": self.decoder}
        require("checkpoint", list(checkpoint), parts.keys() <= checkpoint.keys(), f"a mapping with {list(parts)}")
        for name, network in parts.items():
            load_fitting(network, checkpoint[name], f"checkpoint[{name!r}]", f"the {type(network).__name__}")
