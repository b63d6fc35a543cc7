"""Files that DistilledEfficientAd needs: a random teacher and noise as penalty images.

They are written once by the first process that imports this, and found by the processes that it starts.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from anomalib.models.image.efficient_ad.torch_model import SmallPatchDescriptionNetwork
from PIL import Image

TEACHER_CHANNELS = 8
FOLDER = "CONTRACT_TEACHER"  # environment variable


def _write_files() -> str:
    folder = tempfile.mkdtemp(prefix="teacher")
    atexit.register(shutil.rmtree, folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(SmallPatchDescriptionNetwork(TEACHER_CHANNELS).state_dict(), Path(folder) / "teacher.pth")
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).save(Path(folder) / f"{index}.png")
    return folder


if FOLDER not in os.environ:
    os.environ[FOLDER] = _write_files()
PENALTY_IMAGES = Path(os.environ[FOLDER])
TEACHER = PENALTY_IMAGES / "teacher.pth"
