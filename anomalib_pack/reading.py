"""Refusing images that Anomalib's own reader would misread, wherever a model of the pack meets them."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from anomalib.data.utils.image import is_image_file
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import Dataset

from .checks import image_paths
from .data.image_files import ReadsImages, check_as_anomalib_reads, map_files, read, read_header


class RefusesMisreadImages(Callback):
    """Looks at the headers of images that are not read by the pack, before a model is run on them.

    Anomalib's reader is also that of its ``PredictDataset``, by which the ``predict`` command reads a folder. What a
    model was trained on is read alike or refused.
    """

    def __init__(self) -> None:
        self._seen: WeakSet[Dataset] = WeakSet()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the training images."""
        del pl_module
        self._check(trainer.train_dataloader)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validation images."""
        del pl_module
        self._check(trainer.val_dataloaders)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the test images."""
        del pl_module
        self._check(trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the images to predict."""
        del pl_module
        self._check(trainer.predict_dataloaders)

    def _check(self, loaders: Any) -> None:
        for loader in CombinedLoader(loaders, "sequential").flattened:
            dataset = getattr(loader, "dataset", None)
            if dataset is not None and dataset not in self._seen:
                check_reading(dataset)
                self._seen.add(dataset)


def check_reading(dataset: Dataset) -> None:
    """Check that Anomalib reads the images of a data set as the pack does.

    Raises:
        OSError: If not; the message names the file and says what to do.
    """
    if not isinstance(dataset, ReadsImages):
        paths = image_paths(dataset) or getattr(dataset, "image_filenames", [])
        for _ in map_files(_check_file, filter(is_image_file, paths)):  # not videos
            pass


def _check_file(path: str) -> None:
    header = read_header(path)
    read(lambda _: check_as_anomalib_reads(header), path)
