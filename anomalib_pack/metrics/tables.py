"""Tables of metrics: a row per group or category, for the console and as CSV."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from lightning.pytorch.utilities import rank_zero_warn
from rich import box
from rich.table import Column, Table

from anomalib_pack.files import replace_file

# The metrics whose mean is mAD: MiniMaxAD: A Lightweight Autoencoder for Feature-Rich Anomaly Detection, Sec. 4.1.
MAD_METRICS = (
    *("image_AUROC", "image_AP", "image_F1Max"),
    *("pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO"),
)


def with_mad(row: dict[str, float]) -> dict[str, float]:
    """The row and ``mAD``, the unweighted mean of ``MAD_METRICS``; without it if one of them is missing."""
    if not row.keys() >= set(MAD_METRICS):
        return row
    return row | {"mAD": fmean(row[name] for name in MAD_METRICS)}


def mean_row(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Unweighted mean of each metric over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: fmean(row[name] for row in rows if name in row) for name in names}


def metric_names(rows: dict[str, dict[str, float]]) -> list[str]:
    """Names of the metrics of all rows, in the order of the first."""
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def rich_table(rows: dict[str, dict[str, float]]) -> Table:
    """Table for the console, as papers have it: groups down, metrics across, the mean last, in percent.

    It has no overall row, which papers do not have either; Lightning prints those values.
    """
    names = metric_names(rows)
    # Short lines of headers and one space between columns, so that eleven values and the words of MVTec LOCO's groups
    # and MVTec AD's categories fit in 80 columns. Longer groups wrap.
    headers = [Column(_header(name), justify="right", vertical="bottom", no_wrap=True) for name in names]
    table = Table(
        Column("group", vertical="bottom"),
        *headers,
        title="Test metrics per group, in %",
        box=box.HORIZONTALS,
        padding=0,
        pad_edge=False,
    )
    groups = [group for group in rows if group]
    for group in groups:
        values = (f"{100 * rows[group][name]:.1f}" if name in rows[group] else "" for name in names)
        table.add_row(group.replace("_", " ").replace("/", " "), *values, end_section=group == groups[-2])
    return table


def _header(name: str) -> str:
    """Name of a metric in lines of at most five letters, if it has places to break: ``pixel``, ``F1``, ``Score``."""
    parts = [part if len(part) <= 5 else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "\n", part) for part in name.split("_")]
    return "\n".join(parts)


def write_csv(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Write the table with the overall row first, as :func:`write_or_warn`; metrics that do not exist are empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["group", *metric_names(rows)])
    writer.writeheader()
    writer.writerows({"group": group or "overall"} | row for group, row in rows.items())
    write_or_warn(path, text.getvalue())


def write_or_warn(path: Path, text: str) -> None:
    """Write a file; if it cannot be, e.g. on a full disk, a warning says so: metrics are printed all the same."""
    try:
        replace_file(path, text.encode())
    except OSError as error:
        rank_zero_warn(error.strerror)
