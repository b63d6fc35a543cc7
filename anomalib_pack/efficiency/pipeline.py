"""The subcommand `anomalib efficiency`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.pipelines.components.base import Pipeline, Runner
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from rich.console import Console

from anomalib_pack.efficiency.accuracy import read_accuracy
from anomalib_pack.efficiency.formats import measure_format
from anomalib_pack.efficiency.measurement import apart, measure
from anomalib_pack.efficiency.plot import plot_latency
from anomalib_pack.efficiency.report import (
    console_table,
    format_table,
    full_name,
    short_error,
    write_csv,
    write_markdown,
)
from anomalib_pack.efficiency.settings import Entry, Settings, check_device, entries
from anomalib_pack.files import dated_folder, replace_file


class Efficiency(Pipeline):
    """Measure latency, throughput, parameters, FLOPs and memory of models.

    Each model is measured in a process of its own, and the results are written after each, into
    ``runs/efficiency/<time>/``. A model that fails costs its own row only.
    """

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """Return a parser for a configuration file whose values options can override."""
        if parser is None:
            parser = ArgumentParser(prog="anomalib efficiency")
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
            folder = dated_folder(Path("runs", "efficiency"))
        except (OSError, ValueError) as error:  # e.g. a full disk
            parser.error(str(error))
        rows = _measure_all(models, settings, accuracy, folder)
        _conclude(rows, settings.metric, folder)
        may_fail = {entry.name for entry in models if entry.may_fail}
        if any("error" in row and row["model"] not in may_fail for row in rows):
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
        for row in _rows_of(entry, settings):
            if entry.name in accuracy and "format" not in row:
                row[settings.metric] = accuracy[entry.name]
            rows.append({"model": entry.name, **row})
            with _unwritten_is_said():  # the table is printed at the end
                write_csv(rows, folder / "results.csv")
                write_markdown(rows, folder / "results.md", settings.metric)
    return rows


def _rows_of(entry: Entry, settings: Settings) -> Iterator[dict[str, Any]]:
    """The network's row, then one for each format."""
    yield apart(measure, entry, settings)
    if not settings.formats:
        return
    with TemporaryDirectory() as folder:
        for kind in dict.fromkeys(["torch", *settings.formats]):
            yield {"format": kind} | apart(measure_format, entry, settings, kind, Path(folder))


def _conclude(rows: list[dict[str, Any]], metric: str, folder: Path) -> None:
    console = Console()
    console.print(console_table(rows))
    if any("format" in row for row in rows):
        console.print(format_table(rows))
    failed = [row for row in rows if "error" in row]
    for row in failed:
        console.print(f"{full_name(row)} failed: {short_error(row)}", markup=False, soft_wrap=True)
    if failed:
        text = "\n".join(f"{full_name(row)}\n{row['traceback'] or row['error']}\n" for row in failed)
        with _unwritten_is_said(instead=text):
            replace_file(folder / "errors.log", text.encode())
    placed = [row for row in rows if metric in row and not {"error", "format"} & row.keys()]
    if placed:
        with _unwritten_is_said():
            plot_latency(placed, metric, folder / "latency_accuracy.png")
    console.print(f"Results: {folder}", soft_wrap=True)


@contextmanager
def _unwritten_is_said(instead: str = "") -> Iterator[None]:
    """Print what cannot be written, e.g. on a full disk, and go on: what was measured is worth more."""
    try:
        yield
    except OSError as error:
        Console().print(f"{error.strerror}\n{instead}".rstrip(), markup=False, soft_wrap=True)
