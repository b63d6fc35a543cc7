"""Pictures, which matter less than the metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anomalib.data import ImageBatch
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from lightning import LightningModule, Trainer
from PIL import Image

logger = logging.getLogger(__name__)


class SparingVisualizer(ImageVisualizer):
    """Anomalib's ``ImageVisualizer`` that never ends a test, before there are metrics, for a picture.

    One that cannot be written is said once.
    """

    _said = False

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *arguments: Any
    ) -> None:
        """Draw the pictures of a batch; predictions come here too."""
        with self.sparing_metrics(trainer, batch):
            super().on_test_batch_end(trainer, pl_module, outputs, batch, *arguments)

    @contextmanager
    def sparing_metrics(self, trainer: Trainer, batch: ImageBatch) -> Iterator[None]:
        """For the drawing of a batch: say the first picture that cannot be written, and go on."""
        try:
            yield
        except OSError as error:
            self._remove_parts(trainer, batch)
            if not self._said:
                logger.warning(
                    "Cannot write pictures to %s: %s. The metrics do not need them; this is said once.",
                    self.output_dir,
                    error.strerror or error,
                )
            self._said = True

    def _remove_parts(self, trainer: Trainer, batch: ImageBatch) -> None:
        """Remove what is there of a picture that was not finished."""
        data = trainer.datamodule
        names = {"dataset_name": getattr(data, "name", None), "category": getattr(data, "category", None)}
        for path in batch.image_path or ():
            picture = generate_output_filename(path, self.output_dir, mkdir=False, **names)
            if picture.is_file() and not _is_whole(picture):
                picture.unlink()


def _is_whole(picture: Path) -> bool:
    try:
        with Image.open(picture) as image:
            image.load()
    except OSError:
        return False
    return True
