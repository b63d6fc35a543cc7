"""Reading and writing an anomaly map as a file."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from anomalib_pack.data.image_files import read
from anomalib_pack.files import replace_file

TIFF = ".tiff"

# What the published evaluations read: TIFF, and PNG for AutoVI.
EXTENSIONS = (TIFF, ".tif", ".png")

REMEDY = "Have the map written again."


def write_map(path: Path, anomaly_map: np.ndarray) -> None:
    """Write a map, shape (H, W), as TIFF in its own type, float16 or float32.

    Raises:
        OSError: If it cannot be written; the message names the file.
    """
    content = BytesIO()
    tifffile.imwrite(content, anomaly_map)
    replace_file(path, content.getbuffer())


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a Boolean mask, shape (H, W), as PNG with 0 and 255.

    Raises:
        OSError: If it cannot be written; the message names the file.
    """
    content = BytesIO()
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(content, "PNG")
    replace_file(path, content.getbuffer())


def find_map(folder: Path, place: Path) -> Path | None:
    """Find the map of an image; None if there is none.

    Args:
        folder: Folder of maps.
        place: Path of the map below it, without suffix.

    Raises:
        ValueError: If there are several, with different suffixes.
    """
    found = [path for suffix in EXTENSIONS if (path := folder / place.with_name(place.name + suffix)).is_file()]
    if len(found) > 1:
        msg = f"One image must have one map, but there are {' and '.join(map(str, found))}. Remove all but one."
        raise ValueError(msg)
    return found[0] if found else None


def read_map(path: Path, size: Sequence[int], image_path: str) -> np.ndarray:
    """Read a map, shape (H, W), float32.

    Args:
        path: The file.
        size: Height and width of the image.
        image_path: The image, for messages.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no map of real numbers, has another size than the image or a NaN; the message names it.
    """
    values = read(_read_values, path, REMEDY)
    if values.ndim != 2 or values.dtype.kind not in "fiub":
        msg = f"The map {path} must have one real number for each pixel, got shape {values.shape} of {values.dtype}."
        raise ValueError(msg)
    if values.shape != tuple(size):
        msg = (
            f"The map {path} has size {values.shape} (height, width), its image {image_path} has {tuple(size)}. Maps "
            "must have the size of the image file."
        )
        raise ValueError(msg)
    scores = values.astype(np.float32, copy=False)
    if np.isnan(scores).any():
        msg = f"The map {path} has {np.isnan(scores).sum()} NaN among its {scores.size} values, which have no rank."
        raise ValueError(msg)
    return scores


def _read_values(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.array(image)
    try:
        return tifffile.imread(path)
    except Exception as error:  # its decoders raise many types, and name no file
        raise ValueError(error) from error
