"""What the trained models share: how long they train, and when they validate."""

from __future__ import annotations

import logging
from typing import Any

from lightning import Trainer

logger = logging.getLogger(__name__)

LIGHTNING_DEFAULT_EPOCHS = 1000  # what Trainer.max_epochs is when a user sets no length of training
VALIDATIONS = 20  # ours: in a whole training, where the user sets no interval


def train_for_paper_epochs(trainer: Trainer, epochs: int) -> None:
    """Train for the paper's number of epochs where the user set no length.

    Not in ``trainer_arguments``: what stands there overrides the user's own ``--trainer.max_epochs``.
    """
    if trainer.max_epochs == LIGHTNING_DEFAULT_EPOCHS:
        logger.info("max_epochs was not set: training for the paper's %d epochs.", epochs)
        trainer.fit_loop.max_epochs = epochs


def spread_validations(trainer: Trainer) -> None:
    """Validate a long training 20 times where the user set no interval.

    Not in ``trainer_arguments``: what stands there overrides the user's own ``--trainer.check_val_every_n_epoch``.
    """
    every = trainer.max_epochs // VALIDATIONS
    if trainer.check_val_every_n_epoch == 1 and every > 1:  # 1 is Lightning's default
        logger.info("check_val_every_n_epoch was not set: validating every %d epochs and after the last.", every)
        trainer.check_val_every_n_epoch = every


class ValidatesAtTheEnd:
    """Mixin for models whose last weights need a validation, whatever ``check_val_every_n_epoch`` says.

    Anomalib keeps the weights of the last validation, and thresholds and normalisation come from it.
    """

    def on_train_epoch_start(self) -> None:
        """Validate after the last epoch."""
        trainer = self.trainer
        if trainer.check_val_every_n_epoch is not None and trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(self, *_arguments: Any) -> None:
        """Validate after the last step where ``max_steps`` ends the training within an epoch."""
        trainer = self.trainer
        if trainer.check_val_every_n_epoch is not None and 0 <= trainer.max_steps <= trainer.global_step:
            trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True  # Lightning then validates at once
