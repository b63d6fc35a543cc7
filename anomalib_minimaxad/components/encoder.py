"""The frozen encoders: UniRepLKNet, or any timm network with features at strides 4, 8 and 16 (Sec. 3.3).

Status: UniRepLKNet is exact to the published code, up to its third stage; the fourth is not used. Parameters have its
names. The table of its sizes is checked for N alone: see ``VARIANTS``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from huggingface_hub import hf_hub_download
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.backbones import FrozenBackbone, check_name, load_fitting, read_state_dict
from anomalib_pack.checks import require

from .blocks import Block, ChannelNorm, FoldedSequential

logger = logging.getLogger(__name__)

HUB_REPOSITORY = "DingXiaoH/UniRepLKNet"
TIMM_PREFIX = "timm:"
STRIDES = (4, 8, 16)  # of the three features
# Parts of UniRepLKNet behind its third stage, and the classifier: in the files, not in the encoder.
UNUSED_PARTS = ("downsample_layers.3.", "stages.3.", "norm3.", "norm.", "head.")
OUTPUT_NORMS = ("norm0.", "norm1.", "norm2.")  # for dense prediction; files of trained classifiers lack them


class Variant(NamedTuple):
    """One of the published sizes of UniRepLKNet."""

    depths: tuple[int, int, int]  # of the first three stages
    bottleneck_depth: int  # of the fourth, which the bottleneck copies
    width: int  # channels of the first stage; each stage doubles them
    file: str  # of weights on the hub, trained on ImageNet-1K at 224 x 224
    alternating: bool = False  # every other block of the third stage has a 3 x 3 kernel


# N is verified: depths, widths, kernels and name of the file are those of MiniMaxAD's published code. A, F, P and T,
# with T's alternating kernels, are UniRepLKNet's published tables from memory and not verified: neither the paper nor
# timm has them, and no file was at hand. A wrong name fails the download, a wrong size or kernel ``load_weights``.
VARIANTS = {
    "unireplknet_a": Variant((2, 2, 6), 2, 40, "unireplknet_a_in1k_224_acc77.03.pth"),
    "unireplknet_f": Variant((2, 2, 6), 2, 48, "unireplknet_f_in1k_224_acc78.58.pth"),
    "unireplknet_p": Variant((2, 2, 6), 2, 64, "unireplknet_p_in1k_224_acc80.23.pth"),
    "unireplknet_n": Variant((2, 2, 8), 2, 80, "unireplknet_n_in1k_224_acc81.64.pth"),  # paper
    "unireplknet_t": Variant((3, 3, 18), 3, 80, "unireplknet_t_in1k_224_acc83.21.pth", alternating=True),
}


def stages(
    depths: Sequence[int], channels: Sequence[int], large: bool, grn: bool, alternating: bool = False
) -> nn.ModuleList:
    """Blocks of the three scales, the finest first, which encoder and decoder have alike.

    Args:
        depths: Number of blocks for each scale.
        channels: Channels of each scale.
        large: 13 x 13 kernels in the second and third; the finest always has 3 x 3 ones (Sec. 3.3).
        grn: Blocks with GRN.
        alternating: Only every other block of the third has a large kernel (UniRepLKNet-T).
    """

    def is_large(scale: int, index: int) -> bool:
        return large and scale > 0 and not (alternating and scale == 2 and index % 2 == 1)

    return nn.ModuleList(
        nn.Sequential(*(Block(width, is_large(scale, index), grn) for index in range(depth)))
        for scale, (depth, width) in enumerate(zip(depths, channels, strict=True))
    )


class UniRepLKNet(nn.Module):
    """First three stages of UniRepLKNet, never trained.

    Images are normalised with ImageNet's mean and standard deviation, so callers pass plain RGB. The network stays in
    eval mode, and so its blocks are merged once for a whole training.

    Args:
        depths: Number of blocks of each stage.
        width: Channels of the first stage; each stage doubles them.
        large: 13 x 13 kernels in the second and third stage (Table 5).
        grn: Blocks with GRN (Table 5).
        alternating: Only every other block of the third stage has a large kernel (UniRepLKNet-T).
        file: Name of the trained weights on the hub.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        depths: Sequence[int],
        width: int,
        large: bool = True,
        grn: bool = True,
        alternating: bool = False,
        file: str | None = None,
    ) -> None:
        super().__init__()
        self.channels = [width, 2 * width, 4 * width]
        # Of Table 5's networks only the default one has published weights.
        self.file = file if large and grn else None
        self.downsample_layers = nn.ModuleList(
            [
                FoldedSequential(
                    downsampling(3, width // 2), ChannelNorm(width // 2), nn.GELU(),
                    downsampling(width // 2, width), ChannelNorm(width),
                ),
                FoldedSequential(downsampling(width, 2 * width), ChannelNorm(2 * width)),
                FoldedSequential(downsampling(2 * width, 4 * width), ChannelNorm(4 * width)),
            ]
        )  # fmt: skip
        self.stages = stages(depths, self.channels, large, grn, alternating)
        for scale, channels in enumerate(self.channels):
            self.add_module(f"norm{scale}", ChannelNorm(channels))
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, _mode: bool = True) -> UniRepLKNet:
        """Stay in eval mode: BatchNorm statistics of a frozen network do not change."""
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract f_E.

        Args:
            images: RGB in [0, 1], (B, 3, H, W).

        Returns:
            Three tensors (B, C_k, H / stride_k, W / stride_k), strides 4, 8 and 16.
        """
        maps, features = (images - self.mean) / self.std, []
        for scale, (downsample, blocks) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            maps = blocks(downsample(maps))
            features.append(getattr(self, f"norm{scale}")(maps))
        return features

    def load_weights(self, weights: str | Path | None) -> None:
        """Load trained weights.

        Args:
            weights: ``"hub"`` for the published ImageNet weights, the path of a local ``.pth`` or ``.safetensors`` file
                of the same format, or ``None`` to leave the network as it is (random, unless loaded before). What the
                encoder does not use (fourth stage, classifier) is left out; the norms of the outputs, which
                classifiers lack, then stay at identity.

        Raises:
            FileNotFoundError: If the local file does not exist.
            ConnectionError: If the hub cannot be reached and its cache does not hold the weights.
            ValueError: If the weights do not fit, the message names the tensors; or if there are none on the hub.
        """
        if weights is None:
            return
        require("weights", weights, weights != "wheel", "'hub', None or a file for UniRepLKNet")
        path = self._download() if weights == "hub" else Path(weights)
        state = read_state_dict(path, ("model", "models", "state_dict"))
        used = {name: tensor for name, tensor in state.items() if not name.startswith(UNUSED_PARTS)}
        optional = [name for name in self.state_dict() if name.startswith(OUTPUT_NORMS)]
        load_fitting(self, used, str(path), "the encoder", optional=optional)

    def _download(self) -> Path:
        if self.file is None:
            msg = (
                "weights='hub' has ImageNet weights of the standard UniRepLKNets only, with grn=True and "
                "encoder_block='large': the paper trained those of Table 5 itself. Give weights a local file."
            )
            raise ValueError(msg)
        # The hub client raises various errors (requests, httpx, its own) when offline; all mean the same to a user.
        try:
            return Path(hf_hub_download(HUB_REPOSITORY, self.file))
        except Exception as error:
            msg = (
                f"Cannot download {self.file} from {HUB_REPOSITORY}: {error}. Give weights a local file, or use "
                "encoder='timm:tf_efficientnet_lite0' with weights='wheel'."
            )
            raise ConnectionError(msg) from error


def downsampling(in_channels: int, out_channels: int) -> nn.Conv2d:
    """3 x 3 convolution that halves the grid."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)


class TimmEncoder(FrozenBackbone):
    """A timm network's features at strides 4, 8 and 16, the last layer of each.

    Ours: they pass a LayerNorm over the channels at each location, as UniRepLKNet's do.

    Args:
        name: Name of the network.

    Raises:
        ValueError: If timm does not know it, or it lacks one of the strides (as ViTs do).
    """

    def __init__(self, name: str) -> None:
        check_name(name, "encoder", TIMM_PREFIX)
        with torch.device("meta"):  # without the tensors themselves
            info = timm.create_model(name, pretrained=False).feature_info
        layers = {entry["reduction"]: entry["module"] for entry in info}
        has = all(stride in layers for stride in STRIDES)
        require("encoder", TIMM_PREFIX + name, has, f"a network with features at strides {STRIDES}")
        super().__init__(name, [layers[stride] for stride in STRIDES], weights=None)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract f_E, three tensors (B, C_k, H / stride_k, W / stride_k), from RGB in [0, 1], (B, 3, H, W)."""
        return [
            F.layer_norm(maps.permute(0, 2, 3, 1), maps.shape[1:2]).permute(0, 3, 1, 2)
            for maps in super().forward(images)
        ]


def build_encoder(name: str, large: bool, grn: bool) -> UniRepLKNet | TimmEncoder:
    """Build the encoder of a name, without weights.

    Args:
        name: One of ``VARIANTS``, or ``timm:`` and the name of a timm network, for which ``large`` and ``grn`` mean
            nothing.
        large: 13 x 13 kernels in the second and third stage.
        grn: Blocks with GRN.

    Raises:
        ValueError: If there is no such encoder.
    """
    if name.startswith(TIMM_PREFIX):
        return TimmEncoder(name.removeprefix(TIMM_PREFIX))
    require("encoder", name, name in VARIANTS, f"one of {tuple(VARIANTS)}, or 'timm:' and the name of a timm network")
    variant = VARIANTS[name]
    return UniRepLKNet(variant.depths, variant.width, large, grn, variant.alternating, variant.file)
