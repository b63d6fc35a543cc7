"""Formats of a model: the same maps in float32, other ones and smaller files otherwise, and the tables."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from anomalib_pack import exporting
from anomalib_pack.efficiency import measurement, pipeline
from anomalib_pack.efficiency.formats import PRECISIONS, export, measure_format, prepared
from anomalib_pack.efficiency.report import console_table, format_table, write_markdown
from anomalib_pack.efficiency.settings import Format, Settings, entries

UNIAD = {
    "class_path": "Uniad",
    "init_args": {"backbone": "resnet18", "layers": ["layer1", "layer2"], "weights": None, "hidden_dim": 32},
    "image_size": [64, 64],
}


@pytest.fixture(scope="module")
def settings(loco_root: Path) -> Settings:
    data = {"class_path": "MVTecLoco", "init_args": {"root": str(loco_root), "category": "tray", "num_workers": 0}}
    return Settings(models=[UNIAD], warmup=0, passes=2, runs=1, formats=[*PRECISIONS], accuracy_data=data)


@pytest.fixture(scope="module")
def rows(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    pytest.importorskip("nncf")
    folder, [entry] = tmp_path_factory.mktemp("formats"), entries(settings)
    found = {kind: measure_format(entry, settings, kind, folder) for kind in PRECISIONS}
    model = torch.load(folder / "weights" / "torch" / "model.pt", weights_only=False)["model"].eval()
    found["model"] = model
    return found


@pytest.mark.slow
def test_maps_and_sizes(rows: dict[str, dict]) -> None:
    for kind in PRECISIONS:
        assert rows[kind]["format"] == kind
        assert rows[kind]["latency_mean_ms"] > 0
        assert rows[kind]["inspector_mean_ms"] > 0
    assert rows["torch"]["map_deviation_max"] == 0
    assert max(rows[kind]["map_deviation_max"] for kind in ("onnx", "openvino")) < 1e-4
    assert 1e-6 < rows["openvino_float16"]["map_deviation_max"] < 0.05
    assert rows["openvino_float16"]["size_mib"] < 0.65 * rows["openvino"]["size_mib"]
    assert 0 < rows["openvino_int8"]["map_deviation_mean"] <= 0.04  # 0.02 on the images that it was chosen with
    assert rows["openvino_int8"]["size_mib"] < rows["openvino"]["size_mib"]


@pytest.mark.slow
def test_accuracy_is_that_of_the_model(rows: dict[str, dict], settings: Settings) -> None:
    data, model = prepared(settings.accuracy_data).test_data, rows["model"]
    with torch.no_grad():
        scores = [model(data[index].image[None]).pred_score.item() for index in range(len(data))]
    expected = roc_auc_score([int(data[index].gt_label) for index in range(len(data))], scores)
    for kind in ("torch", "onnx", "openvino"):
        assert rows[kind]["image_AUROC"] == pytest.approx(expected)


def test_formats_are_those_of_the_settings() -> None:
    assert tuple(PRECISIONS) == Format.__args__


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporting, "module_available", lambda name: name != "nncf")
    with pytest.raises(ModuleNotFoundError, match=r'openvino_int8 needs nncf: pip install "anomalib-pack\[export\]"'):
        export(None, "openvino_int8", tmp_path, None)


def test_rows_of_a_model(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    """The network's first, then torch, which the others are compared with, whether asked for or not."""
    calls = []

    def record(_or_error, function, *arguments) -> dict:
        calls.append((function.__name__, *arguments[2:3]))
        if arguments[2:3] == ("onnx",):
            raise RuntimeError("killed")
        return {"size_mib": 1.0}

    monkeypatch.setattr(measurement, "in_own_process", record)
    some = Settings(models=[UNIAD], formats=["openvino", "onnx"])
    found = list(pipeline._rows_of(entries(some)[0], some))
    assert calls == [("measure",), *(("measure_format", kind) for kind in ("torch", "openvino", "onnx"))]
    assert [row.get("format") for row in found] == [None, "torch", "openvino", "onnx"]
    assert found[3]["error"] == "killed"
    calls.clear()
    assert len(list(pipeline._rows_of(entries(some)[0], Settings(models=[UNIAD])))) == len(calls) == 1


def test_tables(tmp_path: Path) -> None:
    """Of files alone: their rows are not among the networks'."""
    file = {"model": "Net", "format": "onnx", "size_mib": 12.5, "image_AUROC": 0.875, "latency_mean_ms": 20.0}
    file |= {
        "inspector_mean_ms": 31.4,
        "latency_p95_ms": 25.0,
        "map_deviation_mean": 0.0123,
        "map_deviation_max": 0.456,
    }
    rows = [
        {"model": "Net", "error": "x", "traceback": ""},
        file,
        {"model": "Net", "format": "openvino", "error": "a | b"},
    ]
    write_markdown(rows, tmp_path / "results.md", "image_AUROC")
    networks, files = (tmp_path / "results.md").read_text().split("## Files")
    assert "onnx" not in networks
    assert "| Net | onnx | 12.5 | 0.875 | 1.23 | 45.6 | 20.0 | 25.0 | 50.0 | 31.4 |" in files
    assert "| Net, openvino | failed: a \\| b |" in files
    console = Console(width=100, record=True)
    console.print(console_table(rows))
    assert "onnx" not in console.export_text()
    console.print(format_table(rows))
    text = console.export_text()
    assert np.all([word in text for word in ("onnx", "0.875", "45.6", "50.0", "31.4", "openvino", "failed")])
