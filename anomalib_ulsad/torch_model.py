"""ULSAD networks, anomaly maps and scores.

Paper: Patra & Ben Taieb, "Revisiting Deep Feature Reconstruction for Logical and Structural Industrial Anomaly
Detection", TMLR 2024, https://openreview.net/forum?id=kdTC4ktHPD.
Published code: https://github.com/sukanyapatra1997/ULSAD-2024 (facts only; written from the paper).
Status: networks, losses and maps agree with the published code to 1e-4. Where paper and code differ the code is the
default, because the paper's numbers come from it; each such place is marked and listed in the README.

Shapes: B images, H x W pixels, C channels of the aggregated features, h x w their grid (H / 8 x W / 8 by default).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.backbones import FrozenBackbone
from anomalib_pack.folding import Folding
from anomalib_pack.region import Polygons, build_region
from anomalib_pack.tiling import TakesTiles

from .anomaly_map import feature_distance, normalise_map, smooth_map

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MINIMUM_SIZE = 256  # the autoencoder's Conv-6 needs an 8 x 8 input, five halvings away from the image
GRID_STEP = 4  # the reconstruction network halves the feature grid twice and doubles it back
UNMEASURED = (0.0, 0.1)  # (q_alpha, q_beta) for which t(M) = M
OFFICIAL_STATISTICS = (  # names in published checkpoints
    "mean_std.mean",
    "mean_std.std",
    "quantiles.qa_local",
    "quantiles.qb_local",
    "quantiles.qa_global",
    "quantiles.qb_global",
)


class Branches(NamedTuple):
    """What the networks make of a batch, each (B, C, h, w); ``None`` where the branch is switched off."""

    features: torch.Tensor  # U, normalised
    local_features: torch.Tensor  # U', FRN output of the local branch
    global_features: torch.Tensor | None  # U'', FRN output of the global branch
    autoencoder: torch.Tensor | None  # U hat


class BranchMaps(NamedTuple):
    """Anomaly maps of the two branches, each (B, 1, H, W); ``logical`` is ``None`` where no global branch runs."""

    structural: torch.Tensor  # M^l, Eq. 7
    logical: torch.Tensor | None  # M^g, Eq. 8
    highest: torch.Tensor | None = None  # (B,), of images in tiles: the maximum of all tiles' maps


def aggregate_features(features: Sequence[torch.Tensor], channels: int) -> torch.Tensor:
    """Concatenate feature maps on the grid of the first, then average neighbouring channels (Sec. 3.1).

    Args:
        features: One or more maps (B, C_l, h_l, w_l).
        channels: Number of channels that remain.

    Returns:
        Aggregated features (B, channels, h_1, w_1).

    Example:
        >>> aggregate_features([torch.rand(2, 6, 8, 8), torch.rand(2, 10, 4, 4)], channels=4).shape
        torch.Size([2, 4, 8, 8])
    """
    grid = features[0].shape[-2:]
    same_grid = [features[0], *(_resize(coarser, grid) for coarser in features[1:])]
    stacked = torch.cat(same_grid, dim=1)  # (B, sum C_l, h, w)
    tokens = stacked.permute(0, 2, 3, 1).flatten(1, 2)  # (B, h w, sum C_l)
    pooled = F.adaptive_avg_pool1d(tokens, channels)  # published code: pooled over channels, not over space
    return pooled.transpose(1, 2).reshape(-1, channels, *grid)


class FeatureReconstructionNetwork(nn.Module):
    """FRN (Sec. 3.2, Table 5): convolutional encoder and decoder on feature maps. Published parameter names.

    Args:
        channels: C.
        out_channels: C for the local branch alone, 2 C for U' and U'' together (Sec. 3.3).
        final_activation: ReLU on the output, as in Table 5 and the published code, although the zero-mean target has
            negative values that it can then never reach.
    """

    def __init__(self, channels: int, out_channels: int, final_activation: bool = True) -> None:
        super().__init__()
        c = channels
        self.conv1 = nn.Conv2d(c, 2 * c, kernel_size=3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(2 * c)
        self.conv2 = nn.Conv2d(2 * c, 4 * c, kernel_size=3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(4 * c)
        self.conv3 = nn.Conv2d(4 * c, 4 * c, kernel_size=3, padding=1)
        self.bn3 = nn.BatchNorm2d(4 * c)
        self.deconv1 = nn.ConvTranspose2d(4 * c, 2 * c, kernel_size=4, stride=2, padding=1)
        self.bn4 = nn.BatchNorm2d(2 * c)
        self.deconv2 = nn.ConvTranspose2d(2 * c, c, kernel_size=4, stride=2, padding=1)
        self.bn5 = nn.BatchNorm2d(c)
        # Differs from the paper: padding 2 keeps the grid, Table 5's padding 1 would grow it by 2.
        self.deconv3 = nn.ConvTranspose2d(c, out_channels, kernel_size=5, padding=2)
        self.bn6 = nn.BatchNorm2d(out_channels)
        self.final_activation = final_activation
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight, gain=nn.init.calculate_gain("leaky_relu"))  # published code

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Reconstruct: (B, C, h, w) -> (B, out_channels, h, w)."""
        encoded = F.relu(self.bn1(self.conv1(features)))
        encoded = F.relu(self.bn2(self.conv2(encoded)))
        # Differs from the paper: Table 5 has a ReLU here, the published code has none.
        encoded = self.bn3(self.conv3(encoded))
        decoded = F.relu(self.bn4(self.deconv1(encoded)))
        decoded = F.relu(self.bn5(self.deconv2(decoded)))
        decoded = self.bn6(self.deconv3(decoded))
        return F.relu(decoded) if self.final_activation else decoded


