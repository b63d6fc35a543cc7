"""Checks before and while a model trains, so that bad input is named before an epoch is wasted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.data.utils import read_image
from torch.utils.data import Dataset


def check_training_images(datamodule: AnomalibDataModule) -> None:
    """Check that there is something to train on.

    Raises:
        ValueError: If the training set is empty.
    """
    if len(datamodule.train_data) == 0:
        msg = f"The training set of {_where(datamodule)} is empty. Put normal images into its training folder."
        raise ValueError(msg)


def check_normal_validation_images(datamodule: AnomalibDataModule) -> None:
    """Check that the validation set has normal images, and that all its images can be read.

    Raises:
        ValueError: If there is no normal validation image, or an image cannot be read; the message names the file.
    """
    validation = getattr(datamodule, "val_data", None)
    if validation is None or len(validation) == 0 or not validation.has_normal:
        msg = (
            f"The validation set of {_where(datamodule)} has no normal images, which are needed to normalise anomaly "
            "maps. Add some, or hold back a part of the training set with val_split_mode=from_train."
        )
        raise ValueError(msg)
    check_readable(_image_paths(validation))


def check_readable(paths: Iterable[str]) -> None:
    """Decode images.

    Raises:
        ValueError: If one cannot be decoded; the message names the file.
    """
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        for message in pool.map(_reading_error, paths):
            if message:
                raise ValueError(message)


@contextmanager
def naming_unreadable_images(dataset: Dataset) -> Iterator[None]:
    """Turn the error of a broken image, which may come from a loader's worker process, into one that names the file."""
    try:
        yield
    except Exception as error:
        for message in map(_reading_error, _image_paths(dataset)):
            if message:
                raise ValueError(message) from error
        raise


def check_finite(loss: torch.Tensor, batch: ImageBatch) -> None:
    """Check a training loss.

    Raises:
        ValueError: If it is NaN or infinite; the message names the images of the batch.
    """
    if not torch.isfinite(loss):
        msg = (
            f"The training loss is {loss.item()} on the images {batch.image_path}. Check these images, or use a lower "
            "learning rate or 32-bit precision."
        )
        raise ValueError(msg)


def _image_paths(dataset: Dataset) -> list[str]:
    samples = getattr(dataset, "samples", None)  # Anomalib's data sets list their images; others may not
    return [] if samples is None else samples["image_path"].tolist()


def _reading_error(path: str) -> str | None:
    try:
        read_image(path)
    except Exception as error:  # Pillow's decoders raise many types
        return f"Cannot read the image {path}: {error}. Replace or remove the file."
    return None


def _where(datamodule: AnomalibDataModule) -> str:
    root = getattr(datamodule, "root", None)
    return datamodule.name if root is None else f"{datamodule.name} at {Path(root) / datamodule.category}"
