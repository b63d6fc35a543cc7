"""Which runs the tables need, what of them there is, and what is left to do.

A run is known by its model, data, trainer and seed. It measures what all tables of its paper ask for, so whichever
table comes first, the others find their numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from anomalib_pack.efficiency.environment import library_versions
from anomalib_pack.sweep.papers.cells import Results
from anomalib_pack.sweep.papers.settings import Cell, PaperTable
from anomalib_pack.sweep.settings import Config, Experiment

VERSIONS = ("anomalib_pack", "anomalib", "torch")


def runs_of(wanted: list[PaperTable], tables: list[PaperTable]) -> list[Experiment]:
    """The runs that tables read, each once: all of a seed before those of the next.

    Args:
        wanted: The tables.
        tables: All tables of their papers, which say what a run measures and how it is tested.
    """
    asked: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    tests: dict[str, Config] = defaultdict(dict)  # the same training may be known with others in another file
    for cell, experiment in _read(tables):
        asked[experiment.key][cell.test].add(cell.metric_of(experiment))
        tests[experiment.key].update(experiment.tests)
    runs = {experiment.key: experiment for _, experiment in _read(wanted)}
    complete = [
        replace(run, tests=tests[key], measures={test: sorted(asked[key][test]) for test in sorted(asked[key])})
        for key, run in runs.items()
    ]
    return sorted(complete, key=lambda run: run.seed)


def _read(tables: list[PaperTable]) -> Iterator[tuple[Cell, Experiment]]:
    for table in tables:
        for cell in table.cells.values():
            for experiment in cell.experiments:
                yield cell, experiment


def versions_of(keys: frozenset[str], results: Results) -> set[str]:
    """Versions that runs were made with, as text."""
    return {_text({name: results[key].get(name, "") for name in VERSIONS}) for key in keys}


def versions_here() -> str:
    """Versions that a run would be made with now, as text."""
    return _text(library_versions())


def _text(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in VERSIONS)
