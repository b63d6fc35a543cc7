"""Which runs the tables need, what of them there is, and what is left to do.

A run is known by its model, data, trainer and seed. It measures what all tables of its paper ask for, so whichever
table comes first, the others find their numbers.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from anomalib_pack.efficiency.environment import library_versions
from anomalib_pack.sweep.job import RESULTS
from anomalib_pack.sweep.papers.cells import Results
from anomalib_pack.sweep.papers.settings import PaperTable
from anomalib_pack.sweep.results import read_rows
from anomalib_pack.sweep.settings import Experiment

VERSIONS = ("anomalib_pack", "anomalib", "torch")

Asked = dict[str, dict[str, list[str]]]  # metrics by test, by key of the run


def read_results(store: Path) -> Results:
    """All rows of a store, by key of the run."""
    return {row["job"]: row for row in read_rows(store / RESULTS)}


def asked_of_runs(tables: list[PaperTable]) -> Asked:
    """What tables need of each run."""
    asked: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for table in tables:
        for cell in table.cells.values():
            for experiment in cell.experiments:
                asked[experiment.key][cell.test].add(cell.metric_of(experiment))
    return {key: {test: sorted(metrics) for test, metrics in sorted(tests.items())} for key, tests in asked.items()}


def runs_of(tables: list[PaperTable], asked: Asked) -> list[Experiment]:
    """The runs that tables read, each once: all of a seed before those of the next."""
    runs: dict[str, Experiment] = {}
    for table in tables:
        for cell in table.cells.values():
            for experiment in cell.experiments:
                known = runs.get(experiment.key, experiment)  # the same training may be known with fewer tests
                runs[experiment.key] = replace(known, tests={**known.tests, **experiment.tests})
    complete = [replace(run, measures=asked[key]) for key, run in runs.items()]
    return sorted(complete, key=lambda run: run.seed)


def versions_of(keys: frozenset[str], results: Results) -> set[str]:
    """Versions that runs were made with, as text."""
    return {_text({name: results[key].get(name, "") for name in VERSIONS}) for key in keys}


def versions_here() -> str:
    """Versions that a run would be made with now, as text."""
    return _text(library_versions())


def _text(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in VERSIONS)
