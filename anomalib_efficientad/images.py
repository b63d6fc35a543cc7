"""Images of a folder: those that a teacher is distilled from, and the penalty images of EfficientAD's training."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_pack.checks import check_readable
from anomalib_pack.data.image_files import CLIPPED_MODES

CHECKED_BEFOREHAND = 10_000  # ours: under a minute for photos; ImageNet would keep a machine busy for an hour

TOO_MANY_BITS = "it has more than 8 bits per channel, so that it would become white or black; convert it to 8 bits"


def find_images(argument: str, folder: str | Path) -> list[Path]:
    """Find images in a folder and all folders below it, also behind links, and try to read them.

    Only the first 10 000 are read beforehand; a later one that is broken is named when its turn comes.

    Args:
        argument: Name of the argument that gives the folder, for messages.
        folder: The folder.

    Returns:
        The images' paths, sorted.

    Raises:
        ValueError: If there is no such folder, no image in it, or an image that cannot be read; the message names it.
    """
    paths = sorted(
        Path(where) / name
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
    if not paths:
        problem = "has no images" if Path(folder).is_dir() else "does not exist"
        msg = f"{argument} must be a folder with images ({', '.join(IMG_EXTENSIONS)}); {str(folder)!r} {problem}."
        raise ValueError(msg)
    check_readable([str(path) for path in paths[:CHECKED_BEFOREHAND]])
    return paths


class ImageFiles(Dataset):
    """Images without labels.

    Args:
        paths: Files in any format that Pillow reads, of 8 bits per channel or of 16 in colour.
        transform: What is done with each as an RGB Pillow image.
    """

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Any]) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        """Read and transform an image.

        Raises:
            ValueError: If it cannot be read; the message names the file.
        """
        path = self.paths[index]
        try:
            opened = Image.open(path)
            if opened.mode in CLIPPED_MODES:
                raise ValueError(TOO_MANY_BITS)
            image = opened.convert("RGB")
        except Exception as error:  # Pillow's decoders raise many types
            msg = f"Cannot read the image {path}: {error}. Replace or remove the file."
            raise ValueError(msg) from error
        return self.transform(image)
