"""Settings, tables, accuracy and the plot."""

from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from anomalib_pack.efficiency.accuracy import read_accuracy
from anomalib_pack.efficiency.plot import plot_latency
from anomalib_pack.efficiency.report import console_table, write_csv, write_markdown
from anomalib_pack.efficiency.settings import DEFAULT_DATA, Settings, check_device, entries

MEASURED = {
    "image_size": "256 x 256",
    "precision": "float16",
    "protocol": "prediction",
    "warmup": 1000,
    "passes": 1000,
    "runs": 5,
    "latency_mean_ms": 2.2345,
    "latency_std_ms": 0.0123,
    "latency_median_ms": 2.1,
    "latency_p95_ms": 12.34,
    "inspector_mean_ms": 3.21,
    "throughput_1": 450.0,
    "throughput_std_1": None,
    "peak_memory_mib_1": 1077.1,
    "throughput_16": 614.2,
    "throughput_std_16": 2.04,
    "peak_memory_mib_16": 1234.5,
    "parameters": 83_000_000,
    "flops": 41_200_000_000,
    "flops_profiler": 40_100_000_000,
    "peak_memory_mib": 1077.1,
    "bank": "",
    "bank_values": 0,
    "bank_mib": 0.0,
    "device": "cpu",
    "device_name": "a CPU",
    "threads": 2,
    "anomalib_pack": "0.1.0",
    "anomalib": "2.7.0",
    "torch": "2.15.0",
    "timm": "1.0.31",
    "faiss": "",
    "cuda": "",
    "python": "3.11.7",
}
BANK = {"bank": "3528 x 1024", "bank_values": 3528 * 1024, "bank_mib": 13.78}
ROWS = [
    {"model": "Network", **MEASURED, "image_AUROC": 0.954},
    {"model": "Broken", "error": "RuntimeError: a | b " + 500 * "x", "traceback": "Traceback: ..."},
    {"model": "Bank", **MEASURED, **BANK, "latency_mean_ms": 32.0, "image_AUROC": 0.911},
]


def test_csv(tmp_path: Path) -> None:
    write_csv(ROWS, tmp_path / "results.csv")
    text = (tmp_path / "results.csv").read_text()
    assert "83000000," in text  # not 83000000.0
    assert "Traceback" not in text
    table = pd.read_csv(tmp_path / "results.csv")
    assert table.model.tolist() == ["Network", "Broken", "Bank"]
    assert table.error.isna().tolist() == [True, False, True]
    assert len(table.error[1]) > 500


def test_markdown(tmp_path: Path) -> None:
    write_markdown(ROWS, tmp_path / "results.md", "image_AUROC")
    text = (tmp_path / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns = {line.replace("\\|", "").count("|") for line in lines}
    assert len(columns) == 1
    assert "Throughput [img / s], batch 1 | Throughput [img / s], batch 16 |" in lines[0]
    assert "| Memory [MiB] | batch 1 | batch 16 | Bank |" in lines[0]
    speed = "| 0.954 | 2.23 (± 0.0123) | 2.10 | 12.3 | 3.21 | 450 | 614 (± 2.04) |"
    assert f"{speed} 83.0 | 41.2 | 40.1 | 1077 | 1077 | 1234 |  |  |" in lines[2]
    assert lines[3].startswith("| Broken | failed: RuntimeError: a \\| b")
    assert "| 83.0 + 3.61 |" in lines[4]  # as the paper writes PatchCore's
    assert "| 3528 x 1024 | 13.8 |" in lines[4]
    assert "device name: a CPU, threads: 2, protocol: prediction, warmup: 1000, passes: 1000, runs: 5." in text
    assert "torch 2.15.0" in text


def test_markdown_without_accuracy_or_success(tmp_path: Path) -> None:
    write_markdown(ROWS[1:2], tmp_path / "results.md", "image_AUROC")
    text = (tmp_path / "results.md").read_text()
    assert "No model could be measured." in text
    assert "image_AUROC" not in text


def test_console_table_fits_80_columns() -> None:
    rows = [{**row, "model": name} for row, name in zip(ROWS, ("ReverseDistillation", "Broken", "Bank"), strict=True)]
    console = Console(width=80, record=True)
    console.print(console_table(rows))
    text = console.export_text()
    for part in ("ReverseDistillation", "614", "83.0 + 3.61", "failed", "1077"):
        assert part in text
    assert "…" not in text


def test_plot(tmp_path: Path) -> None:
    plot_latency([ROWS[0], ROWS[2]], "image_AUROC", tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


@pytest.mark.parametrize("column", ["model", "model.class_path"])
def test_accuracy_is_the_mean_over_a_models_rows(tmp_path: Path, column: str) -> None:
    path = tmp_path / "results.csv"
    names = ["Padim", "anomalib.models.Ulsad", "Padim", "Broken"]
    pd.DataFrame({column: names, "image_AUROC": [0.8, 0.9, 0.6, None]}).to_csv(path)
    assert read_accuracy(path, "image_AUROC") == pytest.approx({"Padim": 0.7, "Ulsad": 0.9})


def test_accuracy_without_its_column(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    pd.DataFrame({"model": ["Padim"], "pixel_AUROC": [0.8]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match="image_AUROC, but has model, pixel_AUROC"):
        read_accuracy(path, "image_AUROC")


def test_entries() -> None:
    models = [{"class_path": "anomalib.models.Padim"}, {"class_path": "Padim", "name": "half", "precision": "float16"}]
    plain, half = entries(Settings(models=models))
    assert (plain.name, plain.precision, plain.init_args, plain.data) == ("Padim", "float32", {}, DEFAULT_DATA)
    assert (half.name, half.precision) == ("half", "float16")


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            [{"class_path": "Padim", "cpkt_path": "x"}],
            r"models\[0\] has the unknown key cpkt_path; allowed are class_path",
        ),
        ([{"class_path": "Padim"}, {"name": "x"}], r"models\[1\] needs a class_path"),
        ([{"class_path": "Padim"}, {"class_path": "Padim"}], "different names, got Padim more than once"),
        ([{"class_path": "Padim", "precision": "int8"}], r"precision of models\[0\] must be one of float32, .* 'int8'"),
        ([{"class_path": "Padim", "image_size": [256]}], r"image_size of models\[0\] must be \[height, width\]"),
        ([{"class_path": "Padim", "ckpt_path": "no.ckpt"}], r"ckpt_path of models\[0\] must be a file, got 'no.ckpt'"),
    ],
)
def test_impossible_entries(models: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entries(Settings(models=models))


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:99"])
def test_impossible_device(device: str) -> None:
    with pytest.raises(ValueError, match="device"):
        check_device(device)
