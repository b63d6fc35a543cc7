"""What tiles are for: a fault of 12 pixels in 2048 x 2048 is found with them, and missed without."""

import logging
import sys
from pathlib import Path
from typing import NamedTuple

import anomalib.models
import pytest
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import Folder, PredictDataset
from lightning import seed_everything
from rendered_cloth import DEFECT, PLACE, SIZE, write

sys.path.insert(0, str(Path(__file__).parent / "contract"))
from cases import CASES
from runs import quiet_engine

logger = logging.getLogger(__name__)

SHRUNK = 8  # times smaller are whole images, and as large are tiles
ARGUMENTS = {
    "MiniMaxAd": {"top_ratio": 0.0},  # a hundredth of a tile is five times as large as the fault
    "Ulsad": {},
    "Uniad": {"feature_size": 32},  # of 14 the steps are wider than the fault
    # A fiftieth of the ratios, for 64 tiles in each image; a fault that is small in a tile shows in patches only.
    "Unislad": {"local_ratio": 0.002, "global_ratio": 0.02, "w": 1.0},
}
EPOCHS = {"MiniMaxAd": 6, "Ulsad": 10, "Uniad": 10, "Unislad": 1}  # of as many steps as images


class Found(NamedTuple):
    normal: float  # score of the image without a fault
    faulty: float  # of that with one
    is_anomalous: bool  # label of the latter
    place: tuple[int, int]  # of the maximum of its map


def inspect(name: str, cloths: Path, root: Path, size: int, tile: int | None) -> Found:
    """Train on images of a size, in tiles or whole, and look at both test images."""
    seed_everything(0)
    model_class = getattr(anomalib.models, name)
    model = model_class(
        **CASES[name].arguments | ARGUMENTS[name],
        pre_processor=model_class.configure_pre_processor((size, size)),
        evaluator=False,
        visualizer=False,
    )
    data = Folder(
        "cloth",
        root=cloths,
        normal_dir="train",
        normal_test_dir="val",
        train_batch_size=1 if tile else 3,
        eval_batch_size=1,
        num_workers=0,
        val_split_mode="same_as_test",
    )
    epochs = EPOCHS[name] * (1 if tile else 3)
    callbacks = [TilerConfigurationCallback(enable=True, tile_size=tile, stride=tile)] if tile else []
    engine = quiet_engine(root, max_epochs=epochs, check_val_every_n_epoch=epochs, callbacks=callbacks)
    engine.fit(model, datamodule=data)
    [normal], [faulty] = (engine.predict(model, dataset=PredictDataset(cloths / each)) for each in ("good", "bad"))
    place = divmod(faulty.anomaly_map.argmax().item(), size)
    found = Found(normal.pred_score.item(), faulty.pred_score.item(), bool(faulty.pred_label), place)
    logger.info("%s at %d: %s", name, size, found)
    return found


@pytest.mark.parametrize(
    ("name", "size"),
    [("Unislad", SIZE // 2), *(pytest.param(name, SIZE, marks=pytest.mark.slow) for name in ARGUMENTS)],
)
def test_a_small_fault_is_found_in_tiles_and_missed_without(name: str, size: int, tmp_path: Path) -> None:
    write(tmp_path / "cloths", size)
    found = inspect(name, tmp_path / "cloths", tmp_path / "tiles", size, size // SHRUNK)
    assert found.is_anomalous
    assert found.faulty > found.normal
    for pixel, first in zip(found.place, PLACE, strict=True):
        assert first <= pixel < first + DEFECT
    assert not inspect(name, tmp_path / "cloths", tmp_path / "whole", size // SHRUNK, None).is_anomalous
