"""Checks before a model trains, so that bad input is named before an epoch is wasted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.models.components import AnomalibModule
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2 import Normalize

from .data.first_look import look
from .data.image_files import is_constant, names, read
from .progress import progress_bar


def require(name: str, value: Any, allowed: bool, rule: str) -> None:
    """Check an argument.

    Raises:
        ValueError: If it is not allowed; the message names the argument, the rule and the value.
    """
    if not allowed:
        msg = f"{name} must be {rule}, got {value!r}."
        raise ValueError(msg)


def check_keys(given: Iterable[str], allowed: Sequence[str], where: str) -> None:
    """Check the keys of a mapping.

    Args:
        given: The keys.
        allowed: Those that there may be.
        where: What the mapping is called in the error.

    Raises:
        ValueError: If a key is not allowed; the message names it and those that are.
    """
    unknown = [str(key) for key in given if key not in allowed]
    if unknown:
        msg = f"{where} has the unknown key {', '.join(unknown)}; allowed are {', '.join(allowed)}."
        raise ValueError(msg)


def check_pre_processor(module: AnomalibModule) -> None:
    """Check the pre-processor of a model whose network normalises images itself.

    Raises:
        ValueError: If its transform contains ``Normalize``.
    """
    if extract_transforms_by_type(getattr(module.pre_processor, "transform", None), Normalize):
        msg = f"pre_processor must not contain Normalize: {module.name} normalises RGB in [0, 1] itself."
        raise ValueError(msg)


def check_input_size(module: AnomalibModule) -> None:
    """Check the size to which the pre-processor of a model resizes, whose network has a ``check_image_size``.

    Not in a constructor: Anomalib's tiled ensemble builds models with a size that is never used.

    Raises:
        ValueError: If it is one that the network cannot take, or cannot be cut into its tiles.
    """
    if getattr(module.pre_processor, "transform", None) is not None and module.input_size is not None:
        tiled = getattr(module.model, "tiler", None) is not None
        check = module.model.check_tiles if tiled else module.model.check_image_size
        check(module.input_size)


def check_data(datamodule: AnomalibDataModule) -> None:
    """Check that a model can be trained and validated on the data, and that all its images can be read.

    For models that read no image before they train; others check what they do not read themselves.

    Raises:
        ValueError: If there are no training images or no normal validation images, or an image cannot be read.
    """
    check_training_images(datamodule)
    check_normal_validation_images(datamodule)
    check_readable(image_paths(datamodule.train_data))


def check_training_images(datamodule: AnomalibDataModule) -> None:
    """Check that there is something to train on, and look at the files that the datamodule has not looked at.

    Raises:
        OSError: If an image is none, or Anomalib's reader would misread it.
        ValueError: If the training set is empty, or a mask is missing, empty or of another size than its image.
    """
    if len(datamodule.train_data) == 0:
        msg = f"The training set of {_where(datamodule)} is empty. Put normal images into its training folder."
        raise ValueError(msg)
    if getattr(datamodule, "looks_at_files", True):
        look(datamodule)


def check_normal_validation_images(datamodule: AnomalibDataModule) -> None:
    """Check that the validation set has normal images, and that all its images can be read.

    Raises:
        ValueError: If there is no normal validation image, or an image cannot be read; the message names the file.
    """
    if not has_normal_validation_images(datamodule):
        msg = (
            f"The validation set of {_where(datamodule)} has no normal images, which are needed to normalise anomaly "
            "maps and scores. Add some, or hold back a part of the training set with val_split_mode=from_train."
        )
        raise ValueError(msg)
    check_readable(image_paths(datamodule.val_data))


def has_normal_validation_images(datamodule: AnomalibDataModule) -> bool:
    """Whether there are normal images in the validation set."""
    validation = getattr(datamodule, "val_data", None)
    return validation is not None and len(validation) > 0 and validation.has_normal


def check_readable(paths: Sequence[str]) -> None:
    """Decode images, and warn of those that are of one colour.

    Raises:
        ValueError: If one cannot be decoded; the message names the file.
    """
    constant = []
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        results = progress_bar(pool.map(_look_at, paths), desc="Checking images", total=len(paths), leave=False)
        for path, (message, of_one_colour) in zip(paths, results, strict=True):
            if message:
                raise ValueError(message)
            if of_one_colour:
                constant.append(path)
    warn_of_constant(constant)


def warn_of_constant(paths: Sequence[str]) -> None:
    """Warn of images of one colour, if there are any."""
    if paths:
        warnings.warn(
            f"Images are of one colour everywhere, {len(paths)} in all: {names(paths)}. Check these files.",
            stacklevel=2,
        )


@contextmanager
def naming_unreadable_images(dataset: Dataset) -> Iterator[None]:
    """Turn the error of a broken image, which may come from a loader's worker process, into one that names the file."""
    try:
        yield
    except Exception as error:
        for message, _ in map(_look_at, image_paths(dataset)):
            if message:
                raise ValueError(message) from error
        raise


def image_paths(dataset: Dataset) -> list[str]:
    """Paths of the images of one of Anomalib's data sets; none for others."""
    samples = getattr(dataset, "samples", None)
    return [] if samples is None else samples["image_path"].tolist()


def _look_at(path: str) -> tuple[str | None, bool]:
    """Why an image cannot be decoded, and whether it is of one colour."""
    try:
        return None, read(_is_constant_file, path)
    except Exception as error:  # Pillow's decoders raise many types
        return str(error), False


def _is_constant_file(path: str) -> bool:
    with Image.open(path) as image:
        return is_constant(image)


def _where(datamodule: AnomalibDataModule) -> str:
    root = getattr(datamodule, "root", None)
    return datamodule.name if root is None else f"{datamodule.name} at {Path(root) / datamodule.category}"
