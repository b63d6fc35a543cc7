"""What a table may say: which trainings it reads, what each cell is, and the published numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from anomalib_pack.checks import check_keys, require
from anomalib_pack.sweep.metrics import check_metric
from anomalib_pack.sweep.papers.files import RUN_KEYS, RUNS, Config, load, runs_of
from anomalib_pack.sweep.settings import Experiment, read_experiments

MAP_SIZES = ("input", "original")
KEYS = ["title", RUNS, *RUN_KEYS, "efficiency", "select", "rows", "columns", "published"]
SELECTORS = ["model", "data", "category", "group", "test", "metric", "measure", "divide"]
NOTHING = "-"  # where the paper has no number; nothing is measured there
_PUBLISHED = re.compile(r"(-?\d+(?:\.\d+)?)(?:\s*±\s*(\d+(?:\.\d+)?))?")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Number:
    """A published number, in the unit of its table.

    Attributes:
        mean: The number.
        deviation: Behind the ±, if there is one.
    """

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        select: What it is: values of the selectors.
        experiments: The runs that it is the mean of; none if it is measured by `anomalib efficiency`.
        published: What the paper has there.
    """

    select: Config
    experiments: list[Experiment]
    published: Number | None

    @property
    def test(self) -> str:
        """Name of the test; empty for that on the data of the training."""
        return self.select.get("test", "")

    def metric_of(self, experiment: Experiment) -> str:
        """Name of the metric for a run, without test and group."""
        metric = self.select["metric"]
        return experiment.instead.get(metric, metric)

    def column_of(self, experiment: Experiment) -> str:
        """Column of the results that holds its value for a run."""
        group = self.select.get("group")
        if group is None and "category" in self.select and not experiment.row:
            group = self.select["category"]  # one run has all categories
        if group is None:
            group = experiment.tests.get(self.test, {}).get("group", experiment.group)
        return f"{f'{self.test}/' if self.test else ''}{self.metric_of(experiment)}{f'_{group}' if group else ''}"


@dataclass(frozen=True)
class PaperTable:
    """A table or a plotted figure of a paper.

    Attributes:
        path: Its file.
        title: What it shows.
        rows: Names.
        columns: Names.
        cells: By names of row and column.
        efficiency: Configuration of `anomalib efficiency`, if a cell needs it.
    """

    path: Path
    title: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Cell]
    efficiency: Config | None

    @property
    def name(self) -> str:
        """Paper and table, e.g. ``ulsad/table_22``."""
        return f"{self.path.parent.name}/{self.path.stem}"


def read_tables(paths: list[Path], accelerator: str) -> list[PaperTable]:
    """Read tables and the trainings that they name. Classes and their arguments are not looked at.

    Args:
        paths: Of the tables.
        accelerator: What the trainings run on.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If anything is unknown, missing or of a wrong type; the message names file and key.
    """
    trainings: dict[Path, list[Experiment]] = {}  # of the files that several tables name

    def experiments_of(path: Path) -> list[Experiment]:
        if path not in trainings:
            trainings[path] = _naming(path, lambda: _experiments(load(path), accelerator))
        return trainings[path]

    def table(path: Path) -> PaperTable:
        config = load(path)
        own = {key: config[key] for key in RUN_KEYS if key in config}
        named = [each for runs in runs_of(path, config) for each in experiments_of(runs)]
        return _naming(path, lambda: _table(path, config, named + (_experiments(own, accelerator) if own else [])))

    return [table(path) for path in paths]


def _naming(path: Path, read: Callable[[], Result]) -> Result:
    """The result of reading a file, or an error that names it."""
    try:
        return read()
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error


def _table(path: Path, config: Config, experiments: list[Experiment]) -> PaperTable:
    check_keys(config, KEYS, "the table")
    for key in ("title", "rows", "columns"):
        if not config.get(key):
            msg = f"a table needs {key}."
            raise ValueError(msg)
    common = _line(config.get("select", {}), "select")
    rows, columns = (_lines(config[key], key) for key in ("rows", "columns"))
    published = _published(config.get("published") or {}, list(rows), list(columns))
    efficiency = config.get("efficiency")
    measured = {_name(entry) for entry in (efficiency or {}).get("models", [])}
    cells = {}
    for row, column in product(rows, columns):
        select = {**common, **rows[row], **columns[column]}
        given = published.get((row, column))
        try:
            cells[row, column] = Cell({}, [], None) if given == NOTHING else _cell(select, experiments, measured, given)
        except ValueError as error:
            msg = f"the cell {row}, {column} {error}"
            raise ValueError(msg) from error
    return PaperTable(path, config["title"], list(rows), list(columns), cells, efficiency)


def _experiments(runs: Config, accelerator: str) -> list[Experiment]:
    check_keys(runs, RUN_KEYS, RUNS)
    found = read_experiments(runs, [accelerator])
    for experiment in found:
        if "evaluator" in experiment.model["init_args"]:
            msg = f"model {experiment.model_name} must have no evaluator: the metrics are those that tables ask for."
            raise ValueError(msg)
        for name, metric in experiment.instead.items():
            check_metric(metric, f"instead.{name} of data {experiment.dataset}")
    map_size = runs.get("map_size", MAP_SIZES[0])
    require("map_size", map_size, map_size in MAP_SIZES, f"one of {', '.join(MAP_SIZES)}")
    return [replace(experiment, measures={}, map_size=map_size) for experiment in found]


