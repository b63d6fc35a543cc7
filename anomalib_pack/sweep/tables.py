"""Mean and standard deviation over seeds: a table per data set and metric, as papers print them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean, stdev

from rich import box
from rich.table import Column, Table

from anomalib_pack.sweep.settings import Experiment, Plan

ALL, MEAN = "all", "mean"
INCOMPLETE = " *"
NOTE = "Mean ± standard deviation over seeds, in %. * not of all seeds, or in a mean not of all rows of a seed."
LABEL_WIDTH, COLUMN_WIDTH = 22, 16  # at most, on the console
GAP = 3  # between columns there

Results = dict[str, dict[str, str]]  # rows of results.csv by key of the experiment
Scores = dict[tuple[str, str], dict[int, float]]  # by row and model, by seed


@dataclass(frozen=True)
class MetricTable:
    """Values of a metric on a data set.

    Attributes:
        title: Data set and metric.
        models: Columns.
        rows: Label of each row and its cells, one per model.
    """

    title: str
    models: list[str]
    rows: list[tuple[str, list[str]]]


def metric_tables(plan: Plan, results: Results) -> list[MetricTable]:
    """Make the tables of all data sets and of those metrics that any of their jobs has."""
    by_dataset: dict[str, list[Experiment]] = defaultdict(list)
    for experiment in plan.experiments:
        by_dataset[experiment.dataset].append(experiment)
    return [
        _table(f"{dataset}, {metric.replace('_', ' ')}", experiments, results, metric)
        for dataset, experiments in by_dataset.items()
        for metric in plan.metrics
        if any(results.get(experiment.key, {}).get(metric) for experiment in experiments)
    ]


def markdown(tables: list[MetricTable], failed: dict[str, str]) -> str:
    """The tables, and the errors of the failed jobs by title."""
    lines = ["# Sweep", "", NOTE]
    for table in tables:
        lines += ["", f"## {table.title}", "", _line(["", *table.models]), "|---|" + "---:|" * len(table.models)]
        lines += [_line([label, *cells]) for label, cells in table.rows]
    if failed:
        lines += ["", "## Failed", "", *(f"- {title}: {error}" for title, error in failed.items())]
    return "\n".join(lines) + "\n"


def console_tables(table: MetricTable, width: int) -> list[Table]:
    """Make tables for the console, with as many models beside each other as fit.

    Args:
        table: What to show.
        width: Columns of the console.
    """
    label_width = min(LABEL_WIDTH, max(len(label) for label, _ in table.rows))
    widths = [
        min(COLUMN_WIDTH, max(len(model), *(len(cells[index]) for _, cells in table.rows)))
        for index, model in enumerate(table.models)
    ]
    parts: list[list[int]] = []
    room = 0
    for index, column in enumerate(widths):
        if room < column + GAP:
            parts.append([])
            room = width - label_width - GAP
        parts[-1].append(index)
        room -= column + GAP
    return [_rich_table(table, part, label_width, widths) for part in parts]


def _rich_table(table: MetricTable, part: list[int], label_width: int, widths: list[int]) -> Table:
    columns = [
        Column(table.models[index], width=widths[index], justify="right", vertical="bottom", overflow="fold")
        for index in part
    ]
    label = Column("", width=label_width, overflow="fold")
    title = f"{table.title}, in %"
    # As wide as the title, which would be broken into the width of a single model otherwise.
    shown = Table(label, *columns, title=title, min_width=len(title), box=box.HORIZONTALS, pad_edge=False)
    for position, (name, cells) in enumerate(table.rows, start=1):
        before_mean = position == len(table.rows) - 1 and table.rows[-1][0] == MEAN
        shown.add_row(name, *(cells[index] for index in part), end_section=before_mean)
    return shown


def _table(title: str, experiments: list[Experiment], results: Results, metric: str) -> MetricTable:
    groups = _groups(experiments, results, metric)
    scores: Scores = defaultdict(dict)
    failed = set()
    for experiment in experiments:
        found = results.get(experiment.key, {})
        for row in groups or [experiment.row or ALL]:
            value = found.get(f"{metric}_{row}" if groups else metric)
            if value:
                scores[row, experiment.model_name][experiment.seed] = float(value)
            elif found.get("error"):
                failed.add((row, experiment.model_name))
    models = list(dict.fromkeys(experiment.model_name for experiment in experiments))
    rows = groups or list(dict.fromkeys(experiment.row or ALL for experiment in experiments))
    seeds = {experiment.seed for experiment in experiments}

    def cell(row: str, model: str) -> str:
        return _cell(scores[row, model], len(seeds)) or ("failed" if (row, model) in failed else "")

    lines = [(row.replace("_", " "), [cell(row, model) for model in models]) for row in rows]
    if len(rows) > 1:
        lines.append((MEAN, [_cell(_mean_row(scores, rows, model), len(seeds)) for model in models]))
    return MetricTable(title, models, lines)


def _groups(experiments: list[Experiment], results: Results, metric: str) -> list[str]:
    """Groups that every successful job reports the metric for, if the data set has one job per model and seed."""
    if any(experiment.row for experiment in experiments):
        return []
    done = [results[each.key] for each in experiments if results.get(each.key, {}).get(metric)]
    columns = [column for column in done[0] if column.startswith(f"{metric}_") and all(row[column] for row in done)]
    groups = [column.removeprefix(f"{metric}_") for column in columns]
    return [group for group in groups if group != MEAN]


def _mean_row(scores: Scores, rows: list[str], model: str) -> dict[int, float]:
    """Mean over the rows for each seed that has them all: means over different rows cannot be compared."""
    each_row = [scores[row, model] for row in rows]
    complete = set.intersection(*(set(values) for values in each_row))
    return {seed: fmean(values[seed] for values in each_row) for seed in sorted(complete)}


def _cell(values: dict[int, float], seeds: int) -> str:
    if not values:
        return ""
    percent = [100 * value for value in values.values()]
    spread = f" ± {stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{fmean(percent):.1f}{spread}{INCOMPLETE if len(percent) < seeds else ''}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
