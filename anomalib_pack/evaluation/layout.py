"""Where the map of an image lies: as the image lies in its category, below a folder named after the category.

For MVTec LOCO this is the layout that its evaluation reads, ``<category>/test/<group>/<image>.tiff``.
"""

from __future__ import annotations

import os
from pathlib import Path

from anomalib.data import AnomalibDataModule
from pandas import Series

# Folders of images below a category, and the image: what is kept where an image does not lie below the root.
KEPT_PARTS = 3


def map_place(datamodule: AnomalibDataModule, sample: Series) -> Path:
    """Path of the map of an image below the folder of maps, without suffix.

    Args:
        datamodule: What the image belongs to.
        sample: The image's row in ``samples`` of its dataset.
    """
    category = sample.get("category") or getattr(datamodule, "category", None) or datamodule.name
    return place(sample.image_path, getattr(datamodule, "root", None), category)


def place(image_path: str | Path, root: str | Path | None, category: str) -> Path:
    """Path of the map of an image below the folder of maps, without suffix.

    Args:
        image_path: The image.
        root: Folder of the data set; None if there is none.
        category: Name of the image's category, which is also that of its folder in data sets of several categories.

    Example:
        >>> place("data/loco/pushpins/test/good/000.png", "data/loco", "pushpins").as_posix()
        'pushpins/test/good/000'
    """
    parts = _below(image_path, root).parts
    if category in parts[:-1]:
        parts = parts[parts.index(category) + 1 :]
    return Path(category, *parts[:-1], Path(parts[-1]).stem)


def _below(image_path: str | Path, root: str | Path | None) -> Path:
    # Anomalib follows symbolic links in some datamodules only.
    path = Path(os.path.abspath(image_path))  # noqa: PTH100  # Path.resolve would follow them
    if root is not None:
        for base in (os.path.abspath(root), os.path.realpath(root)):  # noqa: PTH100
            if path.is_relative_to(base):
                return path.relative_to(base)
    return Path(*path.parts[-KEPT_PARTS:])
