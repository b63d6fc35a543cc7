"""Fixtures for all tests: rendered images, and a network that cannot be reached."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub fails at once instead of waiting


@pytest.fixture(scope="session")
def loco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small rendered data set in MVTec LOCO's format, category ``tray``.

    13 training and 5 validation images: two processes get uneven shares, and the last batch of 4 is a single image.
    """
    from anomalib_pack.data import SyntheticLoco

    root = tmp_path_factory.mktemp("SyntheticLoco")
    SyntheticLoco(root=root, image_size=64, num_train=13, num_val=5, num_test=4).prepare_data()
    return root


@pytest.fixture
def loco(loco_root: Path):
    """Datamodule of the rendered data set."""
    from anomalib_pack.data import MVTecLoco

    return MVTecLoco(root=loco_root, category="tray", train_batch_size=4, eval_batch_size=4, num_workers=0)
