"""Validation sets of datamodules that can do without one, or whose data set has none."""

from collections.abc import Mapping
from typing import Any, ClassVar

from anomalib.data.utils import ValSplitMode
from lightning.pytorch.utilities.types import EVAL_DATALOADERS


class OptionalValidation:
    """Mixin for datamodules that can do without a validation set; stands before ``AnomalibDataModule``."""

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Get the validation dataloader; without a validation set an empty list, for which Lightning skips validation.

        Anomalib's own raises an AttributeError then.
        """
        return super().val_dataloader() if hasattr(self, "val_data") else []


class NoValidationImages(OptionalValidation):
    """Mixin for datamodules whose data set has no validation images; stands before ``AnomalibDataModule``.

    Args:
        arguments: Those of ``AnomalibDataModule``.

    Attributes:
        impossible: Ways in which no validation set can be made, and why.

    Raises:
        ValueError: If ``val_split_mode`` is one of them.
    """

    impossible: ClassVar[Mapping[ValSplitMode, str]] = {
        ValSplitMode.FROM_DIR: "the data set has no validation images of its own"
    }

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.val_split_mode in self.impossible:
            possible = ", ".join(mode.value for mode in ValSplitMode if mode not in self.impossible)
            reason = self.impossible[self.val_split_mode]
            msg = f"val_split_mode must be one of {possible}, got {self.val_split_mode.value}: {reason}."
            raise ValueError(msg)
