"""Image files of a data set, with errors that name the file or the folder."""

from collections.abc import Callable
from pathlib import Path

import torch


def require_folder(folder: Path, remedy: str) -> None:
    """Check that a folder is there.

    Raises:
        FileNotFoundError: If it is not; the message names it and ends with the remedy.
    """
    if not folder.is_dir():
        msg = f"There is no folder {folder}. {remedy}"
        raise FileNotFoundError(msg)


def list_split(folder: Path, extensions: tuple[str, ...], remedy: str, levels: str = "*") -> list[Path]:
    """List the images of a split, in order.

    Args:
        folder: Folder of the split.
        extensions: File name extensions of images, with the dot.
        remedy: What to do if the folder is missing, a sentence.
        levels: Pattern of the folders that hold the images, relative to the split's.

    Raises:
        FileNotFoundError: If the folder is missing.
        RuntimeError: If it has no images.
    """
    require_folder(folder, remedy)
    paths = sorted(path for path in folder.glob(f"{levels}/*") if path.suffix in extensions)
    if not paths:
        msg = f"There are no images in {folder}/{levels}/: files named *{' or *'.join(extensions)} are expected there."
        raise RuntimeError(msg)
    return paths


def list_images(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    """List the images in a folder, in order."""
    return sorted(path for path in folder.iterdir() if path.suffix in extensions)


def read(
    reader: Callable, path: str | Path, remedy: str = "Replace the file, or remove it from the data set."
) -> torch.Tensor:
    """Read an image or a mask by Anomalib's reader for it.

    Raises:
        OSError: If it cannot be read; the message names the file and ends with the remedy.
    """
    # Pillow raises SyntaxError for a broken chunk and ValueError for a broken header, and names no file.
    try:
        return reader(path, as_tensor=True)
    except (OSError, SyntaxError, ValueError) as error:
        msg = f"Cannot read {path}: {error}. {remedy}"
        raise OSError(msg) from error
