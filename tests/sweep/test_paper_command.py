"""Tables of a paper, as a user runs them, over tiny models."""

import csv
import logging
from pathlib import Path
from statistics import fmean, stdev

import fake_ray
import pytest
import torch
import yaml

from anomalib_pack.efficiency import measurement
from anomalib_pack.sweep import Sweep
from anomalib_pack.sweep.job import SweepJob
from anomalib_pack.sweep.results import read_rows

SCALED = "sweep_models.Scaled"


def command(*options) -> int:
    """Run the command; return its exit status."""
    try:
        Sweep().run(Sweep.get_parser().parse_args([*map(str, options)]))
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def paper(here: Path, tray) -> Path:
    """A folder with two tables that read the same trainings."""
    trainings = {
        "seeds": [0, 1],
        "trainer": {"max_epochs": 1},
        "data": [{**tray, "name": "Tray"}],
        "models": [
            {"class_path": SCALED, "name": "Ours", "tests": {"doubled": {"init_args": {"factor": 2.0}}}},
            {"class_path": "tiny_model.TinyModel", "name": "Other", "seeds": [0]},
        ],
    }
    both = {
        "title": "Both models",
        "runs": "runs/main",
        "select": {"metric": "image_AUROC"},
        "rows": [{"model": ["Ours", "Other"]}],
        "columns": [{"name": "all"}, {"group": ["logical_anomalies"]}],
        "published": {"Ours": ["10.0 ± 0.5", "20.0"], "Other": ["30.0", "-"]},
    }
    tests = {
        "title": "Two tests of a training",
        "runs": "runs/main",
        "select": {"model": "Ours"},
        "rows": [{"name": "trained"}, {"test": ["doubled"]}],
        "columns": [{"metric": ["image_AUROC", "pixel_AUPRO"]}],
    }
    folder = here / "papers" / "tiny"
    for name, content in (("runs/main", trainings), ("table_1", both), ("table_2", tests)):
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    return folder


def cells(here: Path, table: str, store: str = "runs/papers") -> dict:
    with (here / store / "tiny" / f"{table}.csv").open(newline="") as file:
        return {(row["row"], row["column"]): row for row in csv.DictReader(file)}


def rows(here: Path) -> dict:
    return {(row["model"], row["seed"]): row for row in read_rows(here / "runs" / "papers" / "results.csv")}


def test_tables_are_views_of_runs(here: Path, paper: Path, capfd, monkeypatch) -> None:
    """Each training is run once and measures what all tables need, whichever asks first."""
    assert command("--config", "papers/tiny/table_1") == 0
    shown = capfd.readouterr().out
    found = rows(here)
    assert set(found) == {("Ours", "0"), ("Ours", "1"), ("Other", "0")}
    ours = [found["Ours", seed] for seed in "01"]
    assert all(row["anomalib_pack"] and row["torch"] for row in ours)
    # Table 1 asks for images alone, Table 2 also for pixels and the other test.
    assert all(row["pixel_AUPRO"] and row["doubled/pixel_AUPRO"] for row in ours)
    assert found["Other", "0"]["pixel_AUPRO"] == ""
    # The other test has its own argument and the trained weights.
    for row in ours:
        assert (float(row["factor"]), float(row["doubled/factor"])) == (1, 2)
        assert row["doubled/weight"] == row["weight"]

    values = [100 * float(row["image_AUROC"]) for row in ours]
    table = cells(here, "table_1")
    cell = table["Ours", "all"]
    assert float(cell["measured"]) == pytest.approx(fmean(values))
    assert float(cell["measured_deviation"]) == pytest.approx(stdev(values))
    assert float(cell["difference"]) == pytest.approx(fmean(values) - 10)
    error = (0.5**2 / 2 + stdev(values) ** 2 / 2) ** 0.5
    assert cell["significant"] == str(abs(fmean(values) - 10) > 2 * error)
    logical = [100 * float(row["image_AUROC_logical_anomalies"]) for row in ours]
    assert float(table["Ours", "logical_anomalies"]["measured"]) == pytest.approx(fmean(logical))
    assert table["Ours", "logical_anomalies"]["significant"] == ""  # the published deviation is unknown
    assert table["Other", "logical_anomalies"]["measured"] == ""  # the paper has nothing there
    assert f"{fmean(values):.2f} ± {stdev(values):.2f}" in shown
    assert "10.00 ± 0.50<br>" in (here / "runs/papers/tiny/table_1.md").read_text()

    monkeypatch.setattr(SweepJob, "run", lambda self, _task=None: pytest.fail("ran again"))
    assert command("--config", "papers/tiny/table_2.yaml") == 0  # prints at once
    table = cells(here, "table_2")
    doubled = [100 * float(row["doubled/image_AUROC"]) for row in ours]
    assert float(table["doubled", "image_AUROC"]["measured"]) == pytest.approx(fmean(doubled))
    assert float(table["trained", "image_AUROC"]["measured"]) == pytest.approx(fmean(values))
    shown = capfd.readouterr().out
    assert "†" not in shown.replace("† of runs", "")
    assert command("--config", "papers/tiny", "--list") == 0
    assert "3 jobs, 3 of them done" in capfd.readouterr().out

    # Rows of other versions stay, but are named.
    path = here / "runs" / "papers" / "results.csv"
    stored = read_rows(path)
    stored[0]["torch"] = "1.0.0"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, stored[0])
        writer.writeheader()
        writer.writerows(stored)
    assert command("--config", "papers/tiny/table_1") == 0
    shown = capfd.readouterr().out
    assert "†" in shown.replace("† of runs", "")
    assert "torch 1.0.0" in shown
    assert "Installed: anomalib_pack" in shown


