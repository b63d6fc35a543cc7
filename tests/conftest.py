"""Fixtures for all tests: rendered images, a network that cannot be reached, and no terminal that is the user's."""

import os
import random
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub fails at once instead of waiting
for variable in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):  # tests read what pipes are given
    os.environ.pop(variable, None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let no test, nor the fixtures made for it, depend on the random numbers and seeds of those before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # by which Lightning seeds again, also other processes
        os.environ.pop(variable, None)


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
