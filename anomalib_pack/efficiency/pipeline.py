"""The subcommand `anomalib efficiency`."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from anomalib.pipelines.components.base import Pipeline, Runner
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from rich.console import Console

from anomalib_pack.efficiency.accuracy import read_accuracy
from anomalib_pack.efficiency.measurement import measure_or_error
from anomalib_pack.efficiency.plot import plot_latency
from anomalib_pack.efficiency.report import console_table, short_error, write_csv, write_markdown
from anomalib_pack.efficiency.settings import Entry, Settings, check_device, entries
from anomalib_pack.process import in_own_process


class Efficiency(Pipeline):
    """Measure latency, throughput, parameters, FLOPs and memory of models.

    Each model is measured in a process of its own, and the results are written after each, into
    ``runs/efficiency/<time>/``. A model that fails costs its own row only.
    """

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """Return a parser for a configuration file whose values options can override."""
        if parser is None:
            parser = ArgumentParser()
            parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path of a YAML file with the options.")
            parser.add_class_arguments(Settings)
        return parser

    def run(self, args: Namespace | None = None) -> None:
        """Measure all models and report.

        Args:
            args: What :meth:`get_parser` parsed; by default from the command line.

        Raises:
            SystemExit: With status 2 if the settings are impossible, before anything is measured, and with status 1
                after the report if a model failed that may not.
        """
        parser = self.get_parser()
        args = parser.parse_args() if args is None else args
        settings = Settings(**{field.name: args[field.name] for field in fields(Settings)})
        try:
            check_device(settings.device)
            models = entries(settings)
            accuracy = read_accuracy(settings.results, settings.metric) if settings.results else {}
        except ValueError as error:
            parser.error(str(error))

        # A time, as `anomalib benchmark` names its folders.
        folder = Path("runs", "efficiency", f"{datetime.now():%Y-%m-%d-%H_%M_%S}")
        folder.mkdir(parents=True)
        rows = _measure_all(models, settings, accuracy, folder)
        _conclude(rows, settings.metric, folder)
        if any("error" in row and not entry.may_fail for entry, row in zip(models, rows, strict=True)):
            raise SystemExit(1)

    def _setup_runners(self, args: dict) -> list[Runner]:
        """Return none: Anomalib's runners write nothing before the last model, and lose the models that failed."""
        del args
        return []


def _measure_all(models: list[Entry], settings: Settings, accuracy: dict[str, float], folder: Path) -> list[dict]:
    console = Console()
    rows: list[dict[str, Any]] = []
    for position, entry in enumerate(models, start=1):
        console.print(f"[{position}/{len(models)}] {entry.name}", markup=False)
        try:
            row = in_own_process(measure_or_error, entry, settings)
        except RuntimeError as error:
            row = {"error": str(error), "traceback": ""}
        if entry.name in accuracy:
            row[settings.metric] = accuracy[entry.name]
        rows.append({"model": entry.name, **row})
        try:
            write_csv(rows, folder / "results.csv")
            write_markdown(rows, folder / "results.md", settings.metric)
        except OSError as error:  # e.g. a full disk; the table is printed at the end
            console.print(error.strerror, markup=False, soft_wrap=True)
    return rows


def _conclude(rows: list[dict[str, Any]], metric: str, folder: Path) -> None:
    console = Console()
    console.print(console_table(rows))
    failed = [row for row in rows if "error" in row]
    for row in failed:
        console.print(f"{row['model']} failed: {short_error(row)}", markup=False, soft_wrap=True)
    if failed:
        tracebacks = [f"{row['model']}\n{row['traceback'] or row['error']}\n" for row in failed]
        (folder / "errors.log").write_text("\n".join(tracebacks), encoding="utf-8")
    placed = [row for row in rows if metric in row and "error" not in row]
    if placed:
        plot_latency(placed, metric, folder / "latency_accuracy.png")
    console.print(f"Results: {folder}", soft_wrap=True)
