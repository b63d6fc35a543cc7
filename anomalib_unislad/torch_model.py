"""UniSLAD: two extractors, memory banks of patches, distributions of images.

Source: "UniSLAD", Sec. III; the authors' repository holds tables only, so this is the first public implementation.
Status: the equations are exact; where the paper leaves room, the reading stands in the docstring of its part, and in
the README's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn.functional import interpolate

from anomalib_pack.backbones import FrozenBackbone, check_name
from anomalib_pack.blur import gaussian_blur
from anomalib_pack.checks import require
from anomalib_pack.neighbors import NearestNeighbors
from anomalib_pack.precision import Float32State
from anomalib_pack.region import Polygons, build_region
from anomalib_pack.tiling import TakesTiles

from .anomaly_map import class_similarity, fuse
from .components import (
    AGGREGATIONS,
    POOLINGS,
    LocalAggregator,
    NominalDistribution,
    Whitening,
    image_vector,
    pooled_values,
)

# The authors' table: outputs of WideResNet50-2.
BLOCKS = (
    *("layer1.0", "layer1.1", "layer1.2"),
    *("layer2.0", "layer2.1", "layer2.2", "layer2.3"),
    *("layer3.1", "layer3.2", "layer3.3", "layer3.4", "layer3.5"),
    "layer4.0",
)
SCORES = ("local", "global", "class", "patch")  # order of the statistics of scores
SIGMA = 4  # of the Gaussian, in pixels of the image
BLUR_WIDTH = 33  # PatchCore: it ends four sigmas from its centre


class Features(NamedTuple):
    """What the extractors see in images; ``None`` for an extractor that is switched off."""

    local_patches: torch.Tensor | None  # (B, D_l, h, w), Eq. 2
    global_patches: torch.Tensor | None  # (B, D_g, h', w'), Eq. 4
    class_token: torch.Tensor | None  # (B, D_g), Eq. 4


class Vectors(NamedTuple):
    """One vector for each image and kind, Eqs. 12 to 14; ``None`` for what is switched off."""

    local_vector: torch.Tensor | None  # (B, 2 D_l)
    global_vector: torch.Tensor | None  # (B, 2 D_g)
    class_token: torch.Tensor | None  # (B, D_g)


class Detection(NamedTuple):
    """What is detected in images or tiles; ``None`` for what is switched off."""

    score: torch.Tensor  # S, (B,), Eq. 21
    anomaly_map: torch.Tensor | None  # (B, 1, H, W)
    logical: torch.Tensor | None  # S_i, (B,), Eq. 20
    patch: torch.Tensor | None  # (B,)


class PatchBank(Float32State, nn.Module):
    """Memory bank M of transformed features, and distances from it (Eqs. 11 and 16)."""

    def __init__(
        self, dimension: int, shrinkage: float, whitening: bool, unit_length: bool, search: str, index: str
    ) -> None:
        super().__init__()
        self.whitening = Whitening(dimension, shrinkage, whitening, unit_length)
        self.neighbors = NearestNeighbors(search, index)

    def fit(self, features: torch.Tensor) -> None:
        """Take the selected features (n, D)."""
        self.whitening.fit(features)
        self.neighbors.bank = self.whitening(features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Distances (n,) of features (n, D) from their nearest entries."""
        distances, _ = self.neighbors(self.whitening(features))
        return distances[:, 0]


