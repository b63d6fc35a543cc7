"""What the trained models share: how long they train, when they validate, and that a loss must be a number."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning import Trainer

logger = logging.getLogger(__name__)

LIGHTNING_DEFAULT_EPOCHS = 1000  # what Trainer.max_epochs is when a user sets no length of training
VALIDATIONS = 20  # ours: in a whole training, where the user sets no interval
STEPS_UNCHECKED = 50  # ours: after so many the losses are looked at


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


class Step(NamedTuple):
    """A training step that has not been looked at."""

    loss: torch.Tensor  # scalar, on its device
    images: list[str]  # their paths


class Problem(NamedTuple):
    """What is wrong with a step; the least is the first."""

    step: int  # of those that have not been looked at
    what: str
    images: list[str]


class EndsOnBadLoss:
    """Mixin for trained models: losses and weights that are not finite end the training and are never saved.

    A loss whose value is asked for makes Python wait for all that a GPU still has to do. So losses stay where they are
    and are looked at together: after 50 steps, before a validation, at the end of an epoch and before a checkpoint is
    written. The error may thus come 50 steps late, but it names the images of the step where it began, and the last
    checkpoint is from before. With several processes all of them stop.
    """

    _unchecked: tuple[Step, ...] = ()
    _failure: str | None = None  # why the training ended; nothing that is saved after it would be finite

    def on_fit_start(self) -> None:
        """Forget an earlier training."""
        self._unchecked, self._failure = (), None
        super().on_fit_start()

    def watch_loss(self, loss: torch.Tensor, images: Sequence[str] | None = None) -> None:
        """Keep a step's loss for the next look.

        Args:
            loss: Scalar.
            images: Paths of the step's images, for the error.

        Raises:
            ValueError: If one of the 50 losses before it is NaN or infinite; the message names the images.
        """
        if len(self._unchecked) == STEPS_UNCHECKED:
            self._check_losses()
            self._unchecked = ()
        self._unchecked = (*self._unchecked, Step(loss.detach(), list(images or ())))

    def check_training(self) -> None:
        """Look at the last steps' losses and at what they made of the weights.

        Raises:
            ValueError: If a loss or a weight is NaN or infinite, or was before; the message names the images.
        """
        if self._failure:
            raise ValueError(self._failure)
        if self._unchecked:
            self._check_losses()
            self._check_weights()
            self._unchecked = ()

    def _check_losses(self) -> None:
        finite = torch.stack([step.loss for step in self._unchecked]).isfinite().tolist()
        if all(finite):
            self._stop_all(None)
        else:
            first = finite.index(False)
            loss, images = self._unchecked[first]
            self._stop_all(Problem(first, f"The training loss is {loss.item()}", images))

    def _check_weights(self) -> None:
        """Find what a finite loss with a gradient that is not has made of the weights, in the last step."""
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        finite = torch.stack([parameter.isfinite().all() for parameter in trained.values()]).tolist()
        if all(finite):
            self._stop_all(None)
        else:
            name = list(trained)[finite.index(False)]
            batches = self._unchecked[-self.trainer.accumulate_grad_batches :]
            images = [image for step in batches for image in step.images]
            self._stop_all(Problem(0, f"The weights {name!r} are not finite after a step", images))

    def _stop_all(self, problem: Problem | None) -> None:
        """Stop all processes at the first problem that one of them has.

        In an interrupted training each process looks for itself: others may have ended.
        """
        found_by_all = [problem] if self.trainer.interrupted else gather_objects(self.trainer, problem)
        problems = sorted(found for found in found_by_all if found is not None)
        if problems:
            self._unchecked = ()
            first = problems[0]
            images = [image for found in problems if found.step == first.step for image in found.images]
            where = f" on the images {images}" if images else ""
            self._failure = f"{first.what}{where}. Check the images, or use a lower learning rate or 32-bit precision."
            raise ValueError(self._failure)

    def on_validation_model_eval(self) -> None:
        """Look at the training before anything is measured on the validation set."""
        self.check_training()
        super().on_validation_model_eval()

    def on_train_epoch_end(self) -> None:
        """Look at the training where no validation follows."""
        self.check_training()
        super().on_train_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Look at the training before the file is written."""
        self.check_training()
        super().on_save_checkpoint(checkpoint)


def gather_objects(trainer: Trainer, value: Any) -> list[Any]:
    """One small value from each process, the same list in all of them."""
    if trainer.world_size == 1:
        return [value]
    values = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
