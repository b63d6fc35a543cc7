"""Cells that `anomalib efficiency` measures, kept in the store as well."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import torch
from jsonargparse import ArgumentError, ArgumentParser
from tqdm import tqdm

from anomalib_pack.efficiency.environment import library_versions
from anomalib_pack.efficiency.measurement import apart, measure
from anomalib_pack.efficiency.report import short_error
from anomalib_pack.efficiency.settings import Entry, Settings, entries
from anomalib_pack.sweep.papers.cells import Measured, Results
from anomalib_pack.sweep.papers.settings import Cell, PaperTable
from anomalib_pack.sweep.results import read_rows, write_row
from anomalib_pack.sweep.settings import fingerprint

RESULTS = "efficiency.csv"
MODELS, FOR_PLOT = "models", ("results", "metric")


def read_costs(table: PaperTable) -> tuple[Settings, dict[str, Entry]] | None:
    """Settings and models of the section `efficiency`, by the hash that the store has their rows under.

    Raises:
        ValueError: If a value is wrong.
    """
    if table.efficiency is None:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Settings)
    try:
        parsed = parser.parse_object(table.efficiency)
    except ArgumentError as error:
        msg = f"{table.path}: efficiency: {' '.join(str(error).split())}"
        raise ValueError(msg) from error
    settings = Settings(**{each.name: parsed[each.name] for each in fields(Settings)})
    common = {each.name: getattr(settings, each.name) for each in fields(Settings) if each.name not in FOR_PLOT}
    del common[MODELS]
    return settings, {
        fingerprint({**common, **{key: value for key, value in asdict(entry).items() if key != "name"}}): entry
        for entry in entries(settings)
    }


def can_measure(settings: Settings) -> bool:
    """Whether the device is there."""
    return not settings.device.startswith("cuda") or torch.cuda.is_available()


def measure_missing(settings: Settings, models: dict[str, Entry], store: Path) -> None:
    """Measure the models that the store has no row of, each in a process of its own."""
    done = {row["job"] for row in read_rows(store / RESULTS) if not row["error"]}
    for key, entry in models.items():
        if key in done:
            continue
        tqdm.write(f"[efficiency] {entry.name}")
        row = apart(measure, entry, settings)
        row.pop("traceback", None)
        write_row({"job": key, "model": entry.name, "error": "", **library_versions(), **row}, store / RESULTS)


def failures(models: dict[str, Entry], rows: Results) -> list[str]:
    """What went wrong with models that could not be measured."""
    errors = [(entry.name, rows.get(key, {}).get("error")) for key, entry in models.items()]
    return [f"{name} failed: {short_error({'error': error})}" for name, error in errors if error]


def measured_cost(cell: Cell, models: dict[str, Entry], rows: Results) -> Measured | None:
    """The value of a cell, if its model has been measured."""
    keys = [key for key, entry in models.items() if entry.name == cell.select["model"]]
    for row in filter(None, map(rows.get, keys)):
        value = row.get(cell.select["measure"])
        if value and not row["error"]:
            return Measured(float(value) / cell.select.get("divide", 1), None, 1, 1, frozenset(keys))
    return None
