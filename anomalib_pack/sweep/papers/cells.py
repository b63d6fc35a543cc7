"""The mean of a cell over seeds, and its difference to the published number."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean, stdev

from anomalib_pack.sweep.papers.settings import Cell
from anomalib_pack.sweep.settings import Experiment

PERCENT = 100
LIMIT = 2  # standard errors of a difference

Results = dict[str, dict[str, str]]  # rows of results.csv by key of the experiment


@dataclass(frozen=True)
class Measured:
    """What was measured for a cell.

    Attributes:
        mean: Mean over seeds, in the unit of the table.
        deviation: Sample standard deviation over seeds; None with one.
        seeds: How many seeds have all that the mean is taken over.
        expected: How many there are to be.
        runs: Keys of the runs that it comes from.
    """

    mean: float
    deviation: float | None
    seeds: int
    expected: int
    runs: frozenset[str]


def measured(cell: Cell, results: Results) -> Measured | None:
    """The value of a cell, or None where no seed has all of it.

    For each seed it is the mean over the categories of each data set, then over the data sets.
    """
    seeds: dict[int, list[Experiment]] = defaultdict(list)
    for experiment in cell.experiments:
        seeds[experiment.seed].append(experiment)
    values, used = [], set()
    for experiments in seeds.values():
        value = _of_seed(cell, experiments, results)
        if value is not None:
            values.append(PERCENT * value)
            used |= {experiment.key for experiment in experiments}
    if not values:
        return None
    return Measured(fmean(values), stdev(values) if len(values) > 1 else None, len(values), len(seeds), frozenset(used))


def _of_seed(cell: Cell, experiments: list[Experiment], results: Results) -> float | None:
    by_data: dict[str, list[float]] = defaultdict(list)
    for experiment in experiments:
        row = results.get(experiment.key, {})
        value = row.get(cell.column_of(experiment))
        if row.get("error") or not value or math.isnan(float(value)):
            return None  # means over different categories cannot be compared
        by_data[experiment.dataset].append(float(value))
    return fmean(fmean(values) for values in by_data.values())


def difference(cell: Cell, found: Measured | None) -> float | None:
    """Measured less published."""
    return None if found is None or cell.published is None else found.mean - cell.published.mean


def is_significant(cell: Cell, found: Measured | None) -> bool | None:
    """Whether the difference is more than two of its standard errors; None where a deviation is unknown.

    The paper's number of runs is that of the file's seeds.
    """
    apart = difference(cell, found)
    if apart is None or found.deviation is None or cell.published.deviation is None:
        return None
    error = math.sqrt(cell.published.deviation**2 / found.expected + found.deviation**2 / found.seeds)
    return abs(apart) > LIMIT * error
