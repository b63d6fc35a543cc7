"""What the trained models share: when they validate."""

from __future__ import annotations

from typing import Any


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
