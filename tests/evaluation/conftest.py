from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_pack.data import MVTecLoco


def _write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Root of a dataset in the layout of MVTec AD: texture, with bright holes and faint stains of varied strength."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    texture = 110 + 30 * np.sin(np.arange(32) / 2)[None, :, None]

    def image(strength, mask):
        noise = rng.normal(0, 12, (32, 32, 3))
        return np.clip(texture + noise + strength * mask[..., None], 0, 255).astype(np.uint8)

    category = root / "cloth"
    for index in range(24):
        _write(category / f"train/good/{index:03}.png", image(0, np.zeros((32, 32))))
    for index in range(10):
        _write(category / f"test/good/{index:03}.png", image(0, np.zeros((32, 32))))
    for defect, strength, count in (("hole", 90, 7), ("stain", 25, 8)):
        for index in range(count):
            mask = np.zeros((32, 32))
            top, left = rng.integers(0, 22, 2)
            mask[top : top + 8, left : left + 10] = 1
            _write(category / f"test/{defect}/{index:03}.png", image(strength * rng.uniform(0.2, 1.5), mask))
            _write(category / f"ground_truth/{defect}/{index:03}_mask.png", (mask * 255).astype(np.uint8))
    return root


@pytest.fixture
def loco(tmp_path):
    """Datamodule with few images in the layout of MVTec LOCO: anomalous ones are brighter, logical ones more so."""
    rng = np.random.default_rng(0)
    folders = {"train/good": (8, 0), "validation/good": (5, 0), "test/good": (6, 0)}
    folders |= {"test/logical_anomalies": (4, 60), "test/structural_anomalies": (5, 10)}
    for folder, (count, strength) in folders.items():
        for index in range(count):
            image = np.clip(rng.normal(100, 12, (32, 32, 3)), 0, 255)
            image[8:16, 8:16] += strength * rng.uniform(0, 1.5)
            _write(tmp_path / "pushpins" / folder / f"{index:03}.png", image.astype(np.uint8))
            if strength:
                mask = np.zeros((32, 32), dtype=np.uint8)
                mask[8:16, 8:16] = 255
                kind = Path(folder).name
                _write(tmp_path / "pushpins/ground_truth" / kind / f"{index:03}/000.png", mask)
    return MVTecLoco(root=tmp_path, category="pushpins", train_batch_size=4, eval_batch_size=4, num_workers=0)
