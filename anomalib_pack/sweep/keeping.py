"""What stays of a run: always its tables, and pictures and checkpoints where they are asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from anomalib_pack.checks import require
from anomalib_pack.files import replace_file

LOGS, PREDICTIONS = "logs", "predictions"  # folders of a sweep
SCORES = "test_predictions.csv"
TABLES = (SCORES, "test_defects.csv", "test_metrics.json")
KINDS = {"pictures": "images", "checkpoints": "weights"}  # and the folder of a run that holds them


def read_kinds(given: str | None) -> tuple[str, ...]:
    """Kinds out of a list with commas.

    Raises:
        ValueError: If there is none of a name.
    """
    names = tuple(given.split(",")) if given else ()
    require("keep", given, set(names) <= set(KINDS), f"{', '.join(KINDS)}, or both with a comma between them")
    return names


def kept_of(folder: Path, key: str) -> Path:
    """What is kept of a job in the folder of its sweep."""
    return folder / PREDICTIONS / key


def keep(run: Path, target: Path, kinds: Iterable[str]) -> None:
    """Copy what stays out of the folder of a run, in place of what an earlier one has left."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in TABLES:
        if (run / name).exists():
            shutil.copyfile(run / name, target / name)
    for kind in kinds:
        if (run / KINDS[kind]).exists():  # some models have no maps to draw, or no checkpoint
            shutil.copytree(run / KINDS[kind], target / KINDS[kind])


def place(files: Mapping[str, bytes], folder: Path, key: str) -> None:
    """Write what a job has written elsewhere into the folder of the sweep.

    Args:
        files: By their paths in that folder.
        folder: Of the sweep.
        key: Of the job; what an earlier run of it has left goes if there is something new.

    Raises:
        OSError: If a file cannot be written; the message names it.
    """
    if any(Path(name).is_relative_to(Path(PREDICTIONS, key)) for name in files):
        shutil.rmtree(kept_of(folder, key), ignore_errors=True)
    for name, content in files.items():
        replace_file(folder / name, content)
