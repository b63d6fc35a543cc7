"""Writes a rendered category in the folder format of MVTec LOCO."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from rich.progress import track

from anomalib_pack.rendering import board, tray

SCENES = {"tray": tray, "board": board}

# Raised whenever the same parameters give other pictures, so that results are never compared across renderings.
RENDERING = 1

LOGICAL, STRUCTURAL = "logical_anomalies", "structural_anomalies"


def write_category(
    folder: Path, category: str, image_size: int, counts: Mapping[tuple[str, str], int], seed: int
) -> None:
    """Render images and masks, and write them with ``defects_config.json``.

    Args:
        folder: Folder of the category, which is there and empty.
        category: One of the scenes.
        image_size: Side of the square images in pixels.
        counts: Number of images by folder of the split and folder in it: ``good`` or the kind of anomalies. Their
            order decides on the pictures.
        seed: Seed of the rendering.
    """
    scene = SCENES[category]
    pixel_values = _write_defects_config(folder, scene, image_size)
    images = [(*place, index) for place, count in counts.items() for index in range(count)]

    def write(number: int) -> None:
        split, group, index = images[number]
        # Every image has a generator of its own: neither other images nor the global state have a say in it.
        rng = np.random.default_rng([seed, number])
        defects = [] if group == "good" else scene.draw_defects(group, rng)
        image, masks = scene.render(image_size, defects, rng)
        _write_png(folder / split / group / f"{index:03}.png", image)
        for mask_index, (defect, mask) in enumerate(zip(defects, masks, strict=True)):
            mask_path = folder / "ground_truth" / group / f"{index:03}" / f"{mask_index:03}.png"
            _write_png(mask_path, mask.astype(np.uint8) * np.uint8(pixel_values[defect]))

    with ThreadPoolExecutor() as pool:
        for _ in track(pool.map(write, range(len(images))), f"Rendering {category}", total=len(images)):
            pass


def _write_defects_config(folder: Path, scene: ModuleType, image_size: int) -> dict[str, int]:
    """Write ``defects_config.json`` as MVTec LOCO has it; return the pixel value of each defect in the masks."""
    entries = [
        {
            "defect_name": defect.name,
            "pixel_value": 255 - index,
            # MVTec LOCO counts in pixels what is not relative to the mask.
            "saturation_threshold": defect.saturation if defect.relative else round(defect.saturation * image_size**2),
            "relative_saturation": defect.relative,
        }
        for index, defect in enumerate((*scene.LOGICAL_DEFECTS, *scene.STRUCTURAL_DEFECTS))
    ]
    (folder / "defects_config.json").write_text(json.dumps(entries, indent=4))
    return {entry["defect_name"]: entry["pixel_value"] for entry in entries}


def _write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
