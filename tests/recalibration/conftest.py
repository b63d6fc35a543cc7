"""A trained Patchcore with either post-processor, and folders of images."""

import shutil
from pathlib import Path

import pytest
from recalibration_cases import POST_PROCESSORS, Folders
from small_patchcore import trained_patchcore


@pytest.fixture(scope="session")
def folders(loco_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root, tray = tmp_path_factory.mktemp("folders"), loco_root / "tray"
    for index, image in enumerate(sorted([*tray.glob("train/good/*"), *tray.glob("test/good/*")])):
        target = root / "normal" / ("below" if index < 2 else ".") / f"{index}.png"
        target.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(image, target)
    for image in tray.glob("test/*_anomalies/*"):
        target = root / "anomalous" / f"{image.parent.name}_{image.name}"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(image, target)
    return Folders(tray / "validation" / "good", root / "normal", root / "anomalous")


@pytest.fixture(scope="session", params=["stock", "ours, sensitive"])
def checkpoint(request: pytest.FixtureRequest, loco_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a Patchcore, which does not say its class."""
    root = tmp_path_factory.mktemp("patchcore")
    return trained_patchcore(loco_root, root, POST_PROCESSORS[request.param](), size=(64, 64))
