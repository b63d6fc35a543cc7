"""EfficientAD as an Anomalib model that needs no downloads: teacher and penalty images are local.

Paper: Batzner et al., "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies", WACV 2024,
https://arxiv.org/abs/2303.14535.
"""

from __future__ import annotations

import logging
import math
from itertools import chain, repeat
from pathlib import Path
from typing import Literal

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models import EfficientAd
from anomalib.models.components import AnomalibModule
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModelSize
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch.nn import Parameter
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, RandomGrayscale, Resize, ToDtype, ToImage

from anomalib_pack.backbones import load_fitting, read_state_dict
from anomalib_pack.checkpoints import FollowsCheckpoint
from anomalib_pack.checks import check_data, check_pre_processor, require
from anomalib_pack.defaults import OneClassDefaults
from anomalib_pack.passes import measures_of_normal_images, one_pass, sum_over_processes, validation_loader
from anomalib_pack.quantiles import quantiles
from anomalib_pack.region import Polygons, plain_region
from anomalib_pack.statistics import channel_sums, mean_and_std
from anomalib_pack.training import LIGHTNING_DEFAULT_EPOCHS, EndsOnBadLoss, ValidatesAtTheEnd

from .images import ImageFiles, find_images
from .torch_model import DistilledEfficientAdModel

logger = logging.getLogger(__name__)

PAPER_STEPS = 70_000  # Alg. 1, line 12
LR_DROP = 0.95  # share of the training after which the learning rate drops: 66 500 of 70 000 (Alg. 1, line 40)
LR_DROP_FACTOR = 0.1  # Alg. 1, line 41
PENALTY_GRAYSCALE = 0.3  # comments on Alg. 1
QUANTILES = (0.9, 0.995)  # Alg. 1, lines 56 and 57


