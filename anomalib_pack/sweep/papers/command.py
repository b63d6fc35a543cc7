"""Runs what is missing in the store and prints the tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from rich.console import Console

from anomalib_pack.files import replace_file
from anomalib_pack.sweep.job import RESULTS
from anomalib_pack.sweep.keeping import LOGS
from anomalib_pack.sweep.papers import costs, report
from anomalib_pack.sweep.papers.cells import Results, measured
from anomalib_pack.sweep.papers.files import table_files
from anomalib_pack.sweep.papers.settings import PaperTable, read_tables
from anomalib_pack.sweep.papers.store import runs_of, versions_here, versions_of
from anomalib_pack.sweep.results import is_done, rows_by_job
from anomalib_pack.sweep.settings import Experiment, check_experiments

ERROR_WIDTH = 160

RunJobs = Callable[[list[Experiment], Path], None]


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        tables: Those that were asked for.
        experiments: The trainings that they read, each once, with what all tables of their papers ask of them.
    """

    tables: list[PaperTable]
    experiments: list[Experiment]


def read_plan(path: Path) -> Plan:
    """Read a table, or all tables of a folder, and check all that they say.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If anything is wrong; the message names the file.
    """
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    files = table_files(path) if path.is_dir() else [path]
    of_papers = {folder: table_files(folder) for folder in dict.fromkeys(file.parent for file in files)}
    tables = read_tables([file for of_paper in of_papers.values() for file in of_paper], accelerator)
    wanted = [table for table in tables if table.path in files]
    for table in wanted:
        costs.read_costs(table)
    runs = runs_of(wanted, tables)
    check_experiments(runs)
    return Plan(wanted, runs)


def run_plan(plan: Plan, store: Path, run_jobs: RunJobs) -> bool:
    """Run what is not done, and print and write the tables.

    Args:
        plan: What is to be done.
        store: Folder of all runs.
        run_jobs: Runs experiments and writes their rows into the store.

    Returns:
        Whether a run failed.
    """
    results = rows_by_job(store / RESULTS)
    pending = [run for run in plan.experiments if not is_done(run, results)]
    console = Console()
    console.print(f"{len(plan.experiments)} runs, {len(pending)} of them to do. Store: {store}", soft_wrap=True)
    stopped = None
    try:
        run_jobs(pending, store)
    except KeyboardInterrupt as stop:  # what there is can be seen
        stopped = stop
    results = rows_by_job(store / RESULTS)
    costs_failed = [_report(table, results, store, console, measure=stopped is None) for table in plan.tables]
    if stopped is not None:
        raise stopped
    errors = [(run, results.get(run.key, {"error": "did not run"})["error"]) for run in plan.experiments]
    failed = [(run, error) for run, error in errors if error]
    for run, error in failed:
        text = shorten(error, ERROR_WIDTH, placeholder=" ...")
        log = store / LOGS / f"{run.key}.log"
        console.print(f"{run.title} failed: {text} ({log})", markup=False, soft_wrap=True)
    if failed:
        console.print(f"{len(failed)} of {len(plan.experiments)} runs failed. The same command tries them again.")
    return bool(failed) or any(costs_failed)


def _report(table: PaperTable, results: Results, store: Path, console: Console, *, measure: bool) -> bool:
    """Write and print a table; return whether a model failed in `anomalib efficiency`."""
    section = costs.read_costs(table)
    cost_rows: Results = {}
    failures: list[str] = []
    absent: list[str] = []
    if section:
        if not costs.can_measure(section[0]):
            absent = [f"Not measured: {section[0].device} is not there."]
        elif measure:
            costs.measure_missing(*section, store)
        cost_rows = rows_by_job(store / costs.RESULTS)
        failures = costs.failures(section[1], cost_rows)
    entries: report.Entries = {}
    for place, cell in table.cells.items():
        is_cost = "measure" in cell.select
        found = costs.measured_cost(cell, section[1], cost_rows) if is_cost else measured(cell, results)
        versions = versions_of(found.runs, cost_rows if is_cost else results) if found else set()
        entries[place] = report.Entry(cell, found, frozenset(versions), versions <= {versions_here()})
    notes = [*absent, *failures, *_version_notes(entries)]
    base = store / table.name
    replace_file(base.with_suffix(".md"), report.markdown(table, entries, notes).encode())
    replace_file(base.with_suffix(".csv"), report.csv_text(table, entries).encode())
    console.print(*report.console_tables(table, entries, console.width))
    for note in [report.NOTE, *notes, f"Written to {base}.md and {base}.csv"]:
        console.print(note, markup=False, soft_wrap=True)
    return bool(failures)


def _version_notes(entries: report.Entries) -> list[str]:
    runs: dict[str, set[str]] = {}
    for entry in entries.values():
        for version in entry.versions:
            runs.setdefault(version, set()).update(entry.found.runs)
    if set(runs) <= {versions_here()}:
        return []
    return [f"Installed: {versions_here()}. The runs have {'; '.join(sorted(runs))}."]
