"""Validation sets of datamodules whose data set has none."""

from anomalib.data.utils import ValSplitMode
from lightning.pytorch.utilities.types import EVAL_DATALOADERS


def check_val_split_mode(mode: ValSplitMode) -> None:
    """Check that a validation set can be made, if one is wanted.

    Raises:
        ValueError: If it is to come from a folder of its own.
    """
    if mode == ValSplitMode.FROM_DIR:
        msg = (
            f"val_split_mode must be from_train, from_test, same_as_test, synthetic or none, got {mode.value}: the "
            "data set has no validation images of its own."
        )
        raise ValueError(msg)


class OptionalValidation:
    """Mixin for datamodules that can do without a validation set; stands before ``AnomalibDataModule``."""

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Get the validation dataloader; without a validation set an empty list, for which Lightning skips validation.

        Anomalib's own raises an AttributeError then.
        """
        return super().val_dataloader() if hasattr(self, "val_data") else []
