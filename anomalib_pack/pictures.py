"""Pictures, which matter less than the metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anomalib.data import ImageBatch
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from PIL import Image

logger = logging.getLogger(__name__)


class SparesMetrics(Callback):
    """Runs a visualizer, Anomalib's or the user's, that never ends a test, before there are metrics, for a picture.

    One that cannot be written is said once.

    Args:
        visualizer: All of the trainer's calls reach it.
    """

    def __init__(self, visualizer: Visualizer) -> None:
        self.visualizer = visualizer
        self._said = False
        others = {name for name in vars(Callback) if not name.startswith("_")} - vars(type(self)).keys()
        vars(self).update({name: getattr(visualizer, name) for name in others})

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *arguments: Any
    ) -> None:
        """Draw the pictures of a batch."""
        with self._sparing_metrics(trainer, batch):
            self.visualizer.on_test_batch_end(trainer, pl_module, outputs, batch, *arguments)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *arguments: Any
    ) -> None:
        """Draw the pictures of a batch of predictions."""
        with self._sparing_metrics(trainer, batch):
            self.visualizer.on_predict_batch_end(trainer, pl_module, outputs, batch, *arguments)

    @contextmanager
    def _sparing_metrics(self, trainer: Trainer, batch: ImageBatch) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            folder = getattr(self.visualizer, "output_dir", None) or trainer.default_root_dir
            _remove_parts(trainer, batch, folder)
            if not self._said:
                logger.warning(
                    "Cannot write pictures to %s: %s. The metrics do not need them; this is said once.",
                    folder,
                    error.strerror or error,
                )
            self._said = True


def picture_of(image_path: str, trainer: Trainer, folder: str | Path) -> Path:
    """Where Anomalib's visualizer puts the picture of an image.

    Args:
        image_path: The image.
        trainer: That of the run.
        folder: The visualizer's ``output_dir``.
    """
    data = getattr(trainer, "datamodule", None)
    names = {"dataset_name": getattr(data, "name", None), "category": getattr(data, "category", None)}
    return generate_output_filename(image_path, folder, mkdir=False, **names)


def output_folder(trainer: Trainer) -> Path | None:
    """Where the visualizer of a running test or prediction puts its pictures; None without Anomalib's."""
    for callback in trainer.callbacks:
        visualizer = callback.visualizer if isinstance(callback, SparesMetrics) else callback
        if isinstance(visualizer, ImageVisualizer) and visualizer.output_dir is not None:
            return Path(visualizer.output_dir)
    return None


def _remove_parts(trainer: Trainer, batch: ImageBatch, folder: str | Path) -> None:
    """Remove what is there of a picture that was not finished."""
    for path in batch.image_path or ():
        picture = picture_of(path, trainer, folder)
        if picture.is_file() and not _is_whole(picture):
            picture.unlink()


def _is_whole(picture: Path) -> bool:
    try:
        with Image.open(picture) as image:
            image.load()
    except OSError:
        return False
    return True
