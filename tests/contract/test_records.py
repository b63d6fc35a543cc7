"""What each model's runs write of the images."""

import csv
import json
from pathlib import Path

import pytest
from anomalib.models import AnomalibModule
from runs import Trained, quiet_engine

from anomalib_pack.data import MVTecLoco
from anomalib_pack.records.rows import DEFECT_COLUMNS, PREDICTION_COLUMNS


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_command_writes_records(trained: Trained) -> None:
    """Of the test at the end of a training."""
    rows = read(trained.folder / "test_predictions.csv")
    assert tuple(rows[0]) == PREDICTION_COLUMNS
    assert len(rows) == 12
    for row in rows:
        above = float(row["raw_score"]) >= float(row["raw_threshold"])
        assert (above, above) == (float(row["pred_score"]) >= float(row["threshold"]), row["pred_label"] == "1")
        assert (trained.folder / row["picture"]).is_file()
    for row in read(trained.folder / "test_defects.csv"):
        assert tuple(row) == DEFECT_COLUMNS
        assert int(row["x"]) + int(row["width"]) <= 64
        assert int(row["y"]) + int(row["height"]) <= 64
        assert 0 < int(row["area"]) <= int(row["width"]) * int(row["height"])
    metrics = json.loads((trained.folder / "test_metrics.json").read_text())
    overall = next(row for row in read(trained.folder / "metrics.csv") if row.pop("group") == "overall")
    assert {name: metrics[name] for name in overall} == pytest.approx({k: float(v) for k, v in overall.items()})


def test_records_of_a_prediction(
    trained: Trained, model_class: type[AnomalibModule], loco: MVTecLoco, tmp_path: Path
) -> None:
    """They are what the predictions have, in the data set's order, and the raw scores those of the test."""
    engine = quiet_engine(tmp_path, logger=False)
    model = model_class.load_from_checkpoint(trained.checkpoint)
    batches = engine.predict(model, datamodule=loco, ckpt_path=trained.checkpoint, return_predictions=True)
    rows = read(Path(engine.trainer.default_root_dir) / "predictions.csv")
    tested = read(trained.folder / "test_predictions.csv")
    items = [item for batch in batches for item in batch]
    for row, item, other in zip(rows, items, tested, strict=True):
        assert row["image_path"] == item.image_path
        # The training may be that of another process of the tests, whose images lie elsewhere.
        assert Path(item.image_path).parts[-4:] == Path(other["image_path"]).parts[-4:]
        assert float(row["pred_score"]) == pytest.approx(float(item.pred_score), rel=1e-6)
        assert int(row["pred_label"]) == int(item.pred_label)
        assert row["explanation"] == (item.explanation or "")
        assert float(row["raw_score"]) == pytest.approx(float(other["raw_score"]), rel=1e-4)
