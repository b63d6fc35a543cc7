"""The model: how Anomalib trains, validates and tests the network."""

from typing import Any

import torch
from acme_common import SCALE
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.models import AnomalibModule
from torch import Tensor

from .torch_model import AcmeTorchModel


class AcmeModel(AnomalibModule):
    """A model of a third party.

    Args:
        width: Number of mixtures of colours.
    """

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        if width < 1:
            msg = f"width must be at least 1, got {width}."
            raise ValueError(msg)
        self.model = AcmeTorchModel(width, SCALE)

    def training_step(self, batch: Batch, _batch_idx: int) -> Tensor:
        """Learn from normal images; there is no loss to speak of."""
        self.model.learn(batch.image)
        return torch.zeros((), requires_grad=True, device=self.device)

    def validation_step(self, batch: Batch, _batch_idx: int) -> Batch:
        """Score images, from which the post-processor takes thresholds."""
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self) -> None:
        """Nothing is optimised."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the training images."""
        return {"max_epochs": 1, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Learns from normal images."""
        return LearningType.ONE_CLASS
