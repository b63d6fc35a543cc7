"""Records of real runs of a tiny model, with the pack's post-processor and with Anomalib's own."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import PredictDataset
from anomalib.models import AnomalibModule
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback
from records_runs import Tiny, engine, folder, read
from tiny_model import RawScores, TinyModel

from anomalib_pack.callbacks import WriteRecords
from anomalib_pack.data import MultiCategory, MVTecLoco
from anomalib_pack.records.rows import DEFECT_COLUMNS, PREDICTION_COLUMNS


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
    running.test(model, datamodule=loco)
    tested = {path: path.read_bytes() for path in folder(running).glob("test_*")}
    running.predict(model, datamodule=loco)
    assert len(tested) == 3
    assert {path: path.read_bytes() for path in tested} == tested
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


class Stops(Callback):
    """Ends a run before its third batch, as a crash would, and reads what is on the disk then."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = []

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 2:
            self.rows = read(Path(trainer.default_root_dir) / self.name)
            msg = "no more"
            raise RuntimeError(msg)


@pytest.mark.parametrize("name", ["test_predictions.csv", "test_defects.csv"])
def test_a_run_that_is_cut_short_keeps_its_rows(loco: MVTecLoco, tmp_path: Path, name: str) -> None:
    """And its COCO file, which cannot grow."""
    stops, model = Stops(name), Tiny()
    model.post_processor._pixel_threshold.fill_(-1.0)  # all is anomalous: a defect in each image
    running = engine(tmp_path, stops, WriteRecords(coco=tmp_path / "coco.json"))
    with pytest.raises(RuntimeError, match="no more"):
        running.test(model, datamodule=loco)
    assert [row["image_path"] for row in stops.rows] == loco.test_data.samples.image_path.tolist()[:8]
    assert read(folder(running) / name) == stops.rows
    assert len(json.loads((tmp_path / "coco.json").read_text())["annotations"]) == 8


ODD_NAMES = [
    "a,b.png",
    'quote".png',
    "new\nline.png",
    "return\r.png",
    "größe 大きさ.png",
    " =1+1.png",
    "<img src=x>.png",
]


def test_odd_names(loco_root: Path, tmp_path: Path) -> None:
    """Each reads back as it was, in both formats."""
    image = loco_root / "tray" / "test" / "good" / "000.png"
    images = tmp_path / "comma, quote"
    images.mkdir()
    for name in ODD_NAMES:
        shutil.copy(image, images / f"{name}.png")
    torch.manual_seed(0)
    running = engine(tmp_path, WriteRecords(json_lines=True))
    running.predict(Tiny(visualizer=True), dataset=PredictDataset(images))
    rows = read(folder(running) / "predictions.csv")
    assert sorted(row["image_path"] for row in rows) == sorted(str(images / f"{name}.png") for name in ODD_NAMES)
    for row in rows:
        assert (folder(running) / row["picture"]).name == Path(row["image_path"]).name
    lines = (folder(running) / "predictions.jsonl").read_text().split("\n")
    assert lines.pop() == ""
    for row, line in zip(rows, map(json.loads, lines), strict=True):
        assert tuple(line) == PREDICTION_COLUMNS
        assert {key: "" if value is None else str(value) for key, value in line.items()} == row
        assert isinstance(line["raw_score"], float)
        assert line["gt_label"] is None


def test_name_that_is_no_text(loco_root: Path, tmp_path: Path) -> None:
    """Of bytes that are not UTF-8 the rest of the name is there, and the file can be read."""
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(loco_root / "tray" / "test" / "good" / "000.png", os.fsencode(images) + b"/gr\xf6sse.png")
    running = engine(tmp_path)
    running.predict(Tiny(), dataset=PredictDataset(images))
    [row] = read(folder(running) / "predictions.csv")
    assert Path(row["image_path"]).name == "gr\\udcf6sse.png"


