"""The results as CSV, Markdown and console tables.

A row is a dictionary with `model` and either what ``measurement.measure`` returns or an `error`. Rows with a `format`
are of files, with what ``formats.measure_format`` returns; they have tables of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from textwrap import shorten
from typing import Any

import pandas as pd
from rich.table import Table

from anomalib_pack.files import replace_file

Row = dict[str, Any]

ABOUT_RUN = ("device", "device_name", "threads", "protocol", "warmup", "passes", "runs")
ERROR_WIDTH = 160
FILE_COLUMNS: dict[str, Callable[[Row], Any]] = {
    "Model": itemgetter("model"),
    "Format": itemgetter("format"),
    "MiB": itemgetter("size_mib"),
    "AUROC": lambda row: row.get("image_AUROC"),
    "off": lambda row: _percent(row.get("map_deviation_mean")),
    "most": lambda row: _percent(row.get("map_deviation_max")),
    "ms": itemgetter("latency_mean_ms"),
    "95 %": itemgetter("latency_p95_ms"),
    "img/s": lambda row: 1000 / row["latency_mean_ms"],
    "frame": lambda row: row.get("inspector_mean_ms"),
}
VERSIONS = ("anomalib_pack", "anomalib", "torch", "timm", "faiss", "cuda", "python")


def write_csv(rows: list[Row], path: Path) -> None:
    """Write all columns, one row per model, or per model and format."""
    table = pd.DataFrame(rows).drop(columns="traceback", errors="ignore")
    table = table.convert_dtypes()  # whole numbers stay whole beside the gaps of a failed model
    replace_file(path, table.to_csv(index=False).encode())


def write_markdown(rows: list[Row], path: Path, metric: str) -> None:
    """Write a table like the paper's Table 11, with what it was measured on, and one of the files, if there are any.

    Args:
        rows: One per model.
        path: Of the file.
        metric: Column of the accuracy, which is left out if no row has it.
    """
    files = [row for row in rows if "format" in row]
    rows = _networks(rows)
    measured = [row for row in rows if "error" not in row]
    batches = _batches(rows)
    header = ["Model", "Input", "Precision"]
    header += [metric] if any(metric in row for row in rows) else []
    header += [
        "Latency [ms]",
        "median",
        "95 %",
        "Inspector [ms]",
        *(f"Throughput [img / s], batch {batch}" for batch in batches),
    ]
    header += ["Parameters [x 10^6]", "FLOPs [x 10^9]", "by profiler"]
    header += ["Memory [MiB]", *(f"batch {batch}" for batch in batches), "Bank", "Bank [MiB]"]
    lines = ["# Efficiency", "", *_about(measured), "", _line(header), "|---|" + "---:|" * (len(header) - 1)]
    for row in rows:
        cells = _failed(row, header) if "error" in row else _cells(row, header, batches, metric)
        lines.append(_line(cells))
    if files:
        titles = list(FILE_COLUMNS)
        lines += ["", "## Files", "", _line(titles), "|---|---|" + "---:|" * (len(titles) - 2)]
        lines += [_line(_failed(row, titles) if "error" in row else _file_cells(row)) for row in files]
    replace_file(path, ("\n".join(lines) + "\n").encode())


def console_table(rows: list[Row]) -> Table:
    """Make a table that fits 80 columns; the throughput is that of the last batch size."""
    rows = _networks(rows)
    batch = next(reversed(_batches(rows)), None)
    images = "" if batch is None else f"img/s: batch {batch}; "
    table = Table(title="Efficiency", caption=f"ms: mean latency; {images}M par.: + values in the bank")
    table.add_column("Model", overflow="fold")
    for title in ("ms", "95 %", "img/s", "M par.", "GFLOPs", "MiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["model"], *(["failed"] if "error" in row else _console_cells(row, batch)))
    return table


def format_table(rows: list[Row]) -> Table:
    """Make the console table of the files."""
    caption = "off: from torch's maps, mean and most, in per cent of their range; frame: the inspector's ms"
    table = Table(title="Files", caption=caption)
    for title in FILE_COLUMNS:
        table.add_column(title, overflow="fold", justify="left" if title in ("Model", "Format") else "right")
    for row in rows:
        if "format" in row:
            failed = [row["model"], row["format"], "failed"]
            table.add_row(*(failed if "error" in row else _file_cells(row)))
    return table


def full_name(row: Row) -> str:
    """The model's name, and the format's."""
    return f"{row['model']}, {row['format']}" if "format" in row else row["model"]


def _networks(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "format" not in row]


def _file_cells(row: Row) -> list[str]:
    return [row["model"], row["format"], *(_number(value(row)) for value in list(FILE_COLUMNS.values())[2:])]


def _console_cells(row: Row, batch: int | None) -> list[str]:
    return [
        _number(row["latency_mean_ms"]),
        _number(row["latency_p95_ms"]),
        _number(row.get(f"throughput_{batch}")),
        _parameters(row),
        _number(row["flops"] / 1e9),
        _number(row["peak_memory_mib"]),
    ]


def short_error(row: Row) -> str:
    """The beginning of an error; some of PyTorch's fill a page."""
    return shorten(row["error"], ERROR_WIDTH, placeholder=" ...")


def _cells(row: Row, header: list[str], batches: list[int], metric: str) -> list[str]:
    accuracy = [_number(row.get(metric))] if metric in header else []
    return [
        row["model"],
        row["image_size"],
        row["precision"],
        *accuracy,
        _with_deviation(row["latency_mean_ms"], row["latency_std_ms"]),
        *(_number(row[key]) for key in ("latency_median_ms", "latency_p95_ms")),
        _number(row.get("inspector_mean_ms")),
        *(_with_deviation(row[f"throughput_{batch}"], row[f"throughput_std_{batch}"]) for batch in batches),
        _parameters(row),
        _number(row["flops"] / 1e9),
        _number(row["flops_profiler"] / 1e9),
        _number(row["peak_memory_mib"]),
        *(_number(row[f"peak_memory_mib_{batch}"]) for batch in batches),
        row["bank"],
        _number(row["bank_mib"]) if row["bank"] else "",
    ]


def _failed(row: Row, header: list[str]) -> list[str]:
    return [full_name(row), f"failed: {short_error(row)}".replace("|", "\\|"), *[""] * (len(header) - 2)]


def _about(measured: list[Row]) -> list[str]:
    if not measured:
        return ["No model could be measured."]
    row = measured[0]
    values = [f"{key.replace('_', ' ')}: {row[key]}" for key in ABOUT_RUN]
    versions = [f"{key} {row[key]}" for key in VERSIONS if row[key]]
    return [", ".join(values) + ".", "", "Versions: " + ", ".join(versions) + "."]


def _batches(rows: list[Row]) -> list[int]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [int(match[1]) for key in keys if (match := re.fullmatch(r"throughput_(\d+)", key))]


def _parameters(row: Row) -> str:
    # As the paper's "83 + 3" for PatchCore: network, and values in the bank.
    bank = f" + {_number(row['bank_values'] / 1e6)}" if row["bank"] else ""
    return _number(row["parameters"] / 1e6) + bank


def _with_deviation(mean: float, std: float | None) -> str:
    # As the paper's "2.2 (± 0.01)".
    return _number(mean) if std is None else f"{_number(mean)} (± {_number(std)})"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _number(value: float | None) -> str:
    """Three significant digits, or all before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
