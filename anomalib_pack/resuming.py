"""What is trained outlives an interruption, a crash and a full disk: files to resume from, whole or absent."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn

from .checks import require
from .files import replace_tensors

logger = logging.getLogger(__name__)

RESUME = Path("weights", "lightning", "resume.ckpt")  # in a run's folder
CLOCK_EVERY = 50  # ours: several processes agree on the time after so many steps, because that makes them wait


class KeepTraining(Callback):
    """Keeps what is trained in ``weights/lightning/resume.ckpt`` of the run's folder until the training has ended.

    The file is for going on with the training and for nothing else: its thresholds and quantiles are those of the last
    validation, not of its weights. It is written when the training is interrupted (Ctrl+C, SIGTERM), when it fails, and
    every few minutes, and removed when it ends. Losses and weights that are not finite are never in it.

    All checkpoints of such a training, also those of a ``ModelCheckpoint``, are whole or absent under their names.

    All models of the pack have this callback; one among the ``callbacks`` of the trainer takes its place. Without a
    ``ModelCheckpoint`` nothing is kept.

    Args:
        save_minutes: Time between two saves; 0 keeps nothing.

    Raises:
        ValueError: If ``save_minutes`` is negative.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[KeepTraining(save_minutes=2)])
    """

    def __init__(self, save_minutes: float = 10.0) -> None:
        require("save_minutes", save_minutes, save_minutes >= 0, "at least 0")
        self.save_minutes = save_minutes
        self._saved_step = math.inf  # the step of the last save; before the training starts nothing is worth one
        self._saved_time = 0.0
        self._path: Path | None = None  # the file, once it is there

    def setup(self, trainer: Trainer, _pl_module: LightningModule, stage: str) -> None:
        """Let Anomalib's checkpoints be written whole; a ``CheckpointIO`` of the user's own stays."""
        checkpoint_io = trainer.strategy.checkpoint_io
        if stage == TrainerFn.FITTING and type(checkpoint_io) is AnomalibCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles(checkpoint_io.extra_safe_globals)

    def on_train_start(self, trainer: Trainer, _pl_module: LightningModule) -> None:
        """Start the clock."""
        keeps = self.save_minutes > 0 and trainer.checkpoint_callbacks and not trainer.fast_dev_run
        self._saved_step = trainer.global_step if keeps else math.inf
        self._saved_time = time.monotonic()
        self._path = None

    def on_train_batch_start(self, trainer: Trainer, _pl_module: LightningModule, _batch: Any, batch_idx: int) -> None:
        """Save if it is time.

        Not when a step has ended: after the last one of an epoch, Lightning would go on without its validation.
        """
        if trainer.world_size > 1 and batch_idx % CLOCK_EVERY:
            return
        due = time.monotonic() - self._saved_time >= 60 * self.save_minutes and trainer.global_step > self._saved_step
        if not trainer.strategy.broadcast(due):
            return
        if self._path is None:
            logger.info("Every %g minutes the training is saved to %s.", self.save_minutes, _path(trainer))
        try:
            self._save(trainer)
        except OSError as error:  # a full disk must not end the training
            logger.warning("%s The training goes on.", error)
        self._saved_time = time.monotonic()

    def on_exception(self, trainer: Trainer, _pl_module: LightningModule, _exception: BaseException) -> None:
        """Save what is trained, and say how to go on. The error stays what it is."""
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        if trainer.global_step > self._saved_step:
            try:
                self._save(trainer)
            except Exception as error:  # e.g. weights that are not finite, a full disk, a GPU that is gone
                logger.warning("The training since step %d is not kept: %s", self._saved_step, error)
        if self._path is not None:
            logger.warning(
                "What was trained up to step %d is in %s. Go on with `anomalib fit --ckpt_path %s` and the same "
                "arguments as before; `anomalib train` would also test this file, whose thresholds are old.",
                self._saved_step,
                *2 * [self._path],
            )

    def _save(self, trainer: Trainer) -> None:
        # Not trainer.save_checkpoint, which waits for the other processes: they may have ended, or the first one may
        # find the disk full.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        trainer.strategy.save_checkpoint(checkpoint, _path(trainer))
        self._path, self._saved_step = _path(trainer), trainer.global_step

    def on_fit_end(self, trainer: Trainer, _pl_module: LightningModule) -> None:
        """Remove the file: the training has ended, and its last checkpoint is that of the last validation."""
        if self._path is not None and trainer.is_global_zero:
            self._path.unlink(missing_ok=True)
        self._path = None


def _path(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / RESUME


class WholeFiles(AnomalibCheckpointIO):
    """Anomalib's way to read and write checkpoints, where a file is whole or absent under its name.

    Lightning writes into the folder for temporary files and moves the file, which on another disk is copying it: a full
    one leaves a part.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the file, then replace it.

        Raises:
            OSError: If the file cannot be written; the message names it. An earlier one is still there.
        """
        if "://" in str(path):  # not on a disk
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        replace_tensors(Path(path), checkpoint)