def _lines(given: Any, key: str) -> dict[str, Config]:
    """Rows or columns by name. A selector with a list stands for a line for each of its values."""
    if not isinstance(given, list):
        msg = f"{key} must be a list of mappings, got {given!r}."
        raise ValueError(msg)  # noqa: TRY004  # of a configuration, not of a call
    found: dict[str, Config] = {}
    for position, entry in enumerate(given):
        where = f"{key}[{position}]"
        line = dict(entry) if isinstance(entry, dict) else entry
        name = line.pop("name", None) if isinstance(line, dict) else None
        line = _line(line, where)
        several = {selector: values for selector, values in line.items() if isinstance(values, list)}
        if not several and name is None:
            several = {selector: [value] for selector, value in line.items()}
        for values in product(*several.values()):
            label = name if not several else ", ".join(([name] if name else []) + [str(value) for value in values])
            if label in found or not label:
                msg = f"{where} must have a name of its own, got {label!r}."
                raise ValueError(msg)
            found[label] = {**line, **dict(zip(several, values, strict=True))}
    return found


def _line(line: Any, where: str) -> Config:
    if not isinstance(line, dict):
        msg = f"{where} must be a mapping, got {line!r}."
        raise ValueError(msg)  # noqa: TRY004  # likewise
    check_keys(line, ["name", *SELECTORS], where)
    metrics = line.get("metric", [])
    for metric in metrics if isinstance(metrics, list) else [metrics]:
        check_metric(metric, f"{where}.metric")
    return line


def _published(given: Any, rows: list[str], columns: list[str]) -> dict[tuple[str, str], Number | str]:
    """Numbers by place, and ``NOTHING`` where the paper has none. What it has, but cannot be read, is not there."""
    if not isinstance(given, dict):
        msg = f"published must be a mapping of rows to lists, got {given!r}."
        raise ValueError(msg)  # noqa: TRY004  # likewise
    given = {str(row): values for row, values in given.items()}
    check_keys(given, rows, "published")
    found: dict[tuple[str, str], Number | str] = {}
    for row, values in given.items():
        if not isinstance(values, list) or len(values) != len(columns):
            msg = f"published.{row} must be a list with a number for each of {', '.join(columns)}, got {values!r}."
            raise ValueError(msg)
        for column, value in zip(columns, values, strict=True):
            if value is not None:
                found[row, column] = value if value == NOTHING else _number(value, f"published.{row}")
    return found


def _number(value: Any, where: str) -> Number:
    match = _PUBLISHED.fullmatch(str(value))
    if not match:
        msg = f"{where} must hold numbers, '83.1 ± 0.4', '{NOTHING}' or null, got {value!r}."
        raise ValueError(msg)
    return Number(float(match[1]), None if match[2] is None else float(match[2]))


def _cell(select: Config, experiments: list[Experiment], measured: set[str], published: Number | None) -> Cell:
    if ("metric" in select) == ("measure" in select):
        msg = "needs a metric, or a measure of `anomalib efficiency`."
        raise ValueError(msg)
    if "measure" in select:
        if select.get("model") not in measured:
            msg = f"must be of a model of the section efficiency, {', '.join(sorted(measured))}, got {select}."
            raise ValueError(msg)
        return Cell(select, [], published)
    _check_known(select, experiments)
    chosen = [experiment for experiment in experiments if _fits(experiment, select)]
    if published and not chosen:
        msg = f"has a published number, but {select} selects no run."
        raise ValueError(msg)
    models = dict.fromkeys(experiment.model_name for experiment in chosen)
    if len(models) > 1:
        msg = f"must be of one model, got {', '.join(models)}."
        raise ValueError(msg)
    return Cell(select, chosen, published)


def _check_known(select: Config, experiments: list[Experiment]) -> None:
    grouped = any(not experiment.row for experiment in experiments)  # whose categories are groups of one run
    known = {
        "model": {experiment.model_name for experiment in experiments},
        "data": {experiment.dataset for experiment in experiments},
        "test": {test for experiment in experiments for test in experiment.tests} | {""},
        "category": {experiment.row for experiment in experiments} | ({select.get("category")} if grouped else set()),
    }
    for selector, values in known.items():
        if selector in select and select[selector] not in values:
            msg = f"must have as {selector} one of {', '.join(sorted(values))}, got {select[selector]!r}."
            raise ValueError(msg)


def _fits(experiment: Experiment, select: Config) -> bool:
    names = {"model": experiment.model_name, "data": experiment.dataset}
    if experiment.row:  # otherwise one run has all categories
        names["category"] = experiment.row
    same = all(select.get(selector, name) == name for selector, name in names.items())
    return same and select.get("test", "") in ("", *experiment.tests)


def _name(entry: Config) -> str:
    return entry.get("name") or str(entry.get("class_path", "")).rsplit(".", 1)[-1]
