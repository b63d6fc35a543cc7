"""The smallest model that is trained, and as a script its training in two processes, one of which has a bad image.

python line_model.py FOLDER: each process writes its error into a file with its number.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from waiting import wait_until

from anomalib_pack.training import EndsOnBadLoss


class Line(EndsOnBadLoss, LightningModule):
    """Loss sqrt(weight * value)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.validations = 0
        self.save_after = ()  # pairs of a step and a file

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        for step, path in self.save_after:
            if step == batch_idx:
                self.trainer.save_checkpoint(path)
        loss = (self.weight.abs() * batch["value"]).sqrt().mean()
        self.watch_loss(loss, batch["path"])
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validations += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def train(model: Line, bad: dict[int, float], steps: int, **arguments: Any) -> None:
    """Train for one epoch of batches of one image, with other values than 1 where ``bad`` has them."""
    images = [{"path": f"{step}.png", "value": torch.tensor(bad.get(step, 1.0))} for step in range(steps)]
    trainer = Trainer(
        **{"devices": 1} | arguments,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(images), DataLoader(images[:1]))


def main(folder: Path) -> None:
    """Train, and end after the first process: Lightning kills it where it sees that the second one has failed."""
    try:
        train(Line(), {11: torch.nan}, steps=30, devices=2, strategy="ddp")
    except ValueError as error:
        (folder / os.environ.get("LOCAL_RANK", "0")).write_text(str(error))
        wait_until((folder / "0").exists)
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
