"""EfficientAD's networks, maps and scores: Anomalib's, with what every model of this pack keeps.

Paper: Batzner et al., "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies", WACV 2024,
https://arxiv.org/abs/2303.14535. No code is published; Anomalib's ``EfficientAdModel`` follows the paper.
Status: the same maps and scores as Anomalib's (to 1e-5), in half precision too, in which Anomalib's cannot run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, reduce_tensor_elems
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

from anomalib_pack.folding import Folding, in_fast_layout
from anomalib_pack.precision import Float32State
from anomalib_pack.region import Polygons, build_region

HARD = 0.999  # p_hard, quantile of the distances from which on they count (Alg. 1, line 19)
PADDING = 4  # of maps at each edge, where Anomalib pads them: what convolutions without padding lose
MINIMUM_SIZE = 256  # the autoencoder's EncConv-6 needs an 8 x 8 input, five halvings away from the image (Table 3)
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # comments on Alg. 1 and 2
IMAGENET_STD = (0.229, 0.224, 0.225)


class PlainRgbNetwork(nn.Module):
    """One of Anomalib's networks without its normalisation, which its first convolution takes over.

    In eval mode it is not the images that are normalised, but that convolution's weights and bias (comments on Alg. 1).
    They are made anew in each pass, of the few thousand values that there are, and so are never out of date. Anomalib's
    normalisation turns images of half precision into float32, which no convolution of half precision takes.

    In eval mode without gradients a packed copy may stand in, see :mod:`anomalib_pack.folding`. On a CPU maps have the
    channels last, in which convolutions and pooling are faster; not the autoencoder's in training, because its dropout,
    which draws in the order of the memory, would draw otherwise than Anomalib's.

    Args:
        network: Whose layers become those of this one, under their names.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, layer in network.named_children():
            self.add_module(name, layer)
        self._folding = Folding()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def first(self, convolution: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        """Normalise RGB in [0, 1], (B, 3, H, W), and convolve it."""
        if self.training:
            return convolution((images - self.mean) / self.std)
        weight = convolution.weight / self.std
        # Not as a matrix product, which autocast would round.
        bias = convolution.bias - (weight * self.mean).sum(dim=(1, 2, 3))
        padded = in_fast_layout(pad_with_mean(images, convolution.padding[0]))
        return F.conv2d(padded, weight, bias, convolution.stride)


def pad_with_mean(images: torch.Tensor, width: int) -> torch.Tensor:
    """Pad plain RGB with ImageNet's mean colour, which the normalisation would make 0.

    Example:
        >>> pad_with_mean(torch.zeros(1, 3, 1, 1), width=1)[0, 0]
        tensor([[0.4850, 0.4850, 0.4850],
                [0.4850, 0.0000, 0.4850],
                [0.4850, 0.4850, 0.4850]])
    """
    if width == 0:
        return images
    channels = zip(images.split(1, dim=1), IMAGENET_MEAN, strict=True)
    return torch.cat([F.pad(channel, 4 * [width], value=mean) for channel, mean in channels], dim=1)


class PatchDescriptionNetwork(PlainRgbNetwork):
    """Teacher or student of either size (Tables 1 and 2)."""

    def forward(self, images: torch.Tensor, channels: slice | None = None) -> torch.Tensor:
        """Describe patches.

        Args:
            images: RGB in [0, 1], (B, 3, H, W).
            channels: The ones to compute, of all C.

        Returns:
            Descriptions, (B, C, h, w), or these channels of them.
        """
        # Where a copy stands in, nobody sees what is overwritten: neither hooks nor gradients.
        return self._folding.run(
            self, images, lambda network, images: network.describe(images, channels, in_place=network is not self)
        )

    def describe(self, images: torch.Tensor, channels: slice | None, in_place: bool) -> torch.Tensor:
        """As :meth:`forward`; ``in_place`` says whether to overwrite what convolutions give."""
        first, second, *hidden, last = (layer for layer in self.children() if isinstance(layer, nn.Conv2d))
        maps = self.avgpool1(F.relu(self.first(first, in_fast_layout(images)), in_place))
        maps = self.avgpool2(F.relu(second(maps), in_place))
        for convolution in hidden:
            maps = F.relu(convolution(maps), in_place)
        if channels is None:
            return last(maps)
        return F.conv2d(maps, last.weight[channels], last.bias[channels])


class Teacher(PatchDescriptionNetwork):
    """Frozen, and so always in eval mode, in which it can be packed; nothing in it depends on the mode."""

    def train(self, _mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        self._folding.clear()  # notices changes through `.data`
        return super().train(mode=False)


class AutoEncoder(PlainRgbNetwork):
    """Autoencoder (Table 3)."""

    def forward(self, images: torch.Tensor, image_size: Sequence[int]) -> torch.Tensor:
        """RGB in [0, 1], (B, 3, H, W) -> (B, C, h, w) in float32: squared differences would overflow in float16."""
        return self._folding.run(self, images, lambda network, images: network.describe(images, image_size)).float()

    def describe(self, images: torch.Tensor, image_size: Sequence[int]) -> torch.Tensor:
        """Compute what :meth:`forward` gives, in the precision of the network."""
        first, *hidden, last = self.encoder.children()
        maps = F.relu(self.first(first, images))
        for convolution in hidden:
            maps = F.relu(convolution(maps))
        return self.decoder(last(maps), image_size)


class Float32ParameterDict(Float32State, nn.ParameterDict):
    """Measured numbers that stay in float32; what is computed with them is in float32 as well."""


class DistilledEfficientAdModel(EfficientAdModel):
    """Anomalib's EfficientAD for any precision, with frozen parameters marked, a checked image size, a score per image.

    Images are RGB in [0, 1]; the networks normalise them themselves.

    Args:
        *arguments: Those of Anomalib's model.
        region: What of the image counts, see :func:`~anomalib_pack.region.build_region`.
        **keywords: Those of Anomalib's model.

    Example:
        >>> model = DistilledEfficientAdModel(teacher_out_channels=8).eval()
        >>> model(torch.rand(1, 3, 256, 256)).pred_score.shape
        torch.Size([1])
    """

    def __init__(self, *arguments: object, region: Polygons | str | Path | None = None, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)
        self.region = build_region(region)
        self.border = PADDING if self.pad_maps else 0
        self.teacher = Teacher(self.teacher).eval()
        self.student = PatchDescriptionNetwork(self.student)
        self.ae = AutoEncoder(self.ae)
        self.mean_std = Float32ParameterDict(self.mean_std)
        self.quantiles = Float32ParameterDict(self.quantiles)
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
            eval mode the anomaly map (B, 1, H, W) and the image score (B,), in float32 whatever the precision.

        Raises:
            ValueError: If the networks cannot take images of this size.
        """
        self.check_image_size(batch.shape[-2:])
        if self.training:
            batch = self.region.fill(batch)
            # Each loss takes one half of the student's features: the other one is not computed for it.
            student = self.student(batch, slice(self.teacher_out_channels))
            return self.compute_losses(batch, batch_imagenet, (self._describe(batch) - student).square())
        return combine(*self.get_maps(batch, normalize))

    def with_branch_scores(self, images: torch.Tensor) -> tuple[InferenceBatch, dict[str, torch.Tensor]]:
        """Run the model in eval mode, with the maximum (B,) of each of the two maps that it averages."""
        self.check_image_size(images.shape[-2:])
        student, autoencoder = self.get_maps(images, normalize=True)
        scores = {"student": student.amax(dim=(1, 2, 3)), "autoencoder": autoencoder.amax(dim=(1, 2, 3))}
        return combine(student, autoencoder), scores

    def teacher_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of the teacher that count, (B, C, h, w) or those in the region, before they are normalised."""
        return self.region.take(self.teacher(self.region.fill(images)), self.border)

    def get_maps(self, batch: torch.Tensor, normalize: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps of student and autoencoder, (B, 1, H, W) each, of RGB in [0, 1], (B, 3, H, W)."""
        return super().get_maps(self.region.fill(batch), normalize)

    def compute_maps(
        self, batch: torch.Tensor, student_output: torch.Tensor, distance_st: torch.Tensor, normalize: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute Anomalib's maps, with what lies in the region (Alg. 2).

        Args:
            batch: RGB in [0, 1], (B, 3, H, W).
            student_output: Both halves of the student's features, (B, 2 C, h, w).
            distance_st: Squared differences of student and teacher, (B, C, h, w).
            normalize: Normalise the maps with the quantiles of normal validation images, if they were measured.

        Returns:
            Maps of student and autoencoder, (B, 1, H, W) each.
        """
        size = batch.shape[-2:]
        with torch.no_grad():
            autoencoder = self.ae(batch, size)
            distance_stae = (autoencoder - student_output[:, self.teacher_out_channels :]) ** 2
        maps = []
        for name, distances in (("st", distance_st), ("ae", distance_stae)):
            averages = distances.mean(dim=1, keepdim=True)
            smoothed = self.region.smooth(averages, lambda maps: self._full_size(maps, size), border=self.border)
            cleared = self.region.clear(smoothed)
            maps.append(self._normalized(cleared, name) if normalize else cleared)
        return maps[0], maps[1]

    def _full_size(self, maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return F.interpolate(F.pad(maps, 4 * [self.border]), size=size, mode="bilinear")

    def _normalized(self, maps: torch.Tensor, name: str) -> torch.Tensor:
        """Map both quantiles to 0 and 0.1; without a branch on their values, for exports."""
        measured = self._is_set_tensor(self.quantiles)
        lower, upper = self.quantiles[f"qa_{name}"], self.quantiles[f"qb_{name}"]
        spread = torch.where(measured, upper - lower, torch.ones_like(lower))
        return torch.where(measured, 0.1 * (maps - lower) / spread, maps)

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
        distances = reduce_tensor_elems(self.region.take(distance_st, self.border))
        hard = distances >= torch.quantile(distances, HARD)
        penalty = self.student(batch_imagenet, slice(self.teacher_out_channels)).square().mean()
        loss_st = (distances * hard).sum() / hard.sum() + penalty

        augmented = self.choose_random_aug_image(batch)
        autoencoder = self.ae(augmented, batch.shape[-2:])
        teacher = self._describe(augmented)
        student = self.student(augmented, slice(self.teacher_out_channels, None))
        teacher, autoencoder, student = (
            self.region.take(features, self.border) for features in (teacher, autoencoder, student)
        )
        return loss_st, (teacher - autoencoder).square().mean(), (autoencoder - student).square().mean()

    @torch.no_grad()
    def _describe(self, images: torch.Tensor) -> torch.Tensor:
        """The teacher's normalised features, (B, C, h, w)."""
        return self._normalize_teacher(self.teacher(images))

    @staticmethod
    def choose_random_aug_image(image: torch.Tensor) -> torch.Tensor:
        """Change brightness, contrast or saturation as Anomalib does, drawn by Python (Alg. 1, lines 23 to 28)."""
        change = random.choice((adjust_brightness, adjust_contrast, adjust_saturation))
        return change(image, random.uniform(0.8, 1.2))


def combine(student: torch.Tensor, autoencoder: torch.Tensor) -> InferenceBatch:
    """Average the maps (B, 1, H, W) of student and autoencoder; the maximum is the score (Alg. 2, lines 10 and 11)."""
    anomaly_map = 0.5 * student + 0.5 * autoencoder
    return InferenceBatch(pred_score=anomaly_map.amax(dim=(1, 2, 3)), anomaly_map=anomaly_map)
