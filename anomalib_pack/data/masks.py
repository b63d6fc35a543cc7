"""Masks of anomalous images: reading them, and what can be wrong with them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.tv_tensors import Mask

from anomalib_pack.data.image_files import CLIPPED_MODES, REPLACE, read

# A mask has 0 and one value, or a value for each kind of defect; more are the noise of JPEG or soft edges. Ours.
MAX_VALUES = 8


def read_mask(path: str | Path) -> torch.Tensor:
    """Read which pixels of a mask are not zero, (H, W).

    Masks are taken as they are stored, whatever their EXIF orientation.

    Raises:
        OSError: If it cannot be read; the message names the file.
    """
    return torch.from_numpy(read(mask_values, path) > 0)


def mask_values(path: str | Path) -> np.ndarray:
    """Gray values of the file of a mask, (H, W)."""
    with Image.open(path) as image:
        return gray_values(image)


def gray_values(image: Image.Image) -> np.ndarray:
    """Gray values of an open mask, (H, W). An alpha channel is left aside, as by Anomalib's reader."""
    return np.array(image if image.mode in CLIPPED_MODES else image.convert("L"))


def count_values(values: np.ndarray) -> int:
    """Count the different values of a mask."""
    if values.dtype == np.uint8:  # much faster than sorting
        return int(np.count_nonzero(np.bincount(values.ravel())))
    return len(np.unique(values))


def read_union(paths: Sequence[str | Path], image_path: str, size: Sequence[int]) -> Mask:
    """Read the union of the masks of an anomalous image, (H, W).

    Args:
        paths: The files.
        image_path: The image, for messages.
        size: Height and width of the image.

    Raises:
        OSError: If a mask cannot be read.
        ValueError: If a mask has another size, or all are empty.
    """
    union = torch.zeros(*size, dtype=torch.bool)
    for path in paths:
        mask = read_mask(path)
        check_size(path, mask.shape, image_path, size)
        union |= mask
    if not union.any():
        raise ValueError(empty_message(paths, image_path))
    return Mask(union)  # augmentations leave plain tensors alone


def check_size(path: str | Path, mask_size: Sequence[int], image_path: str, size: Sequence[int]) -> None:
    """Check that a mask has the size of its image.

    Raises:
        ValueError: If it has not; where turning one of them would help, the message says so.
    """
    message = size_message(path, mask_size, image_path, size)
    if message:
        raise ValueError(message)


def size_message(path: str | Path, mask_size: Sequence[int], image_path: str, size: Sequence[int]) -> str | None:
    """What is wrong with the size of a mask, if it is not that of its image."""
    mask_size, size = tuple(mask_size), tuple(size)
    if mask_size == size:
        return None
    message = f"The mask {path} has size {mask_size} (height, width), its image {image_path} has {size}."
    if mask_size == size[::-1]:
        message += (
            " One fits the other when turned by 90 degrees: perhaps a program applied an EXIF orientation to one."
        )
    return message


def empty_message(paths: Sequence[str | Path], image_path: str) -> str:
    """What is wrong with an anomalous image whose masks are zero everywhere."""
    alpha = " but for its alpha channel, which is not read" if any(map(_has_alpha, paths)) else ""
    files = ", ".join(map(str, paths))
    return f"The mask {files} of the anomalous image {image_path} is empty: zero everywhere{alpha}. {REPLACE}"


def _has_alpha(path: str | Path) -> bool:
    with Image.open(path) as image:
        return "A" in image.getbands() and image.getchannel("A").getextrema() not in {(0, 0), (255, 255)}
