"""Means and standard deviations, tables and the file of results."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from anomalib_pack.sweep.results import read_rows, write_row
from anomalib_pack.sweep.settings import Experiment, Plan
from anomalib_pack.sweep.tables import console_tables, markdown, metric_tables

METRIC = "image_AUROC"


def experiment(model: str, row: str, seed: int) -> Experiment:
    data = {"class_path": "MVTecAD", "init_args": {"category": row}}
    return Experiment({"class_path": model}, data, {}, seed, "cpu", model, "MVTecAD", row)


def one_table(values: dict) -> list[tuple[str, list[str]]]:
    """Rows of the table of some results, given by model, row and seed; None failed, ... did not run."""
    experiments = [experiment(*key) for key in values]
    results = {
        each.key: {METRIC: "" if value is None else str(value), "error": "boom" if value is None else ""}
        for each, value in zip(experiments, values.values(), strict=True)
        if value is not ...
    }
    (table,) = metric_tables(Plan(experiments, ["cpu"], [METRIC]), results)
    return table.rows


def test_mean_and_standard_deviation() -> None:
    """By hand: rows (0.90, 0.94) and (0.80, 0.88); per seed 0.85 and 0.91; deviations from n - 1."""
    values = {("A", "x", 0): 0.90, ("A", "x", 1): 0.94, ("A", "y", 0): 0.80, ("A", "y", 1): 0.88}
    assert one_table(values) == [("x", ["92.0 ± 2.8"]), ("y", ["84.0 ± 5.7"]), ("mean", ["88.0 ± 4.2"])]


def test_what_is_missing_is_said() -> None:
    values = {
        ("A", "x", 0): 0.9,
        ("A", "x", 1): None,
        ("A", "y", 0): 0.8,
        ("A", "y", 1): 0.7,
        ("B", "x", 0): None,
        ("B", "x", 1): None,
        ("B", "y", 0): ...,
        ("B", "y", 1): ...,
    }
    assert one_table(values) == [
        ("x", ["90.0 *", "failed"]),
        ("y", ["75.0 ± 7.1", ""]),
        ("mean", ["85.0 *", ""]),  # of the seed that has both
    ]


@pytest.mark.parametrize("partly", [False, True])
def test_groups(partly: bool) -> None:
    """Groups are rows where one job has all of the data, and every model reports them."""
    experiments = [experiment(model, "", 0) for model in ("A", "B")]
    row = {"error": "", METRIC: "0.5", f"{METRIC}_cable": "0.6", f"{METRIC}_nut": "0.8", f"{METRIC}_mean": "0.7"}
    bare = {"error": "", METRIC: "0.4", f"{METRIC}_cable": "", f"{METRIC}_nut": "", f"{METRIC}_mean": ""}
    results = {experiments[0].key: row, experiments[1].key: bare if partly else row}
    (table,) = metric_tables(Plan(experiments, ["cpu"], [METRIC, "pixel_AUROC"]), results)
    if partly:
        assert table.rows == [("all", ["50.0", "40.0"])]
    else:
        assert table.rows == [("cable", ["60.0"] * 2), ("nut", ["80.0"] * 2), ("mean", ["70.0"] * 2)]


def test_console_is_readable_at_80_columns() -> None:
    models = [f"Model{index}" for index in range(7)] + ["AnExtraordinarilyLongNameOfAModel grid_size=3"]
    values = [(model, row, seed) for model in models for row in ("screw", "x" * 40) for seed in (0, 1)]
    experiments = [experiment(*value) for value in values]
    results = {each.key: {METRIC: str(0.9 + each.seed / 10), "error": ""} for each in experiments}
    (table,) = metric_tables(Plan(experiments, ["cpu"], [METRIC]), results)
    console = Console(file=StringIO(), width=80)
    parts = console_tables(table, 80)
    console.print(*parts)
    text = console.file.getvalue()
    assert 1 < len(parts) <= 3
    assert text.count("95.0 ± 7.1") == 3 * len(models)  # no cell is cut or wrapped
    assert max(map(len, text.splitlines())) <= 80
    alone = replace(table, models=["A"], rows=[("all", ["50.0"])])
    console.print(*console_tables(alone, 80))
    assert console.file.getvalue().count(f"{table.title}, in %") == len(parts) + 1  # no title is broken
    assert f"| {' | '.join(['mean', *['95.0 ± 7.1'] * 8])} |" in markdown([table], {})


def test_no_results() -> None:
    assert metric_tables(Plan([experiment("A", "", 0)], ["cpu"], [METRIC]), {}) == []
    assert "- A, x, seed 0: boom" in markdown([], {"A, x, seed 0": "boom"})


def row(job: str, **values) -> dict:
    return {"job": job, "model": "A", "dataset": "D", "row": "", "error": "", **values}


def test_results_file(tmp_path: Path) -> None:
    """Rows with other columns, a job that is done again, and many at a time."""
    path = tmp_path / "results.csv"
    assert read_rows(path) == []
    write_row(row("a", **{"seed": 0, "model.lr": 1, "image_AUROC": 0.5}), path)
    write_row(row("b", **{"seed": 0, "model.size": 2, "image_F1": 0.25, "error": "one, two"}), path)
    write_row(row("a", **{"seed": 0, "model.lr": 1, "image_AUROC": 0.75}), path)
    header = path.read_text().splitlines()[0]
    assert header == "job,model,dataset,row,error,seed,model.lr,model.size,image_AUROC,image_F1"
    assert [(found["job"], found["image_AUROC"], found["error"]) for found in read_rows(path)] == [
        ("b", "", "one, two"),
        ("a", "0.75", ""),
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: write_row(row(f"c{index}", seed=index), path), range(24)))
    assert len(read_rows(path)) == 26
