"""Defects as annotations in the format of COCO, which labelling tools read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalib_pack.records.table import Row

CATEGORY = {"id": 1, "name": "defect", "supercategory": "defect"}


class Outlined(NamedTuple):
    """An image and its defects.

    Attributes:
        image_path: The image.
        size: Height and width of its file.
        defects: Rows of its defects.
        outlines: Of each, see :func:`~anomalib_pack.records.defects.outline`.
    """

    image_path: str
    size: tuple[int, int]
    defects: Sequence[Row]
    outlines: Sequence[NDArray[np.int32]]


def annotation_file(images: Iterable[Outlined]) -> bytes:
    """Content of an annotation file.

    Names of images are relative to the folder that they have in common, which the description tells. A polygon is the
    outer border of a defect, ``area`` what is inside, and ``score`` its largest score.
    """
    images = list(images)
    paths = [Path(os.path.abspath(image.image_path)) for image in images]  # noqa: PTH100  # links stay
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    content = {
        "info": {"description": f"Defects that a model predicts in images of {root}"},
        "images": [
            {"id": number, "file_name": path.relative_to(root).as_posix(), "height": size[0], "width": size[1]}
            for number, (path, (_, size, _, _)) in enumerate(zip(paths, images, strict=True), start=1)
        ],
        "annotations": _annotations(images),
        "categories": [CATEGORY],
    }
    return json.dumps(content).encode()


def _annotations(images: Sequence[Outlined]) -> list[dict[str, Any]]:
    defects = [
        (image, row, corners)
        for image, (_, _, rows, outlines) in enumerate(images, start=1)
        for row, corners in zip(rows, outlines, strict=True)
    ]
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": CATEGORY["id"],
            "segmentation": [corners.flatten().tolist()],
            "area": cv2.contourArea(corners),
            "bbox": [row[key] for key in ("x", "y", "width", "height")],
            "iscrowd": 0,
            "score": row["max_score"],
        }
        for number, (image, row, corners) in enumerate(defects, start=1)
    ]
