"""What a checkpoint's validation measured, for a model with other values than those that it was measured with."""

from __future__ import annotations

import logging
from typing import Any

from anomalib.data import AnomalibDataModule
from lightning import Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from .checks import has_normal_validation_images

logger = logging.getLogger(__name__)

MEASURED_WITH = "measured_with"  # key in a checkpoint


class ValidatesForOtherSettings:
    """Mixin for models whose validation measures something with the constructor's values; before ``AnomalibModule``.

    A checkpoint holds what was measured. Where a model with other values tests or predicts with it, a validation comes
    first, so that quantiles, normalisation and thresholds are those of the values that were asked for.

    The model's ``on_validation_start`` sets ``measured_with`` to :attr:`settings`.
    """

    measured_with: dict[str, float | str] | None = None  # None: nothing has been measured

    @property
    def settings(self) -> dict[str, float | str]:
        """Values that the measurements depend on, by the name of the constructor's argument."""
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the values that the measurements in the checkpoint belong to.

        The hyper-parameters are not enough: ``load_from_checkpoint`` overwrites them with its own arguments.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint[MEASURED_WITH] = self.measured_with

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the values that the measurements in the checkpoint belong to."""
        super().on_load_checkpoint(checkpoint)
        self.measured_with = checkpoint.get(MEASURED_WITH)

    def on_test_model_eval(self) -> None:
        """Validate before the test where need be.

        Raises:
            ValueError: If there is need, but no validation data with normal images.
        """
        self._validate_for_other_settings()
        super().on_test_model_eval()

    def on_predict_model_eval(self) -> None:
        """Validate before the prediction where need be.

        Raises:
            ValueError: If there is need, but no validation data with normal images.
        """
        self._validate_for_other_settings()
        super().on_predict_model_eval()

    def _validate_for_other_settings(self) -> None:
        if self.measured_with in (None, self.settings):
            return
        others = {name: value for name, value in self.settings.items() if value != self.measured_with[name]}
        measured = _listed({name: self.measured_with[name] for name in others})
        if not _can_validate(self.trainer):
            msg = (
                f"The quantiles, normalisation and thresholds of this checkpoint were measured with {measured}, but "
                f"the model has {_listed(others)}. Measuring them anew takes normal validation images: give a "
                "datamodule that has some, and no limit_val_batches=0. Or give the model the checkpoint's values."
            )
            raise ValueError(msg)
        if self.trainer.is_global_zero:
            logger.warning(  # the command does not show what is below a warning
                "Measuring quantiles, normalisation and thresholds anew, with %s; the checkpoint has them with %s.",
                _listed(self.settings),
                measured,
            )
        validate_within(self.trainer)


def _listed(settings: dict[str, float | str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _can_validate(trainer: Trainer) -> bool:
    """Whether this run has validation data with normal images."""
    if not trainer.enable_validation:  # false too where trainer.datamodule is left from an earlier run
        return False
    return not isinstance(trainer.datamodule, AnomalibDataModule) or has_normal_validation_images(trainer.datamodule)


def validate_within(trainer: Trainer) -> None:
    """Validate as ``Trainer.validate`` does, before the loop of a test or prediction begins."""
    fn, stage = trainer.state.fn, trainer.state.stage
    trainer.state.fn, trainer.state.stage = TrainerFn.VALIDATING, RunningStage.VALIDATING
    trainer.validate_loop.verbose = False
    try:
        trainer.validate_loop.run()
    finally:
        trainer.validate_loop.teardown()
        trainer.state.fn, trainer.state.stage = fn, stage