def test_ray(here: Path, paper: Path, capfd, monkeypatch) -> None:
    """Runs of tables as tasks; what is lost is a failed run, which the same command tries again."""
    ray = fake_ray.use(monkeypatch, fake_ray.FakeRay(loses_first=True))
    assert command("--config", "papers/tiny/table_1", "--runner", "ray") == 1
    shown = capfd.readouterr().out
    assert "3 jobs on 1 nodes" in shown
    assert "Ours, Tray, seed 1 failed: NodeDiedError: the node died too often" in shown.replace("\n", " ")
    assert ray.asked == [{"num_cpus": 1, "num_gpus": 0}] * 3 + ["shutdown"]
    assert {key: bool(row["error"]) for key, row in rows(here).items()} == {
        ("Ours", "0"): False,
        ("Ours", "1"): True,
        ("Other", "0"): False,
    }
    assert command("--config", "papers/tiny/table_1", "--runner", "ray") == 0
    assert "1 jobs on 1 nodes" in capfd.readouterr().out
    store = here / "runs" / "papers"
    for (model, _), row in rows(here).items():
        assert row["error"] == ""
        assert (row["accelerator"], row["threads"]) == ("cpu", str(torch.get_num_threads()))
        assert row["host"]
        assert (store / "logs" / f"{row['job']}.log").is_file()
        folder = store / "predictions" / row["job"]
        kept = {str(path.relative_to(folder)) for path in folder.rglob("*.csv")}
        tests = {"", "doubled/"} if model == "Ours" else {""}
        assert kept == {f"{test}{name}.csv" for test in tests for name in ("test_predictions", "test_defects")}
    assert float(cells(here, "table_1")["Ours", "all"]["measured"]) >= 0


def test_folder_store_and_what_fails(here: Path, paper: Path, capfd) -> None:
    """A folder is all tables of a paper; a failed run is tried again, others are kept."""
    path = paper / "runs" / "main.yaml"
    content = yaml.safe_load(path.read_text())
    content["seeds"] = [0]
    good = dict(content["models"][1])
    content["models"][1] |= {"class_path": "sweep_models.Adjustable", "init_args": {"fail": "build"}}
    path.write_text(yaml.safe_dump(content))
    assert command("--config", paper, "--store", "mine") == 1
    shown = capfd.readouterr().out
    assert "Other, Tray, seed 0 failed: ValueError: cannot be built" in shown
    assert {(here / "mine" / "tiny" / f"table_{number}.md").is_file() for number in (1, 2)} == {True}
    assert cells(here, "table_1", "mine")["Other", "all"]["measured"] == ""
    content["models"][1] = good
    path.write_text(yaml.safe_dump(content))
    assert command("--config", paper, "--store", "mine") == 0
    assert "2 runs, 1 of them to do" in capfd.readouterr().out
    assert float(cells(here, "table_1", "mine")["Other", "all"]["measured"]) >= 0


