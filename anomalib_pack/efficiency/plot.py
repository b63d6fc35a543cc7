"""Latency against accuracy, as in Figure 1 of the EfficientAD paper."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from anomalib_pack.files import replace_file


def plot_latency(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Draw models as labelled points; a picture without the interactive parts of matplotlib.

    Args:
        rows: Measured models, with `latency_mean_ms` and the metric.
        metric: Key of the accuracy.
        path: Of the picture, a PNG.

    Raises:
        OSError: If it cannot be written; the message names it.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        point = (row["latency_mean_ms"], row[metric])
        axes.scatter(*point, s=60)
        axes.annotate(row["model"], point, xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")  # the models differ by orders of magnitude
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.margins(x=0.25, y=0.15)  # room for the labels
    axes.set(xlabel=f"latency [ms] on {rows[0]['device_name']}", ylabel=metric)
    axes.grid(alpha=0.3, which="both")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    replace_file(path, buffer.getbuffer())
