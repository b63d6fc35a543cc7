"""Rendered cloth of 2048 x 2048 pixels with a fault of 12 pixels."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SIZE = 2048
DEFECT = 12
PLACE = (861, 723)  # first row and column of the fault
PERIOD = 9  # pixels of a thread: in no step with the strides of networks


def cloth(seed: int) -> np.ndarray:
    """A plain weave with threads of slightly different brightness: (SIZE, SIZE, 3), uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    threads = rng.uniform(0.85, 1.15, (2, SIZE // PERIOD + 1))
    over = (x // PERIOD + y // PERIOD) % 2 == 0
    across = np.where(over, np.abs(np.sin(np.pi * x / PERIOD)), np.abs(np.sin(np.pi * y / PERIOD)))
    own = np.where(over, threads[0][x // PERIOD], threads[1][y // PERIOD])
    gray = 0.2 + 0.5 * across * own + rng.normal(0, 0.02, (SIZE, SIZE))
    return (gray.clip(0, 1)[..., None] * (255, 230, 200)).astype(np.uint8)


def faulty(seed: int) -> np.ndarray:
    """The same with a fault: thin crossing threads, on average as bright as those around."""
    image = cloth(seed)
    rows, columns = (slice(first, first + DEFECT) for first in PLACE)
    smooth = cv2.blur(image.astype(np.float32), (PERIOD, PERIOD))[rows, columns]
    stripes = (np.indices((DEFECT, DEFECT)).sum(axis=0) // 2 % 2)[..., None]
    image[rows, columns] = smooth * np.where(stripes, 1.6, 0.4)
    return image


def write(root: Path, size: int = SIZE) -> None:
    """Three images for training, six for validation, one without and one with a fault, of their upper left corner."""
    for folder, seeds in {"train": (0, 1, 2), "val": (3, 4, 5, 7, 8, 9), "good": (6,)}.items():
        (root / folder).mkdir(parents=True)
        for seed in seeds:
            Image.fromarray(cloth(seed)[:size, :size]).save(root / folder / f"{seed}.png", compress_level=1)
    (root / "bad").mkdir()
    Image.fromarray(faulty(6)[:size, :size]).save(root / "bad" / "6.png", compress_level=1)
