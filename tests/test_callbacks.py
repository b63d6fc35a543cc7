"""Where results of a run are."""

from pathlib import Path

import pytest
from anomalib.engine import Engine
from tiny_model import TinyModel

from anomalib_pack.data import MVTecLoco
from anomalib_pack.defaults import OneClassDefaults


class Tiny(OneClassDefaults, TinyModel):
    """The tiny model with what the pack's models share, pictures too."""

    def __init__(self) -> None:
        super().__init__(visualizer=True)


def engine(root: Path) -> Engine:
    return Engine(default_root_dir=root, accelerator="cpu", max_epochs=1, enable_progress_bar=False, logger=False)


def test_training_after_a_test(loco: MVTecLoco, loco_root: Path, tmp_path: Path) -> None:
    """What comes before any training has a version of its own too; ``latest`` links to the last."""
    engine(tmp_path / "stock").test(TinyModel(visualizer=True), datamodule=loco)
    with pytest.raises(IsADirectoryError):  # when this fails, Anomalib does better and ours may go
        engine(tmp_path / "stock").fit(TinyModel(visualizer=True), datamodule=loco)
    engine(tmp_path).test(Tiny(), datamodule=loco)
    engine(tmp_path).predict(Tiny(), data_path=loco_root / "tray" / "test" / "good")
    results = tmp_path / "Tiny" / "MVTecLoco" / "tray"
    assert len(list((results / "v0" / "images").rglob("*.png"))) == 12
    assert (results / "latest").readlink() == results / "v0"
    assert len(list((tmp_path / "Tiny" / "v0" / "images").rglob("*.png"))) == 4
    engine(tmp_path).fit(Tiny(), datamodule=loco)
    engine(tmp_path).test(Tiny(), datamodule=loco)
    assert (results / "latest").readlink() == results / "v1"
    assert len(list((results / "v1" / "images").rglob("*.png"))) == 12
