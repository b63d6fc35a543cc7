"""`anomalib sweep`, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.engine import Engine
from anomalib.pipelines.components.runners import ParallelRunner, SerialRunner
from sweep_runs import TINY, adjustable, sweep
from tiny_model import TinyModel
from waiting import TIMEOUT, wait_until

from anomalib_pack.callbacks import SeedEverything
from anomalib_pack.data import MVTecLoco
from anomalib_pack.metrics import GroupEvaluator
from anomalib_pack.sweep import Sweep, pipeline
from anomalib_pack.sweep.job import SweepJobGenerator, one_gpu
from anomalib_pack.sweep.results import read_rows
from anomalib_pack.sweep.settings import read_plan

TESTS = Path(__file__).parents[1]


def test_models_that_differ(here: Path, tray, capfd) -> None:
    """Different arguments, metrics and lengths of training in one sweep, and two jobs that fail."""
    config = {
        "models": [
            TINY,
            adjustable("Short", grid_size={"grid": [2, 3]}),
            adjustable("Long", trainer={"max_epochs": 2}, grid_size=2),
            adjustable("Unbuilt", fail="build"),
            adjustable("Untrained", fail="train"),
            adjustable("Exits", fail="exit"),
            {"class_path": "Padim", "init_args": {"pre_trained": False, "n_features": 3, "layers": ["layer3"]}},
        ],
        "data": [tray],
        "seeds": [0, 1],
        "trainer": {"max_epochs": 1},
    }
    status, folder, rows = sweep(here, config)
    shown = capfd.readouterr().out
    assert status == 1
    assert len(rows) == 16
    failures = {
        "Unbuilt": "ValueError: cannot be built",
        "Untrained": "RuntimeError: cannot be trained",
        "Exits": "SystemExit: 3",
    }
    for model, error in failures.items():
        for seed in (0, 1):
            row = rows[model, "", seed]
            assert row["error"] == error
            assert "Traceback" in (folder / "logs" / f"{row['job']}.log").read_text()
            assert f"{model}, MVTecLoco, seed {seed} failed: {error}" in shown.replace("\n", "")
    assert "6 of 16 jobs failed" in shown

    good = {key: row for key, row in rows.items() if key[0] not in failures}
    for row in good.values():
        assert row["error"] == ""
        assert float(row["throughput"]) > 0
        assert 0 < float(row["fit_duration"]) <= float(row["job_duration"])
        assert float(row["test_duration"]) > 0
        assert 0 <= float(row["image_AUROC"]) <= 1
    assert rows["TinyModel", "", 0]["pixel_AUPRO_logical_anomalies"]  # the pack's metrics, of each group
    assert rows["Padim", "", 0]["pixel_AUPRO"] == ""  # not among Anomalib's own
    assert rows["Padim", "", 0]["model.init_args.layers"] == "['layer3']"
    assert {float(row["epochs"]) for (model, *_), row in good.items() if model.startswith("Short")} == {1.0}
    assert {float(row["epochs"]) for (model, *_), row in good.items() if model == "Long"} == {2.0}
    assert float(rows["Short grid_size=3", "", 0]["size"]) == 3

    # The seed controls the initial weights, whatever ran before.
    initial = [float(rows[model, "", seed]["initial"]) for seed in (0, 1) for model in ("Short grid_size=2", "Long")]
    assert initial[0] == initial[1] != initial[2] == initial[3]

    # The table has mean and sample standard deviation of the rows.
    for model in ("TinyModel", "Long", "Padim"):
        values = [100 * float(rows[model, "", seed]["image_AUROC"]) for seed in (0, 1)]
        assert f"{fmean(values):.1f} ± {stdev(values):.1f}" in (folder / "results.md").read_text()
    tables = [line for line in shown.splitlines() if "─" in line or "±" in line]
    assert tables
    assert max(map(len, tables)) <= 80


def test_same_as_a_training(here: Path, tray) -> None:
    """What the sweep computes is what anybody gets from the Engine with the same seed."""
    _, _, rows = sweep(here, {"models": [TINY], "data": [tray], "seeds": [5], "trainer": {"max_epochs": 2}})
    seeding = SeedEverything(5)
    model, datamodule = TinyModel(evaluator=GroupEvaluator()), MVTecLoco(**tray["init_args"])
    engine = Engine(callbacks=[seeding], max_epochs=2, accelerator="cpu")
    engine.fit(model, datamodule=datamodule)
    (metrics,) = engine.test(model, datamodule=datamodule)
    assert {name: float(rows["TinyModel", "", 5][name]) for name in metrics} == metrics


def test_each_section_says_what_it_means(here: Path, tray) -> None:
    """A dotted path is no name among Anomalib's, categories become rows, and `data_args` belong to a model."""
    namesake = tray | {"class_path": "sweep_models.Kolektor", "name": "Trays"}
    namesake["init_args"] = tray["init_args"] | {"eval_batch_size": {"grid": [2, 3]}}
    model = adjustable(trainer={"max_epochs": 1}) | {"data_args": {"train_batch_size": 2}}
    status, folder, rows = sweep(here, {"models": [model], "data": [namesake]})
    assert status == 0
    assert {row for _, row, _ in rows} == {"eval_batch_size=2", "eval_batch_size=3"}
    assert {row["data.init_args.train_batch_size"] for row in rows.values()} == {"2"}
    assert "## Trays, image AUROC" in (folder / "results.md").read_text()