class GlobalAutoencoder(nn.Module):
    """Image to features through a 1 x 1 bottleneck (Sec. 3.3, Table 6). Published parameter names.

    Args:
        channels: C, the number of output channels.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enconv1 = nn.Conv2d(3, 32, kernel_size=4, stride=2, padding=1)
        self.enconv2 = nn.Conv2d(32, 32, kernel_size=4, stride=2, padding=1)
        self.enconv3 = nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1)
        self.enconv4 = nn.Conv2d(64, 64, kernel_size=4, stride=2, padding=1)
        self.enconv5 = nn.Conv2d(64, 64, kernel_size=4, stride=2, padding=1)
        self.enconv6 = nn.Conv2d(64, 64, kernel_size=8)  # differs from the paper: Table 6 pads by 1
        self.deconv1 = nn.Conv2d(64, 64, kernel_size=4, padding=2)
        self.deconv2 = nn.Conv2d(64, 64, kernel_size=4, padding=2)
        self.deconv3 = nn.Conv2d(64, 64, kernel_size=4, padding=2)
        self.deconv4 = nn.Conv2d(64, 64, kernel_size=4, padding=2)
        self.deconv5 = nn.Conv2d(64, 64, kernel_size=4, padding=2)
        self.deconv7 = nn.Conv2d(64, 64, kernel_size=3, padding=1)
        self.deconv8 = nn.Conv2d(64, channels, kernel_size=3, padding=1)
        for index, width in enumerate((32, 32, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64), start=1):
            self.add_module(f"bn2d{index}", nn.BatchNorm2d(width, eps=1e-4, affine=False))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Predict features from the image alone.

        Args:
            images: RGB in [0, 1], (B, 3, H, W), H and W at least 256.
            grid: (h, w) of the features to predict.

        Returns:
            Predicted features (B, C, h, w), not normalised by an activation.
        """
        hidden = (images - self.mean) / self.std
        for index in range(1, 7):
            hidden = self._block(f"enconv{index}", index, hidden)
        height, width = images.shape[-2:]
        # Differs from the paper: Table 6 resizes to 31, 8, 16, 32, 64, 32; the published code to these.
        for index, (fraction, less) in enumerate(((64, 1), (32, 0), (16, 1), (8, 1), (4, 1)), start=1):
            hidden = _resize(hidden, (height // fraction - less, width // fraction - less))
            hidden = self._block(f"deconv{index}", 6 + index, hidden)
        hidden = self._block("deconv7", 12, _resize(hidden, grid))
        return self.deconv8(hidden)  # differs from the paper: Table 6 shows a ReLU

    def _block(self, convolution: str, norm: int, hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(self.get_submodule(f"bn2d{norm}")(self.get_submodule(convolution)(hidden)))


def _resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class UlsadModel(TakesTiles):
    """ULSAD (Fig. 2): frozen features, reconstruction network, global autoencoder, anomaly maps.

    Images are RGB in [0, 1]; the networks normalise them themselves. H and W are at least 256 and multiples of four
    times the stride of the first layer (32 by default).

    Args:
        backbone: Name of a timm network. Paper: WideResNet50-2.
        layers: Layers of it, the finest grid first (Sec. 3.1).
        weights: Weights of the backbone, see :meth:`anomalib_pack.backbones.FrozenBackbone.load_weights`.
        feature_dim: C, channels after aggregation.
        lambda_l: Weight of the direction in the local branch, Eqs. 1 and 7.
        lambda_g: Weight of the direction in the global branch, Eqs. 5, 6 and 8.
        global_branch: Build the global autoencoder (Sec. 3.3).
        local_global: Let the FRN learn the autoencoder's output as well (Eq. 6). Without it the logical map compares
            the autoencoder with the features themselves (Table 3, rows 2, 3, 7 and 8).
        final_activation: See :class:`FeatureReconstructionNetwork`.
        region: What of the image counts, see :func:`~anomalib_pack.region.build_region`.

    Example:
        >>> model = UlsadModel("resnet18", ["layer2", "layer3"], weights=None, feature_dim=16).eval()
        >>> model(torch.rand(1, 3, 256, 256)).anomaly_map.shape
        torch.Size([1, 1, 256, 256])
    """

    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    structural_quantiles: torch.Tensor
    logical_quantiles: torch.Tensor

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.racm_in1k",
        layers: Sequence[str] = ("layer2", "layer3"),
        weights: str | Path | None = "hub",
        feature_dim: int = 384,
        *,
        lambda_l: float = 0.5,
        lambda_g: float = 0.5,
        global_branch: bool = True,
        local_global: bool = True,
        final_activation: bool = True,
        region: Polygons | str | Path | None = None,
    ) -> None:
        super().__init__()
        self.region = build_region(region)
        self.feature_dim = feature_dim
        self.lambda_l = lambda_l
        self.lambda_g = lambda_g
        self.local_global = global_branch and local_global
        self.backbone = FrozenBackbone(backbone, layers, weights)
        if min(self.backbone.strides) != self.backbone.strides[0]:
            msg = f"layers must start with the finest grid, got {list(layers)} with strides {self.backbone.strides}."
            raise ValueError(msg)
        self.reconstruction = FeatureReconstructionNetwork(
            feature_dim, (2 if self.local_global else 1) * feature_dim, final_activation
        )
        self.autoencoder = GlobalAutoencoder(feature_dim) if global_branch else None
        self._reconstruction_folding, self._autoencoder_folding = Folding(), Folding()
        self.register_buffer("feature_mean", torch.zeros(1, feature_dim, 1, 1))  # mu of Algorithm 1
        self.register_buffer("feature_std", torch.ones(1, feature_dim, 1, 1))  # sigma of Algorithm 1
        self.register_buffer("structural_quantiles", torch.tensor(UNMEASURED))
        self.register_buffer("logical_quantiles", torch.tensor(UNMEASURED))

    @property
    def runs_global(self) -> bool:
        """Whether the global branch runs: not on tiles (ours), because what a tile shows is no whole product."""
        return self.autoencoder is not None and self.tiler is None

    def raw_features(self, images: torch.Tensor) -> torch.Tensor:
        """Aggregated backbone features before the channel normalisation, (B, C, h, w).

        Raises:
            ValueError: If the networks cannot take images of this size.
        """
        self.check_image_size(images.shape[-2:])
        return aggregate_features(self.backbone(images), self.feature_dim)

    def branches(self, images: torch.Tensor, raw_features: torch.Tensor | None = None) -> Branches:
        """Run both branches (Algorithm 1, lines 3 to 13).

        Args:
            images: RGB in [0, 1], (B, 3, H, W).
            raw_features: What :meth:`raw_features` gives for them, (B, C, h, w); computed if it is not given.

        Raises:
            ValueError: If the networks cannot take images of this size.
        """
        raw_features = self.raw_features(images) if raw_features is None else raw_features
        features = (raw_features - self.feature_mean) / self.feature_std
        reconstruction = self._reconstruction_folding.run(self.reconstruction, features, nn.Module.__call__)
        autoencoder = self._predict(images, features.shape[-2:]) if self.runs_global else None
        if not self.local_global:
            return Branches(features, reconstruction, None, autoencoder)
        local_features, global_features = reconstruction.chunk(2, dim=1)  # (B, 2C, h, w) -> U', U''
        return Branches(features, local_features, global_features if self.runs_global else None, autoencoder)

    def _predict(self, images: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Predict features (B, C, h, w) from the images alone, see :meth:`GlobalAutoencoder.forward`."""
        return self._autoencoder_folding.run(self.autoencoder, images, lambda network, images: network(images, grid))

    def check_image_size(self, size: Sequence[int]) -> None:
        """Check that the networks can take images of this (height, width).

        Raises:
            ValueError: If a side is below 256 or no multiple of four times the first layer's stride.
        """
        step = GRID_STEP * self.backbone.strides[0]
        if any(side < MINIMUM_SIZE or side % step for side in size):
            msg = (
                f"Ulsad takes images with sides that are multiples of {step} and at least {MINIMUM_SIZE} pixels, got "
                f"{tuple(size)} (height, width). Set the pre-processor's Resize accordingly."
            )
            raise ValueError(msg)

    def raw_maps(self, images: torch.Tensor) -> BranchMaps:
        """Compute the smoothed maps of both branches before quantile normalisation (Eqs. 7 and 8)."""
        return self.over_tiles(images, self._raw_maps)

    def _raw_maps(self, images: torch.Tensor) -> BranchMaps:
        branches = self.branches(images)
        structural = feature_distance(branches.local_features, branches.features, self.lambda_l)  # Eq. 7
        structural = self._smooth(structural, images.shape[-2:])
        if branches.autoencoder is None:
            return BranchMaps(structural, None, None if self.tiler is None else structural.amax(dim=(1, 2, 3)))
        target = branches.features if branches.global_features is None else branches.global_features
        logical = feature_distance(target, branches.autoencoder, self.lambda_g)  # Eq. 8
        return BranchMaps(structural, self._smooth(logical, images.shape[-2:]))

    def _smooth(self, distance: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Smooth a map (B, h, w) to (B, 1, H, W), with what lies in the region."""
        smoothed = self.counted.smooth(distance.unsqueeze(1), lambda maps: smooth_map(maps.squeeze(1), size))
        return self.counted.clear(smoothed)

    def maps(self, images: torch.Tensor) -> BranchMaps:
        """Compute the normalised maps of both branches: 0 at q_alpha, 0.1 at q_beta of normal validation images."""
        maps = self.raw_maps(images)
        quantiles = BranchMaps(self.structural_quantiles, self.logical_quantiles, self.structural_quantiles)
        return BranchMaps(
            *(None if raw is None else normalise_map(raw, known) for raw, known in zip(maps, quantiles, strict=True))
        )

    def forward(self, images: torch.Tensor) -> Branches | InferenceBatch:
        """Run the model.

        Args:
            images: RGB in [0, 1], (B, 3, H, W).

        Returns:
            In training mode what :class:`~anomalib_ulsad.loss.UlsadLoss` takes; in eval mode the anomaly map
            (B, 1, H, W) and the image score (B,), unbounded and not necessarily positive.
        """
        return self.branches(self.drawn(images)) if self.training else combine(self.maps(images))

    def with_branch_scores(self, images: torch.Tensor) -> tuple[InferenceBatch, dict[str, torch.Tensor]]:
        """Run the model in eval mode, with the score (B,) of each branch, see :func:`branch_scores`."""
        maps = self.maps(images)
        return combine(maps), branch_scores(maps)

    def load_official_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Load trained networks, statistics and quantiles under the names of the published code.

        Args:
            state_dict: Names such as ``featae.conv1.weight``, ``img_encoder.enconv1.weight``, ``mean_std.mean`` and
                ``quantiles.qa_local``, with or without a leading ``model.``. Tensors of other parts (the backbone,
                which :class:`FrozenBackbone` loads, and metrics) are left out.

        Raises:
            ValueError: If tensors are missing, foreign to these networks or of another shape.
        """
        official = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
        own = {f"reconstruction.{name}": tensor for name, tensor in _under("featae.", official).items()}
        own |= {f"autoencoder.{name}": tensor for name, tensor in _under("img_encoder.", official).items()}
        absent = sorted(set(OFFICIAL_STATISTICS) - official.keys())
        if absent:
            msg = f"The state dict does not fit this model. Missing: {absent}"
            raise ValueError(msg)
        own["feature_mean"] = official["mean_std.mean"].view(1, -1, 1, 1)
        own["feature_std"] = official["mean_std.std"].view(1, -1, 1, 1)
        for branch, name in (("structural", "local"), ("logical", "global")):
            q_alpha, q_beta = (official[f"quantiles.q{end}_{name}"].squeeze() for end in "ab")
            if q_beta <= q_alpha:  # published checkpoints of earlier epochs hold zeros
                logger.warning(
                    "The checkpoint has no quantiles of %s maps: run Engine.validate to measure them.", branch
                )
                q_alpha, q_beta = UNMEASURED
            own[f"{branch}_quantiles"] = torch.stack([torch.as_tensor(q_alpha), torch.as_tensor(q_beta)])

        expected = {name for name in self.state_dict() if not name.startswith("backbone.")}
        missing = sorted(name for name in expected - own.keys() if not name.endswith("num_batches_tracked"))
        unexpected = sorted(own.keys() - expected)
        if missing or unexpected:
            msg = f"The state dict does not fit this model. Missing: {missing}; unexpected: {unexpected}"
            raise ValueError(msg)
        try:
            self.load_state_dict(own, strict=False)
        except RuntimeError as error:  # other shapes; torch names each
            raise ValueError(str(error)) from error


def combine(maps: BranchMaps) -> InferenceBatch:
    """Average the branches' maps and take the maximum as the image score (Sec. 3.5).

    Differs from the paper: the maximum is taken over the smoothed full-size map, as in the published code.
    """
    # Not a sum: OpenVINO 2026.4 fuses a sum of two convolutions' results, the blurs', and gets it wrong.
    branches = [maps.structural] if maps.logical is None else [maps.structural, maps.logical]
    anomaly_map = torch.cat(branches, dim=1).mean(dim=1, keepdim=True)
    score = anomaly_map.amax(dim=(1, 2, 3)) if maps.highest is None else maps.highest
    return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)


def branch_scores(maps: BranchMaps) -> dict[str, torch.Tensor]:
    """Maxima (B,) of the branches' maps: 0.1 is the 99.5 % quantile of normal pixels by default."""
    if maps.highest is not None:
        return {"structural": maps.highest}
    found = {"logical": maps.logical, "structural": maps.structural}
    return {name: branch.amax(dim=(1, 2, 3)) for name, branch in found.items() if branch is not None}


def _under(prefix: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
