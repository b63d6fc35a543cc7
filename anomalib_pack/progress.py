"""Progress of long work: a bar in a terminal or notebook, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from rich.console import Console
from tqdm import tqdm
from tqdm.auto import tqdm as bar

Item = TypeVar("Item")

SECONDS = 30  # ours, between two lines


class ProgressLines(Callback):
    """Writes a line now and then where the trainer's progress bar cannot be seen: into a pipe, a file or a log.

    A line says the epoch, the step, what the progress bar would show of the losses, the time so far and about how much
    there is to come; in validation, test and prediction, the batch. It is silent in a terminal, and where the user
    wants no progress bar.

    All models of the pack have this callback; one among the ``callbacks`` of the trainer takes its place.

    Args:
        seconds: Least time between two lines.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._start = self._last = 0.0
        self._first_step = 0

    def on_fit_start(self, trainer: Trainer, _pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Write a line if it is time."""
        if self._due(trainer):
            self._write(self._training(trainer, epoch=trainer.current_epoch + 1))

    def on_train_end(self, trainer: Trainer, _pl_module: LightningModule) -> None:
        """Write the last line."""
        if not hides_progress(trainer) and not can_draw(sys.stdout):
            self._write(self._training(trainer, epoch=trainer.current_epoch))  # which has been counted

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Write a line if it is time."""
        self._batch(trainer, "Validation", trainer.num_val_batches, *arguments)

    def on_test_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Write a line if it is time."""
        self._batch(trainer, "Test", trainer.num_test_batches, *arguments)

    def on_predict_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Write a line if it is time."""
        self._batch(trainer, "Prediction", trainer.num_predict_batches, *arguments)

    def _batch(
        self,
        trainer: Trainer,
        what: str,
        batches: list[float],
        _pl_module: LightningModule,
        _outputs: Any,
        _batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._due(trainer):
            self._write(f"{what}: batch {batch_idx + 1} of {batches[dataloader_idx]}")

    def _due(self, trainer: Trainer) -> bool:
        return (
            time.monotonic() - self._last >= self.seconds
            and not hides_progress(trainer)
            and not can_draw(sys.stdout)  # where Lightning draws
        )

    def _write(self, line: str) -> None:
        with suppress(OSError):  # a log on a full disk is no reason to stop
            print(line, flush=True)  # noqa: T201
        self._last = time.monotonic()

    def _training(self, trainer: Trainer, epoch: int) -> str:
        step, steps = trainer.global_step, trainer.estimated_stepping_batches
        elapsed = time.monotonic() - self._start
        losses = [f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items()]
        parts = [f"Epoch {epoch}", f"step {step} of {steps}", *losses, clock(elapsed)]
        if self._first_step < step < steps < float("inf"):
            parts.append(f"about {clock(elapsed / (step - self._first_step) * (steps - step))} to come")
        return ", ".join(parts)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, e.g. ``"0:01:05"``."""
    return str(timedelta(seconds=round(seconds)))


def progress_bar(iterable: Iterable[Item] | None = None, **arguments: Any) -> tqdm:
    """A ``tqdm`` bar on stderr; where it cannot be drawn, a line at the start, at the end and every half a minute.

    Args:
        iterable: What is iterated over, or ``None`` with a ``total``.
        **arguments: Those of ``tqdm``.
    """
    if can_draw(sys.stderr):
        return bar(iterable, **arguments)
    lines = {"file": _Lines(), "mininterval": SECONDS, "maxinterval": 2 * SECONDS, "ncols": 80, "leave": True}
    return tqdm(iterable, **arguments | lines)


class _Lines:
    """Takes what draws a bar again and again, and writes lines."""

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            with suppress(OSError):
                sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def can_draw(stream: Any) -> bool:
    """Whether a bar can be drawn over and over: in a terminal or a notebook."""
    console = Console(file=stream)
    return console.is_terminal or console.is_jupyter


def hides_progress(trainer: Trainer) -> bool:
    """Whether this process shows no progress: the user wants none, or it is not the first one."""
    return trainer.global_rank > 0 or trainer.progress_bar_callback is None