def test_what_is_asked_later_is_measured_again(here: Path, paper: Path, capfd) -> None:
    """A new metric of a table, or another recipe of a test, makes its runs anew, and no others."""
    path = paper / "runs" / "main.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"seeds": [0]}))
    only = ["--config", paper / "table_2.yaml"]
    assert command(*only) == 0
    path = paper / "table_2.yaml"
    content = yaml.safe_load(path.read_text())
    content["columns"][0]["metric"].append("pixel_AUPRO_0.05")
    path.write_text(yaml.safe_dump(content))
    capfd.readouterr()
    assert command(*only) == 0
    assert "1 runs, 1 of them to do" in capfd.readouterr().out
    assert float(cells(here, "table_2")["doubled", "pixel_AUPRO_0.05"]["measured"]) >= 0


def test_dry_run(here: Path, paper: Path, capfd) -> None:
    """Says what it built; a class that cannot be built is an error before anything runs."""
    level = logging.getLogger("anomalib").level
    assert command("--config", paper, "--dry_run") == 0
    assert logging.getLogger("anomalib").level == level  # it was quiet meanwhile
    assert "3 jobs: the classes, arguments and categories of 3 models" in " ".join(capfd.readouterr().out.split())
    assert not (here / "runs").exists()
    path = paper / "runs" / "main.yaml"
    content = yaml.safe_load(path.read_text())
    content["models"][1]["init_args"] = {"colour": 1}
    path.write_text(yaml.safe_dump(content))
    assert command("--config", paper, "--dry_run") == 2
    assert "unknown key colour" in capfd.readouterr().err
    content["models"][1]["init_args"] = {}
    content["data"][0] = {"name": "Tray", "class_path": "MVTecAD", "init_args": {"category": "bottles"}}
    path.write_text(yaml.safe_dump(content))
    assert command("--config", paper, "--dry_run") == 2
    assert "there is no category bottles, but bottle, cable" in capfd.readouterr().err


def test_costs(here: Path, paper: Path, capfd, monkeypatch) -> None:
    """Cells that `anomalib efficiency` measures: once, in the unit of the table; a model that fails is named."""
    monkeypatch.setattr(measurement, "in_own_process", lambda function, *arguments: function(*arguments))
    small = {"name": "S", "class_path": "DistilledEfficientAd", "image_size": [256, 256]}
    content = {
        "title": "Costs",
        "efficiency": {"warmup": 0, "passes": 1, "runs": 1, "batch_sizes": [], "models": [small]},
        "rows": [{"name": "Parameters", "measure": "parameters", "divide": 1e6}],
        "columns": [{"model": ["S"]}],
        "published": {"Parameters": [8]},
    }
    path = paper / "table_3.yaml"
    path.write_text(yaml.safe_dump(content))
    assert command("--config", path) == 0
    cell = cells(here, "table_3")["Parameters", "S"]
    assert float(cell["measured"]) == pytest.approx(8.06, abs=0.005)  # docs/efficiency.md
    assert cell["significant"] == ""
    assert "torch" in cell["versions"]

    monkeypatch.setattr(measurement, "in_own_process", lambda *_arguments: pytest.fail("measured again"))
    assert command("--config", path) == 0

    monkeypatch.setattr(measurement, "in_own_process", lambda *_arguments: {"error": "out of\nmemory", "traceback": ""})
    content["efficiency"]["precision"] = "float16"
    path.write_text(yaml.safe_dump(content))
    capfd.readouterr()
    assert command("--config", path) == 1
    assert "S failed: out of memory" in capfd.readouterr().out
    content["efficiency"]["passes"] = 0
    path.write_text(yaml.safe_dump(content))
    assert command("--config", path, "--dry_run") == 2
    assert "efficiency: " in capfd.readouterr().err
