"""EfficientAD's networks, maps and scores: Anomalib's, with what every model of this pack keeps.

Paper: Batzner et al., "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies", WACV 2024,
https://arxiv.org/abs/2303.14535. No code is published; Anomalib's ``EfficientAdModel`` follows the paper.
Status: the same maps and scores as Anomalib's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from anomalib.data import InferenceBatch
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, reduce_tensor_elems
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

HARD = 0.999  # p_hard, quantile of the distances from which on they count (Alg. 1, line 19)
MINIMUM_SIZE = 256  # the autoencoder's EncConv-6 needs an 8 x 8 input, five halvings away from the image (Table 3)


class DistilledEfficientAdModel(EfficientAdModel):
    """Anomalib's EfficientAD with frozen parameters marked as such, a checked image size and one score per image.

    Arguments are those of Anomalib's model. Images are RGB in [0, 1]; the networks normalise them themselves.

    Example:
        >>> model = DistilledEfficientAdModel(teacher_out_channels=8).eval()
        >>> model(torch.rand(1, 3, 256, 256)).pred_score.shape
        torch.Size([1])
    """

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)
        # Without gradients they must not wait for any: training in several processes would stop.
        for frozen in (self.teacher, self.mean_std, self.quantiles):
            frozen.requires_grad_(requires_grad=False)

    def check_image_size(self, size: Sequence[int]) -> None:
        """Check that the networks can take images of this (height, width).

        Raises:
            ValueError: If a side is below 256.
        """
        if min(size) < MINIMUM_SIZE:
            msg = (
                f"EfficientAD takes images of at least {MINIMUM_SIZE} x {MINIMUM_SIZE} pixels, got {tuple(size)} "
                "(height, width). Set the pre-processor's Resize accordingly."
            )
            raise ValueError(msg)

    def forward(
        self, batch: torch.Tensor, batch_imagenet: torch.Tensor | None = None, normalize: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | InferenceBatch:
        """Run the model.

        Args:
            batch: RGB in [0, 1], (B, 3, H, W).
            batch_imagenet: Penalty images of the same kind and size, needed in training mode.
            normalize: Normalise the maps with the quantiles of normal validation images.

        Returns:
            In training mode the losses of student and teacher, of the autoencoder, and of student and autoencoder; in
            eval mode the anomaly map (B, 1, H, W) and the image score (B,).

        Raises:
            ValueError: If the networks cannot take images of this size.
        """
        self.check_image_size(batch.shape[-2:])
        result = super().forward(batch, batch_imagenet, normalize)
        if self.training:
            return result
        return InferenceBatch(pred_score=result.pred_score.flatten(), anomaly_map=result.anomaly_map)  # Anomalib: Bx1

    def compute_losses(
        self, batch: torch.Tensor, batch_imagenet: torch.Tensor, distance_st: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute Anomalib's losses without waiting for a value (Alg. 1, lines 19 to 37).

        Args:
            batch: RGB in [0, 1], (B, 3, H, W).
            batch_imagenet: Penalty images of the same kind and size.
            distance_st: Squared differences of student and teacher, (B, C, h, w).

        Returns:
            The losses of student and teacher, of the autoencoder, and of student and autoencoder.
        """
        channels = self.teacher_out_channels
        distances = reduce_tensor_elems(distance_st)
        hard = distances >= torch.quantile(distances, HARD)
        penalty = self.student(batch_imagenet)[:, :channels].square().mean()
        loss_st = (distances * hard).sum() / hard.sum() + penalty

        augmented = self.choose_random_aug_image(batch)
        autoencoder = self.ae(augmented, batch.shape[-2:])
        with torch.no_grad():
            teacher = self._normalize_teacher(self.teacher(augmented))
        student = self.student(augmented)[:, channels:]
        return loss_st, (teacher - autoencoder).square().mean(), (autoencoder - student).square().mean()

    @staticmethod
    def choose_random_aug_image(image: torch.Tensor) -> torch.Tensor:
        """Change brightness, contrast or saturation as Anomalib does, drawn by Python (Alg. 1, lines 23 to 28)."""
        change = random.choice((adjust_brightness, adjust_contrast, adjust_saturation))
        return change(image, random.uniform(0.8, 1.2))