def test_resume(here: Path, tray) -> None:
    """Successful jobs are kept, failed ones tried again, new ones added, in the same folder."""
    failing = {"fail": "train"}
    config = {"models": [TINY, adjustable("Again", **failing)], "data": [tray], "trainer": {"max_epochs": 1}}
    status, folder, first = sweep(here, config)
    assert status == 1
    # A name is no part of what is computed, so this is the same job; the other one is new.
    config["models"] = [TINY, adjustable("Renamed", **failing), adjustable("New")]
    status, again, second = sweep(here, config, "--resume", folder)
    assert (status, again) == (1, folder)
    assert {model: bool(row["error"]) for (model, *_), row in second.items()} == {
        "TinyModel": False,
        "Renamed": True,
        "New": False,
    }
    assert second["TinyModel", "", 0]["job_duration"] == first["TinyModel", "", 0]["job_duration"]
    assert second["Renamed", "", 0]["job"] == first["Again", "", 0]["job"]


def test_kill_and_resume(here: Path, tray) -> None:
    config = {
        "models": [TINY, adjustable("Slow", seconds=60)],
        "data": [tray],
        "trainer": {"max_epochs": 1, "enable_progress_bar": False},
    }
    path = here / "sweep.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS / 'sweep'}"}
    command = [sys.executable, "-m", "anomalib.cli.cli", "sweep", "--config", path]
    process = subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: any(here.glob("runs/sweep/*/results.csv")), process)
        wait_until(lambda: len(list(here.glob("runs/sweep/*/logs/*.log"))) == 2, process)  # the slow job runs
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT)  # returns when the job, which has the same output, has ended too
    (folder,) = (here / "runs" / "sweep").iterdir()
    (killed,) = read_rows(folder / "results.csv")
    assert killed["model"] == "TinyModel"

    config["models"][1]["init_args"]["seconds"] = 0.0
    status, _, rows = sweep(here, config, "--resume", folder)
    assert status == 0
    assert rows["TinyModel", "", 0]["job_duration"] == killed["job_duration"]
    assert rows["Slow", "", 0]["error"] == ""


@pytest.mark.slow
def test_parallel_jobs_and_a_crash(tmp_path: Path, tray) -> None:
    """Anomalib's parallel runner, with processes that really start; one that dies leaves its worker to the next job."""
    config = {"models": [adjustable("Crash", fail="crash"), TINY], "data": [tray], "trainer": {"max_epochs": 1}}
    (tmp_path / "logs").mkdir()
    runner = ParallelRunner(SweepJobGenerator("cpu"), n_jobs=1)
    runner.run({"experiments": read_plan(config).experiments, "folder": tmp_path})
    rows = {row["model"]: row for row in read_rows(tmp_path / "results.csv")}
    assert rows["TinyModel"]["error"] == ""
    assert "crashed" in rows["Crash"]["error"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(here: Path, tray) -> None:
    config = {"accelerator": ["cuda"], "models": [TINY], "data": [tray], "trainer": {"max_epochs": 1}}
    status, _, rows = sweep(here, config)
    assert status == 0
    assert rows["TinyModel", "", 0]["accelerator"] == "cuda"
    assert float(rows["TinyModel", "", 0]["throughput"]) > 0


@pytest.mark.parametrize(("devices", "expected"), [(1, SerialRunner), (4, ParallelRunner)])
def test_runners(monkeypatch, devices, expected) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    cpu, cuda = Sweep._setup_runners({"accelerator": ["cpu", "cuda"]})
    assert type(cpu) is SerialRunner
    assert type(cuda) is expected
    assert isinstance(cuda.generator, SweepJobGenerator)
    assert getattr(cuda, "n_jobs", 1) == devices


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("4,6", "6"), ("GPU-a,GPU-b", "GPU-b")])
def test_a_job_sees_one_gpu(monkeypatch, visible, expected) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with one_gpu(1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    with one_gpu(None):
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_wrong_configuration(here: Path, tray, capsys) -> None:
    path = here / "sweep.yaml"
    for text, message in (
        ("models: [", "sweep.yaml"),
        (yaml.safe_dump({"models": [], "data": [tray]}), "models must be a list with at least one entry"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit) as stop:
            AnomalibCLI(["sweep", "--config", str(path)])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert message in said
        assert "usage: anomalib sweep --config" in said
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(["sweep", "--config", "missing.yaml"])
    assert "missing.yaml" in capsys.readouterr().err
    path.write_text(yaml.safe_dump({"models": [TINY], "data": [tray]}))
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(["sweep", "--config", str(path), "--resume", "elsewhere"])
    assert stop.value.code == 2
    assert "resume must be the folder of a sweep" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_cuda_that_is_not_there(here: Path, tray, capsys, monkeypatch) -> None:
    monkeypatch.setattr(pipeline.torch.cuda, "is_available", lambda: False)
    path = here / "sweep.yaml"
    path.write_text(yaml.safe_dump({"models": [TINY], "data": [tray], "accelerator": ["cuda"]}))
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(["sweep", "--config", str(path)])
    assert stop.value.code == 2
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err