class DistilledEfficientAd(
    EndsOnBadLoss, ValidatesAtTheEnd, FollowsCheckpoint, OneClassDefaults, EfficientAd, AnomalibModule
):
    """Anomalib's EfficientAd with a teacher and penalty images from local files.

    Networks, losses, maps and scores are Anomalib's. What differs:

    - teacher and penalty images: see the arguments. Nothing is downloaded;
    - ``AnomalibModule`` is named among the bases, because Anomalib lists and finds direct subclasses only;
    - scores and metrics are those of this pack: thresholds come from normal validation images, and Anomalib's own
      post-processor would set every score above the largest of them to 1 before metrics are computed, which loses the
      ranking of the anomalous images;
    - the quantiles that normalise the maps belong to the last validation, so the last weights get one;
    - the learning rate drops after 95 % of the steps, as in the paper; Anomalib's never does;
    - statistics and quantiles are measured on pre-processed images; Anomalib measures them on images of the data set's
      own size;
    - images are taken one by one in training, as in the paper, whatever the batch size of the data;
    - the networks run in half precision too: in eval mode their first convolutions do the normalisation.

    Args:
        teacher_weights: File with the teacher's state dict, e.g. one that ``python -m anomalib_efficientad distill``
            wrote or one of Anomalib's ``pretrained_teacher_*.pth``. It is read when training starts; a checkpoint
            carries the teacher.
        penalty_images: Folder, searched with all folders in it, of images that do not show what is inspected, in place
            of ImageNet (Alg. 1, line 21).
        teacher_out_channels: Channels of the teacher (Tables 1 and 2).
        model_size: ``"small"`` (EfficientAD-S, Table 1) or ``"medium"`` (EfficientAD-M, Table 2).
        lr: Learning rate of Adam, a tenth of it in the last twentieth of the training (Alg. 1, lines 11 and 41).
        weight_decay: Weight decay of Adam (Alg. 1, line 11).
        padding: Pad in the convolutions, as in Tables 1 and 2. Anomalib: no, which keeps borders out of the maps.
        pad_maps: Pad the maps instead.
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

    Example:
        >>> DistilledEfficientAd(teacher_weights="pretrained_teacher_small.pth", penalty_images="photos").name
        'DistilledEfficientAd'
    """

    without_effect = ("penalty_images",)

    def __init__(
        self,
        teacher_weights: str | Path = "pretrained_teacher_small.pth",
        penalty_images: str | Path = "./datasets/imagenette",
        teacher_out_channels: int = 384,
        model_size: Literal["small", "medium"] = "small",
        lr: float = 1e-4,
        weight_decay: float = 1e-5,
        padding: bool = False,
        pad_maps: bool = True,
        region: Polygons | str | Path | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        sizes = tuple(size.value for size in EfficientAdModelSize)
        require("model_size", model_size, model_size in sizes, f"one of {sizes}")
        require("teacher_out_channels", teacher_out_channels, teacher_out_channels >= 1, "at least 1")
        require("lr", lr, lr > 0, "above 0")
        require("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        teacher_weights, penalty_images = str(teacher_weights), str(penalty_images)  # checkpoints hold plain data
        region = plain_region(region)
        super().__init__(
            imagenet_dir=penalty_images,
            teacher_out_channels=teacher_out_channels,
            model_size=model_size,
            lr=lr,
            weight_decay=weight_decay,
            padding=padding,
            pad_maps=pad_maps,
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.teacher_weights = Path(teacher_weights)
        self.model = DistilledEfficientAdModel(teacher_out_channels, self.model_size, padding, pad_maps, region=region)
        check_pre_processor(self)

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` (height, width), 256 x 256 by default, without normalisation."""
        return PreProcessor(transform=Resize(image_size or (256, 256), antialias=True))

    def setup(self, stage: str) -> None:
        """Check data and penalty images, take training images one by one, and set the paper's length of training."""
        super().setup(stage)
        if stage != "fit":
            return
        if isinstance(self.trainer.datamodule, AnomalibDataModule):
            check_data(self.trainer.datamodule)
            _take_images_one_by_one(self.trainer.datamodule)
        self.penalty_paths = find_images("penalty_images", self.imagenet_dir)
        if self.trainer.max_epochs == LIGHTNING_DEFAULT_EPOCHS and self.trainer.max_steps < 0:
            logger.info("Neither max_epochs nor max_steps was set: training for the paper's %d steps.", PAPER_STEPS)
            self.trainer.fit_loop.max_epochs = -1
            self.trainer.fit_loop.epoch_loop.max_steps = PAPER_STEPS

    def on_fit_start(self) -> None:
        """Load the teacher; a checkpoint carries it and its statistics."""
        super().on_fit_start()
        if self.trainer.ckpt_path is None:  # in setup this is still what the run before had
            self._load_teacher()

    def _load_teacher(self) -> None:
        if not self.teacher_weights.is_file():
            msg = (
                f"teacher_weights must be the file of a teacher, got {str(self.teacher_weights)!r}. Write one with "
                "python -m anomalib_efficientad distill."
            )
            raise FileNotFoundError(msg)
        state_dict = read_state_dict(self.teacher_weights)
        network = f"a teacher of size {self.model_size.value!r} with {self.model.teacher_out_channels} channels"
        load_fitting(self.model.teacher, state_dict, str(self.teacher_weights), network)
        for statistic in self.model.mean_std.values():  # of an earlier teacher or data set: measured anew
            statistic.zero_()

    def on_train_start(self) -> None:
        """Leave eval mode, in which Lightning would train a restored model, then do as Anomalib does."""
        self.model.train()
        super().on_train_start()

    def prepare_pretrained_model(self) -> None:
        """Download nothing: the teacher is there since :meth:`setup`."""

    def prepare_imagenette_data(self, image_size: tuple[int, int] | torch.Size) -> None:
        """Prepare the penalty images in place of Imagenette.

        Args:
            image_size: (height, width) of a training image as the data set gives it.
        """
        height, width = self.input_size or image_size  # what the networks see
        transform = Compose(  # comments on Alg. 1: twice the size, gray with probability 0.3, centre crop
            [
                Resize((2 * height, 2 * width)),
                RandomGrayscale(PENALTY_GRAYSCALE),
                CenterCrop((height, width)),
                ToImage(),
                ToDtype(torch.float32, scale=True),
            ]
        )
        images = ImageFiles(self.penalty_paths, lambda image: (transform(image),))  # Anomalib takes the first of a pair
        pinned = self.device.type == "cuda"  # a copy from other memory would make Python wait
        self.imagenet_loader = DataLoader(images, self.batch_size, shuffle=True, pin_memory=pinned)
        self.imagenet_iterator = chain.from_iterable(repeat(self.imagenet_loader))

    @torch.no_grad()
    def teacher_channel_mean_std(self, dataloader: DataLoader) -> dict[str, torch.Tensor]:
        """Measure mean and standard deviation of the teacher's channels (Alg. 1, lines 3 to 10).

        Returns:
            ``mean`` and ``std``, each (1, C, 1, 1); a channel that never changes has standard deviation 1.
        """
        sums = 0
        for batch in one_pass(self, dataloader, "Teacher statistics"):
            sums = sums + channel_sums(self.model.teacher_features(batch.image))
        mean, std = mean_and_std(sum_over_processes(self, sums))
        # Frozen here, because Anomalib puts what it gets in the place of its own parameters.
        return {
            name: Parameter(value.to(self.device), requires_grad=False)
            for name, value in (("mean", mean), ("std", std))
        }

    def training_step(self, batch: ImageBatch, _batch_idx: int) -> STEP_OUTPUT:
        """Compute the losses as Anomalib does (Alg. 1, lines 13 to 38), without waiting for their values."""
        penalty_images = next(self.imagenet_iterator)[0].to(batch.image.device, non_blocking=True)
        losses = self.model(batch.image, penalty_images)
        loss = sum(losses)
        self.watch_loss(loss, batch.image_path)
        for name, value in zip(("st", "ae", "stae", "loss"), (*losses, loss), strict=True):
            self.log(f"train_{name}", value.detach(), on_epoch=True, prog_bar=True, batch_size=len(batch))
        return {"loss": loss}

    def on_validation_start(self) -> None:
        """Measure the quantiles that normalise the maps."""
        # In place: tensors of a validation, which runs in inference mode, could not be loaded into later.
        for name, value in self.map_norm_quantiles(validation_loader(self.trainer)).items():
            self.model.quantiles[name].copy_(value)

    @torch.no_grad()
    def map_norm_quantiles(self, dataloader: DataLoader) -> dict[str, torch.Tensor]:
        """Measure the quantiles of both maps on normal validation images (Alg. 1, lines 44 to 57).

        Returns:
            ``qa_st`` and ``qb_st``, 90 % and 99.5 % quantile of the student's maps, and ``qa_ae`` and ``qb_ae`` of the
            autoencoder's.

        Raises:
            ValueError: If there are none.
        """
        maps = measures_of_normal_images(self, dataloader, "Quantiles of normal maps", self._maps)
        student, autoencoder = maps.unbind(dim=1)
        result = {}
        for name, values in (("st", student), ("ae", autoencoder)):
            lower, upper = quantiles(values, QUANTILES)
            result[f"qa_{name}"] = lower
            result[f"qb_{name}"] = upper if upper > lower else lower + 0.1  # 0.1: a constant map is only shifted
        return result

    def _maps(self, images: torch.Tensor) -> torch.Tensor:
        """Maps of student and autoencoder, (n, 2, H, W), or the pixels of a region."""
        return self.model.region.take(torch.cat(self.model.get_maps(images), dim=1))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam on student and autoencoder, whose rate drops once (Alg. 1, lines 11 and 40 to 42).

        Ours: in a training of another length than the paper's the drop keeps its relative place. Anomalib counts epochs
        where it means steps, so that its rate never drops.
        """
        trainable = [*self.model.student.parameters(), *self.model.ae.parameters()]
        optimizer = torch.optim.Adam(trainable, lr=self.lr, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):  # a training without end
            return optimizer
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(LR_DROP * steps)], LR_DROP_FACTOR)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def __getstate__(self) -> dict:
        """Leave the penalty images out of exported models, and the trainer, which Lightning leaves out of others."""
        left_out = ("imagenet_loader", "penalty_paths")
        state = {name: value for name, value in super().__getstate__().items() if name not in left_out}
        return state | {"_trainer": None}


def _take_images_one_by_one(datamodule: AnomalibDataModule) -> None:
    """Set the batch size of training to the paper's; Anomalib's EfficientAd refuses others, among them the default."""
    if datamodule.train_batch_size != 1:
        logger.warning("EfficientAD trains with batches of 1 image: not with %d.", datamodule.train_batch_size)
        datamodule.train_batch_size = 1
