"""Records of real runs of a tiny model, with the pack's post-processor and with Anomalib's own."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback
from tiny_model import RawScores, TinyModel

from anomalib_pack.callbacks import WriteRecords
from anomalib_pack.data import MVTecLoco
from anomalib_pack.defaults import OneClassDefaults
from anomalib_pack.records.rows import DEFECT_COLUMNS, PREDICTION_COLUMNS


class Tiny(OneClassDefaults, TinyModel):
    """The tiny model with what the pack's models share."""


def engine(root: Path, *callbacks: Callback, **arguments: Any) -> Engine:
    return Engine(
        list(callbacks),
        default_root_dir=root,
        accelerator="cpu",
        max_epochs=1,
        enable_progress_bar=False,
        logger=False,
        **arguments,
    )


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def folder(running: Engine) -> Path:
    return Path(running.trainer.default_root_dir)


def column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float32)


@pytest.fixture(params=["pack", "stock"])
def model(request: pytest.FixtureRequest) -> AnomalibModule:
    torch.manual_seed(0)
    return (Tiny if request.param == "pack" else TinyModel)(visualizer=ImageVisualizer(field_size=(32, 32)))


@pytest.fixture
def callbacks(model: AnomalibModule) -> list[Callback]:
    """What brings records to the model; the pack's has them."""
    return [] if isinstance(model, Tiny) else [WriteRecords()]


def test_records_of_a_test(model: AnomalibModule, callbacks: list[Callback], loco: MVTecLoco, tmp_path: Path) -> None:
    raw = RawScores()
    running = engine(tmp_path, raw, *callbacks)
    running.fit(model, datamodule=loco)
    [metrics] = running.test(model, datamodule=loco)
    rows = read(folder(running) / "test_predictions.csv")
    assert tuple(rows[0]) == PREDICTION_COLUMNS
    samples = loco.test_data.samples
    assert [row["image_path"] for row in rows] == samples.image_path.tolist()
    assert [int(row["gt_label"]) for row in rows] == samples.label_index.tolist()
    assert {row["category"] for row in rows} == {"tray"}
    assert [row["group"] for row in rows] == [Path(path).parent.name for path in samples.image_path]
    assert {"good", "logical_anomalies", "structural_anomalies"} == {row["group"] for row in rows}
    np.testing.assert_array_equal(column(rows, "raw_score"), torch.cat(raw.scores).numpy())
    assert {row["explanation"] for row in rows} == {""}
    for row in rows:
        picture = folder(running) / row["picture"]
        assert picture.is_file()
        assert picture.stem == Path(row["image_path"]).stem
    assert len({row["picture"] for row in rows}) == len(rows)
    assert json.loads((folder(running) / "test_metrics.json").read_text()) == pytest.approx(metrics)
    assert "image_AUROC" in metrics


@pytest.mark.parametrize("sensitivity", [0.5, 0.55])
def test_thresholds_tell_the_labels(
    model: AnomalibModule, callbacks: list[Callback], loco: MVTecLoco, tmp_path: Path, sensitivity: float
) -> None:
    running = engine(tmp_path, *callbacks)
    running.fit(model, datamodule=loco)
    running.test(model, datamodule=loco)
    scores = np.sort(column(read(folder(running) / "test_predictions.csv"), "raw_score"))
    processor = model.post_processor
    processor._image_threshold.fill_(float(scores[5] + scores[6]) / 2)
    processor.image_min.fill_(float(scores[0]))
    processor.image_max.fill_(float(scores[-1]))
    processor.image_sensitivity = sensitivity
    running.test(model, datamodule=loco)
    rows = read(folder(running) / "test_predictions.csv")
    labels = column(rows, "pred_label").astype(bool)
    assert labels.sum() == 6 if sensitivity == 0.5 else 6 < labels.sum() < len(labels)
    for score, threshold in (("raw_score", "raw_threshold"), ("pred_score", "threshold")):
        np.testing.assert_array_equal(labels, column(rows, score) >= column(rows, threshold))
    assert {row["threshold"] for row in rows} == {str(round(1 - sensitivity, 2))}


def test_records_of_a_prediction(
    model: AnomalibModule, callbacks: list[Callback], loco: MVTecLoco, loco_root: Path, tmp_path: Path
) -> None:
    """A folder has no labels; of a datamodule they are known."""
    running = engine(tmp_path, *callbacks)
    running.fit(model, datamodule=loco)
    running.predict(model, datamodule=loco)
    rows = read(folder(running) / "predictions.csv")
    assert [int(row["gt_label"]) for row in rows] == loco.test_data.samples.label_index.tolist()
    predicting = engine(tmp_path / "folder", *callbacks)
    images = PredictDataset(loco_root / "tray" / "test" / "good")
    predictions = predicting.predict(model, dataset=images, return_predictions=True)
    rows = read(folder(predicting) / "predictions.csv")
    assert [row["image_path"] for row in rows] == [str(path) for path in images.image_filenames]
    scores = torch.cat([batch.pred_score for batch in predictions])
    np.testing.assert_array_equal(column(rows, "pred_score"), scores.numpy())
    assert {(row["gt_label"], row["group"], row["category"]) for row in rows} == {("", "", "")}
    assert not (folder(predicting) / "test_metrics.json").exists()
    assert tuple((folder(predicting) / "defects.csv").read_text().splitlines()[0].split(",")) == DEFECT_COLUMNS


def test_without_visualizer_there_is_no_picture(loco: MVTecLoco, tmp_path: Path) -> None:
    running = engine(tmp_path)
    running.test(Tiny(), datamodule=loco)
    rows = read(folder(running) / "test_predictions.csv")
    assert {row["picture"] for row in rows} == {""}
    # Nothing is known of thresholds before a validation.
    assert {(row["raw_threshold"], row["threshold"], row["pred_label"]) for row in rows} == {("", "", "0")}
