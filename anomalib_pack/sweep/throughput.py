"""Images per second of a test run."""

from __future__ import annotations

import time
from typing import Any

import torch
from anomalib.data import Batch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback


class Throughput(Callback):
    """Times the test steps: the model's pre-processor and network, from the batch on the device to maps and scores.

    Loading images, the post-processor and metrics are not in the time, because callbacks of the trainer run before
    those of the model. The first batch, which warms up caches and kernels, does not count unless it is the only one.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[int, float]] = []
        self._start = 0.0

    def on_test_batch_start(self, _trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start the clock."""
        _wait(pl_module)
        self._start = time.perf_counter()

    def on_test_batch_end(
        self, _trainer: Trainer, pl_module: LightningModule, _outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Stop it."""
        _wait(pl_module)
        self._steps.append((batch.batch_size, time.perf_counter() - self._start))

    @property
    def images_per_second(self) -> float:
        """Images by the sum of the times of the steps."""
        steps = self._steps[1:] or self._steps
        return sum(images for images, _ in steps) / sum(seconds for _, seconds in steps)


def _wait(model: LightningModule) -> None:
    if model.device.type == "cuda":  # whose kernels run on while Python is further
        torch.cuda.synchronize(model.device)
