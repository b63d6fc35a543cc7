"""`results.csv`: a row per job, as soon as it has ended."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from anomalib_pack.files import replace_file
from anomalib_pack.sweep.settings import Experiment

FIRST = ["job", "model", "dataset", "row", "error"]
CONFIG = ("accelerator", "seed", "model.", "data.", "trainer.")  # beginnings of columns


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read all rows; none if the file is not there. What a job does not have is an empty string."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows_by_job(path: Path) -> dict[str, dict[str, str]]:
    """Read all rows, by job."""
    return {row["job"]: row for row in read_rows(path)}


def write_row(row: dict[str, Any], path: Path) -> None:
    """Add the row of a job, in place of an earlier one of the same job.

    Jobs on several GPUs end at the same time, so the file is locked. It is replaced as a whole, because another model
    may bring new columns, and so that a kill leaves the old or the new one.

    Raises:
        OSError: If it cannot be written; the message names it.
    """
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = [old for old in read_rows(path) if old["job"] != row["job"]]
        rows.append(row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, _columns(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)
        replace_file(path, text.getvalue().encode())


def is_done(experiment: Experiment, results: dict[str, dict[str, str]]) -> bool:
    """Whether an experiment has succeeded and measured all that is asked of it.

    Args:
        experiment: With `measures` or without.
        results: Rows by job.
    """
    row = results.get(experiment.key)
    if row is None or row["error"]:
        return False
    there = json.loads(row.get("measured") or "{}")
    return all(
        test in there
        and there[test]["recipe"] == asked["recipe"]
        and set(asked["metrics"]) <= set(there[test]["metrics"])
        for test, asked in experiment.asked.items()
    )


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """All columns: what the job is, its configuration, its results."""
    found = dict.fromkeys(column for row in rows for column in row if column not in FIRST)
    config = [column for column in found if column.startswith(CONFIG)]
    return [*FIRST, *config, *(column for column in found if column not in config)]
