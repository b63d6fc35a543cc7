"""Where the map of an image lies: as the image lies in its category, below a folder named after the category.

For MVTec LOCO this is the layout that its evaluation reads, ``<category>/test/<group>/<image>.tiff``.
"""

from __future__ import annotations

import os
from pathlib import Path

from anomalib.data import AnomalibDataModule
from pandas import DataFrame

# Folders of images below a category, and the image: what is kept where an image does not lie below the root.
KEPT_PARTS = 3


def map_places(datamodule: AnomalibDataModule, samples: DataFrame) -> dict[str, Path]:
    """Path of the map of each image below the folder of maps, without suffix, by the path of the image.

    Args:
        datamodule: What the images belong to.
        samples: Those of one of its datasets.

    Raises:
        ValueError: If two images have one.
    """
    root = getattr(datamodule, "root", None)
    categories = samples["category"] if "category" in samples else [category_name(datamodule)] * len(samples)
    return unique_places(
        {path: place(path, root, category) for path, category in zip(samples.image_path, categories, strict=True)}
    )


def category_name(datamodule: AnomalibDataModule) -> str:
    """Name of the category of a datamodule of one category, or of one without categories."""
    return getattr(datamodule, "category", None) or datamodule.name


def unique_places(places: dict[str, Path]) -> dict[str, Path]:
    """Check paths of maps by the paths of their images.

    Raises:
        ValueError: If two images have one.
    """
    images = {place: image for image, place in places.items()}
    for image, found in places.items():
        if images[found] != image:
            msg = f"{image} and {images[found]} would have one map, {found}. Rename one of these images."
            raise ValueError(msg)
    return places


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
