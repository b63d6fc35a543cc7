"""`anomalib efficiency`, as a user runs it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI
from waiting import TIMEOUT

from anomalib_pack.efficiency import Efficiency, measurement
from anomalib_pack.efficiency.settings import Entry, Settings, entries

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "efficiency").glob("*.yaml"))
UNIAD = {
    "class_path": "Uniad",
    "init_args": {"backbone": "resnet18", "layers": ["layer1", "layer2"], "weights": None, "hidden_dim": 32},
    "image_size": [64, 64],
}


def write(folder: Path, **values) -> Path:
    path = folder / "efficiency.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_command(tmp_path: Path) -> None:
    config = write(tmp_path, models=[UNIAD], warmup=0, passes=5, runs=2, batch_sizes=[2])
    (tmp_path / "accuracy.csv").write_text("model,image_AUROC\nUniad,0.97\n")
    command = [sys.executable, "-m", "anomalib.cli.cli", "efficiency", "--config", config, "--passes", "2"]
    command += ["--results", "accuracy.csv"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 0, result.stderr
    assert "[1/1] Uniad" in result.stdout
    assert "Uniad, batch 2, run 2 of 2: 100%" in result.stderr  # the progress of the passes
    assert "\r" not in result.stderr  # in lines, where there is no terminal
    (folder,) = (tmp_path / "runs" / "efficiency").iterdir()
    assert {path.name for path in folder.iterdir()} == {"results.csv", "results.md", "latency_accuracy.png"}
    table = pd.read_csv(folder / "results.csv", index_col="model")
    assert table.loc["Uniad", ["passes", "image_AUROC"]].tolist() == [2, 0.97]  # the option goes before the file
    assert table.loc["Uniad", "throughput_2"] > 0


def test_failing_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def in_this_process(function: Callable, measured: Callable, entry: Entry, settings: Settings) -> dict:
        if entry.name == "Killed":
            raise RuntimeError("the process was killed")
        return function(measured, entry, settings)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measurement, "in_own_process", in_this_process)
    models = [{"class_path": "NoSuchModel"}, UNIAD | {"name": "Killed"}, UNIAD]
    config = write(tmp_path, models=models, warmup=0, passes=1, runs=1, batch_sizes=[])
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(["efficiency", "--config", str(config)])
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert "NoSuchModel failed: UnknownModelError" in shown
    assert "Killed failed: the process was killed" in shown
    (folder,) = (tmp_path / "runs" / "efficiency").iterdir()
    table = pd.read_csv(folder / "results.csv", index_col="model")
    assert table.error.isna().to_dict() == {"NoSuchModel": False, "Killed": False, "Uniad": True}
    assert table.parameters["Uniad"] > 0
    assert "Traceback" in (folder / "errors.log").read_text()


def test_a_model_that_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has its row, and the command ends well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measurement, "in_own_process", lambda function, *arguments: function(*arguments))
    config = write(tmp_path, models=[{"class_path": "NoSuchModel", "may_fail": True}])
    AnomalibCLI(["efficiency", "--config", str(config)])
    assert "NoSuchModel failed: UnknownModelError" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs" / "efficiency").iterdir()
    assert "NoSuchModel | failed: UnknownModelError" in (folder / "results.md").read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": [UNIAD], "batchsizes": [1]}, "batchsizes"),
        ({"models": [UNIAD], "passes": 0}, "passes"),
        ({"models": [UNIAD], "runs": 0}, "runs"),
        ({"models": [UNIAD], "precision": "int8"}, "precision"),
        ({"models": [UNIAD], "protocol": "maps"}, "protocol"),
        ({"models": [UNIAD], "formats": ["tflite"]}, "formats"),
        ({"passes": 5}, "models"),
        ({"models": [UNIAD | {"cpkt_path": "x"}]}, "cpkt_path"),
        ({"models": [UNIAD], "results": "missing.csv"}, "missing.csv"),
    ],
)
def test_wrong_configuration(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    values: dict,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = Efficiency.get_parser()
    with pytest.raises(SystemExit) as stop:
        Efficiency().run(parser.parse_args(["--config", str(write(tmp_path, **values))]))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "usage: anomalib efficiency [" in said
    assert not (tmp_path / "runs").exists()


def test_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(["efficiency", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "models",
        "device",
        "precision",
        "protocol",
        "warmup",
        "passes",
        "runs",
        "batch_sizes",
        "data",
        "formats",
    ):
        assert f"--{option}" in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration(path: Path) -> None:
    arguments = Efficiency.get_parser().parse_args(["--config", str(path), "--device", "cpu"])
    found = entries(Settings(**{key: value for key, value in vars(arguments).items() if key != "config"}))
    assert found