class UnisladModel(TakesTiles):
    """UniSLAD (Fig. 2). Images are RGB in [0, 1], (B, 3, H, W), with sides that are multiples of the ViT's patches.

    Args:
        backbone: timm CNN.
        blocks: Its modules whose outputs are joined; the first one's grid is that of the local patches.
        vit: timm ViT with a class token.
        vit_layer: Number of blocks l of the ViT, Eq. 4.
        weights: Weights of the CNN, see :meth:`anomalib_pack.backbones.FrozenBackbone.load_weights`.
        vit_weights: Weights of the ViT.
        local_dim: Length of local patch features.
        patch_size: Side p of a patch's neighbourhood, odd.
        aggregation: See :class:`~anomalib_unislad.components.LocalAggregator`.
        w_i: Weight of the global part in Eq. 20.
        w_ig: Weight of the class token in the global part of Eq. 20.
        w: Weight of the patch score in Eq. 21.
        trim: alpha of Eq. 13.
        power: q of Eq. 12.
        pooling: See :func:`~anomalib_unislad.components.image_vector`.
        shrinkage: See :class:`~anomalib_unislad.components.Whitening`.
        search: See :class:`anomalib_pack.neighbors.NearestNeighbors`.
        index: See there.
        use_cnn: Local features.
        use_vit: Global features and class token.
        whitening: Eqs. 6 to 9, of patches; with ``unit_length`` of class tokens too.
        unit_length: Eq. 10.
        patch_bank: Patch score and anomaly map.
        image_distribution: Image vectors' scores.
        region: What of the image counts, see :func:`~anomalib_pack.region.build_region`.

    Raises:
        ValueError: If a value is impossible; the message names the argument.
    """

    score_mean: torch.Tensor
    score_std: torch.Tensor

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        blocks: Sequence[str] = BLOCKS,
        vit: str = "vit_base_patch16_224",
        vit_layer: int = 12,
        weights: str | Path | None = "hub",
        vit_weights: str | Path | None = "hub",
        *,
        local_dim: int = 1024,
        patch_size: int = 3,
        aggregation: str = "patchcore",
        w_i: float = 0.5,
        w_ig: float = 0.5,
        w: float = 0.5,
        trim: float = 0.05,
        power: int = 3,
        pooling: str = "lum+pmp",
        shrinkage: float = 1e-2,
        search: str = "auto",
        index: str = "auto",
        use_cnn: bool = True,
        use_vit: bool = True,
        whitening: bool = True,
        unit_length: bool = False,
        patch_bank: bool = True,
        image_distribution: bool = True,
        region: Polygons | str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"w_i": w_i, "w_ig": w_ig, "w": w}.items():
            require(name, value, 0 <= value <= 1, "between 0 and 1")
        require("trim", trim, 0 <= trim < 0.5, "at least 0 and below 0.5")
        require("power", power, power >= 1, "at least 1")
        require("pooling", pooling, pooling in POOLINGS, f"one of {POOLINGS}")
        require("patch_size", patch_size, patch_size >= 1 and patch_size % 2 == 1, "odd and at least 1")
        require("aggregation", aggregation, aggregation in AGGREGATIONS, f"one of {AGGREGATIONS}")
        require("shrinkage", shrinkage, shrinkage > 0, "above 0")
        require("use_vit", use_vit, use_cnn or use_vit, "True with use_cnn=False")
        require("image_distribution", image_distribution, patch_bank or image_distribution, "True without patch_bank")
        self.w_i, self.w_ig, self.w = w_i, w_ig, w
        self.trim, self.power, self.pooling = trim, power, pooling
        self.region = build_region(region)
        self.size_step = 1
        self.backbone = self.aggregator = self.vit = self.local_bank = self.global_bank = self.class_bank = None
        self.local_distribution = self.global_distribution = self.class_distribution = None
        spread = 2 if pooling == "lum+pmp" else 1  # length of an image vector in units of a patch feature's

        if use_cnn:
            self.backbone = FrozenBackbone(backbone, blocks, weights)
            total = pooled_values(self.backbone.channels, patch_size, aggregation)
            require("local_dim", local_dim, 1 <= local_dim <= total, f"from 1 to the blocks' {total} values of a patch")
            self.aggregator = LocalAggregator(self.backbone.channels, local_dim, patch_size, aggregation)
            if patch_bank:
                self.local_bank = PatchBank(local_dim, shrinkage, whitening, unit_length, search, index)
            if image_distribution:
                self.local_distribution = NominalDistribution(spread * local_dim, shrinkage)
        if use_vit:
            self.vit = build_vit(vit, vit_layer, vit_weights)
            [dimension], [self.size_step] = self.vit.channels, self.vit.strides
            if patch_bank:
                self.global_bank = PatchBank(dimension, shrinkage, whitening, unit_length, search, index)
                # Eq. 17's f_t^c has no hat, unlike Eq. 16's: its tokens are plain, unless the paper is read literally.
                literal = whitening and unit_length
                self.class_bank = PatchBank(dimension, shrinkage, literal, unit_length, "torch", "flat")
            if image_distribution:
                self.global_distribution = NominalDistribution(spread * dimension, shrinkage)
                self.class_distribution = NominalDistribution(dimension, shrinkage)
        # Ours: the paper does not say how distances of different kinds come to one scale.
        self.register_buffer("score_mean", torch.zeros(len(SCORES)))
        self.register_buffer("score_std", torch.ones(len(SCORES)))

    @property
    def has_banks(self) -> bool:
        """Whether there are patch-level memory banks."""
        return self.local_bank is not None or self.global_bank is not None

    @property
    def is_fitted(self) -> bool:
        """Whether memory banks and distributions hold something: by their shapes, which nobody has to wait for."""
        banks = [bank.neighbors.bank for bank in (self.local_bank, self.global_bank) if bank is not None]
        distributions = (self.local_distribution, self.global_distribution, self.class_distribution)
        spans = [distribution.directions for distribution in distributions if distribution is not None]
        return all(len(rows) > 0 for rows in (*banks, *spans))

    @property
    def scores_used(self) -> tuple[bool, ...]:
        """Which of ``SCORES`` the model has."""
        distributions = (self.local_distribution, self.global_distribution, self.class_distribution)
        return (*(distribution is not None for distribution in distributions), self.has_banks)

    def check_image_size(self, size: Sequence[int]) -> None:
        """Check that the networks can take images of this (height, width).

        Raises:
            ValueError: If a side is no multiple of the ViT's patches.
        """
        if any(side % self.size_step for side in size):
            msg = (
                f"Unislad with this ViT takes images with sides that are multiples of {self.size_step} pixels, got "
                f"{tuple(size)} (height, width). Set the pre-processor's Resize accordingly."
            )
            raise ValueError(msg)

    def extract(self, images: torch.Tensor) -> Features:
        """Steps 1 and 2: local patches, global patches and class token (Eqs. 1 to 4)."""
        self.check_image_size(images.shape[-2:])
        local_patches = self.aggregator(self.backbone(images)).float() if self.backbone else None
        if self.vit is None:
            return Features(local_patches, None, None)
        global_patches, class_token = self.vit.tokens(images)
        return Features(local_patches, global_patches.float(), class_token.float())

    def vectors(self, features: Features) -> Vectors:
        """Step 5: one vector for each image and kind (Eqs. 12 to 14)."""
        local, global_ = (
            None if patches is None else image_vector(self._rows(patches), self.pooling, self.power, self.trim)
            for patches in (features.local_patches, features.global_patches)
        )
        return Vectors(local, global_, features.class_token)

    def _rows(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (B, D, h, w) that count, (B, n, D)."""
        return self.counted.take(patches).flatten(2).mT

    def fit(self, local_patches: torch.Tensor | None, global_patches: torch.Tensor | None, vectors: Vectors) -> None:
        """Steps 3 to 6, from the selected patches (n, D) and the vectors of all normal images."""
        selected = (local_patches, global_patches, vectors.class_token)
        for bank, entries in zip((self.local_bank, self.global_bank, self.class_bank), selected, strict=True):
            if bank is not None:
                bank.fit(entries)  # Eqs. 6 to 11
        distributions = (self.local_distribution, self.global_distribution, self.class_distribution)
        for distribution, rows in zip(distributions, vectors, strict=True):
            if distribution is not None:
                distribution.fit(rows)  # Eq. 15

    def patch_map(self, features: Features) -> torch.Tensor | None:
        """Step 7: S_p (B, 1, h, w) on the finer grid (Eqs. 16 to 18)."""
        local = global_ = weight = None
        if self.local_bank is not None:
            local = distance_map(self.local_bank, features.local_patches)
        if self.global_bank is not None:
            global_ = distance_map(self.global_bank, features.global_patches)
            weight = self.local_share(features.class_token).view(-1, 1, 1, 1)
        if local is not None and global_ is not None:
            grid = local.shape[-2:]
            global_ = self.counted.smooth(global_, lambda maps: resized(maps, grid))
        return fuse(global_, local, weight)

    def local_share(self, class_token: torch.Tensor) -> torch.Tensor:
        """w_p (B,) of class tokens (B, D): Eq. 17."""
        return class_similarity(self.class_bank.whitening(class_token), self.class_bank.neighbors.bank)

    def raw_scores(self, features: Features, patch_map: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Step 8, first half: the scores (B,) in the order of ``SCORES``, each on its own scale (Eqs. 16 and 19)."""
        scores: list[torch.Tensor | None] = [None, None, None]
        distributions = (self.local_distribution, self.global_distribution, self.class_distribution)
        if any(distributions):
            vectors = self.vectors(features)
            scores = [
                distribution(rows) if distribution is not None else None
                for distribution, rows in zip(distributions, vectors, strict=True)
            ]
        return [*scores, None if patch_map is None else self.counted.take(patch_map).amax(dim=(1, 2, 3))]

    def parts(self, raw: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Step 8, second half: the two parts (B,) of Eq. 21 from the scores, brought to one scale.

        Returns:
            S_i of Eq. 20, by which logical anomalies are found, and the patch score; ``None`` where it is switched off.
        """
        local, global_, class_token, patch = (
            score if score is None else (score - mean) / std
            for score, mean, std in zip(raw, self.score_mean, self.score_std, strict=True)
        )
        # Ours: S_ig has "the same structure as Eq. (18)"; which of the two takes w_ig is not said.
        of_vit = fuse(global_, class_token, self.w_ig)
        return fuse(local, of_vit, self.w_i), patch  # Eq. 20

    def image_score(self, raw: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """S (B,) from the scores (Eq. 21)."""
        return fuse(*self.parts(raw), self.w)  # pyrefly: ignore [bad-return]  # one of the two is there

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Detect anomalies.

        Args:
            images: RGB in [0, 1], (B, 3, H, W).

        Returns:
            Anomaly map (B, 1, H, W) of distances, at least 0 and with ``unit_length`` at most 2, or ``None`` without
            ``patch_bank``, and image scores (B,), of any sign.

        Raises:
            ValueError: If there is no memory bank yet, or the networks cannot take images of this size.
        """
        return self.with_branch_scores(images)[0]

    def with_branch_scores(self, images: torch.Tensor) -> tuple[InferenceBatch, dict[str, torch.Tensor]]:
        """Detect anomalies as :meth:`forward` does, with the scores (B,) of image and patches that Eq. 21 weighs."""
        if not self.is_fitted:
            self.check_image_size(images.shape[-2:])
            msg = "Unislad has no memory banks yet. Train it (one pass over the training images) or load a checkpoint."
            raise ValueError(msg)
        score, anomaly_map, logical, patch = self.over_tiles(images, self._detect)
        branches = {name: part for name, part in (("logical", logical), ("patch", patch)) if part is not None}
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map), branches

    def _detect(self, images: torch.Tensor) -> Detection:
        features = self.extract(images)
        with torch.autocast(images.device.type, enabled=False):  # half precision would merge scores
            patch_map = self.patch_map(features)
            raw = self.raw_scores(features, patch_map)
            score, parts = self.image_score(raw), self.parts(raw)
            if patch_map is None:
                return Detection(score, None, *parts)
            size = images.shape[-2:]
            smoothed = self.counted.smooth(patch_map, lambda maps: smooth(maps, size))
            return Detection(score, self.counted.clear(smoothed), *parts)


def resized(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bring maps (B, 1, h, w) to another size."""
    return interpolate(maps, size=size, mode="bilinear", align_corners=False)


def smooth(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Step 9, in the manner of PatchCore: bring maps (B, 1, h, w) to the size of the image and blur them."""
    return gaussian_blur(resized(maps, size), BLUR_WIDTH, SIGMA, border="reflect")


def build_vit(name: str, layer: int, weights: str | Path | None) -> FrozenBackbone:
    """Build the ViT that ends after ``layer`` blocks.

    Raises:
        ValueError: If there are not so many, or the network has no class token.
    """
    require("vit_layer", layer, layer >= 1, "at least 1")
    check_name(name, "vit")
    try:
        vit = FrozenBackbone(name, [f"blocks.{layer - 1}"], weights)
    except ValueError as error:
        msg = f"vit={name!r} with vit_layer={layer} and these weights cannot be built: {error}"
        raise ValueError(msg) from error
    has_class_token = getattr(vit.network, "cls_token", None) is not None
    require("vit", name, has_class_token, "a timm vision transformer with a class token")
    return vit


def distance_map(bank: PatchBank, patches: torch.Tensor) -> torch.Tensor:
    """Distances (B, 1, h, w) of patches (B, D, h, w) from a bank: Eq. 16."""
    return bank(patch_rows(patches)).view(patches[:, :1].shape)


def patch_rows(patches: torch.Tensor) -> torch.Tensor:
    """(B, D, h, w) -> (B h w, D), image after image and row after row."""
    return patches.permute(0, 2, 3, 1).flatten(0, 2)