def test_one_of_the_trainer_takes_the_place_of_the_default(loco: MVTecLoco, tmp_path: Path) -> None:
    """And when a run has ended, the trainer's callbacks are what they were."""
    chosen = WriteRecords(json_lines=True)
    running = engine(tmp_path, chosen)
    running.test(Tiny(), datamodule=loco)
    assert [each for each in running.trainer.callbacks if isinstance(each, WriteRecords)] == [chosen]
    assert not [each for each in running.trainer.callbacks if type(each).__module__ == WriteRecords.__module__][1:]
    assert len((folder(running) / "test_predictions.jsonl").read_text().splitlines()) == 12


def test_a_second_run_begins_anew(loco: MVTecLoco, tmp_path: Path) -> None:
    """Also after one that failed, and with fewer images."""
    stops = Stops("test_predictions.csv")
    running, model = engine(tmp_path, stops), Tiny()
    with pytest.raises(RuntimeError):
        running.test(model, datamodule=loco)
    running.trainer.callbacks.remove(stops)
    running.test(model, datamodule=loco)
    assert len(read(folder(running) / "test_predictions.csv")) == 12
    few = engine(tmp_path, limit_test_batches=1)
    few.test(model, datamodule=loco)
    assert folder(few).resolve() == folder(running).resolve()
    assert len(read(folder(few) / "test_predictions.csv")) == 4


def test_several_categories(loco_root: Path, tmp_path: Path) -> None:
    """Each image has its category, and the group without it."""
    for name in ("box", "tray"):
        shutil.copytree(loco_root / "tray", tmp_path / "data" / name)
    for group_by in ("category", "group"):
        data = MultiCategory("MVTecLoco", tmp_path / "data", ["box", "tray"], num_workers=0, group_by=group_by)
        running = engine(tmp_path / group_by)
        running.test(Tiny(), datamodule=data)
        rows = read(folder(running) / "test_predictions.csv")
        assert len(rows) == 24
        for row in rows:
            parts = Path(row["image_path"]).parts
            assert (row["category"], row["group"]) == (parts[-4], parts[-2])


def test_command_writes_records_of_patchcore(loco_root: Path, tmp_path: Path) -> None:
    """Of Anomalib's model, with what documents tell a user to add."""
    data = ("MVTecLoco", f"--data.root={loco_root}", "--data.category=tray", "--data.num_workers=0")
    model = (
        "Patchcore",
        "--model.backbone=resnet18",
        "--model.pre_trained=False",
        "--model.coreset_sampling_ratio=0.01",
    )
    records = (
        "--trainer.callbacks+=anomalib_pack.callbacks.WriteRecords",
        "--trainer.callbacks.min_area=5",
        "--trainer.callbacks.pixel_size=0.1",
        f"--trainer.callbacks.coco={tmp_path}/coco.json",
    )
    quiet = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=False", f"--default_root_dir={tmp_path}")
    trained = AnomalibCLI(["train", "--model", *model, "--data", *data, *records, *quiet])
    results = folder(trained.engine)
    rows = read(results / "test_predictions.csv")
    assert len(rows) == 12
    assert all((results / row["picture"]).is_file() for row in rows)
    above = column(rows, "raw_score") > column(rows, "raw_threshold")
    np.testing.assert_array_equal(above, column(rows, "pred_score") > column(rows, "threshold"))
    defects = read(results / "test_defects.csv")
    assert len(json.loads((tmp_path / "coco.json").read_text())["annotations"]) == len(defects)
    assert all(int(row["area"]) >= 5 for row in defects)
    checkpoint = results / "weights" / "lightning" / "model.ckpt"
    images = loco_root / "tray" / "test" / "logical_anomalies"
    predicting = AnomalibCLI(
        ["predict", "--model", *model, "--data", str(images), f"--ckpt_path={checkpoint}", *records[:1], *quiet]
    )
    predicted = read(folder(predicting.engine) / "predictions.csv")
    tested = {row["image_path"]: row["raw_score"] for row in rows}
    assert len(predicted) == 4
    for row in predicted:
        assert float(row["raw_score"]) == pytest.approx(float(tested[row["image_path"]]), rel=1e-4)
