"""The metrics of all runs as one table: a block for each group, in it a line for each run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from anomalib_pack.report.runs import METRIC_PREFIXES, Run

ALL, MEAN = "all images", "mean"  # the second as GroupEvaluator calls it: the mean over groups


@dataclass(frozen=True)
class Line:
    """A run in a block: its cells, each the value and whether it is the best of those on the same images."""

    run: str
    cells: list[tuple[float | None, bool]]


@dataclass(frozen=True)
class Block:
    """A group, or all images, and the runs that have metrics of it."""

    group: str
    lines: list[Line]


def metric_table(runs: Sequence[Run]) -> tuple[list[str], list[Block]]:
    """Names of the metrics, which are the columns, and the blocks: all images first, the mean over groups last."""
    values: dict[str, dict[str, dict[str, float]]] = {}  # by group, run and metric
    for run in runs:
        for name, value in run.metrics.items():
            metric, group = split(name, run.groups)
            values.setdefault(group, {}).setdefault(run.name, {})[metric] = value
    metrics = list(dict.fromkeys(name for group in values.values() for row in group.values() for name in row))
    order = sorted(values, key=lambda group: (group != ALL, group == MEAN, group))
    data = {run.name: frozenset(image.path for image in run.images) for run in runs}
    return metrics, [Block(group, list(_lines(values[group], metrics, data))) for group in order]


def split(name: str, groups: Iterable[str]) -> tuple[str, str]:
    """Metric and group of a name as ``GroupEvaluator`` has them.

    Example:
        >>> split("image_AUROC_logical_anomalies", ["good", "logical_anomalies"])
        ('image_AUROC', 'logical_anomalies')
        >>> split("image_AUROC", ["AUROC"])
        ('image_AUROC', 'all images')
    """
    for group in sorted({*groups, MEAN}, key=len, reverse=True):
        metric = name.removesuffix(f"_{group}")
        if metric not in (name, "image", "pixel"):
            return metric, group
    return name, ALL


def _lines(
    by_run: dict[str, dict[str, float]], metrics: Sequence[str], data: dict[str, frozenset[str]]
) -> Iterable[Line]:
    for run, row in by_run.items():
        others = [by_run[other] for other in by_run if other != run and data[other] == data[run]]
        yield Line(run, [(row.get(name), _is_best(name, row, others)) for name in metrics])


def _is_best(name: str, row: dict[str, float], others: Sequence[dict[str, float]]) -> bool:
    found = [other[name] for other in others if name in other]
    return bool(found) and name in row and name.startswith(METRIC_PREFIXES) and row[name] >= max(found)
