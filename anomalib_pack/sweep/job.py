"""The jobs that Anomalib's runners run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anomalib.pipelines.components.base import Job, JobGenerator
from anomalib.pipelines.types import PREV_STAGE_RESULT
from anomalib.utils.config import flatten_dict
from tqdm import tqdm

from anomalib_pack.process import in_own_process
from anomalib_pack.sweep.experiment import end_with_parent, one_line, run_or_error
from anomalib_pack.sweep.keeping import LOGS, place
from anomalib_pack.sweep.results import write_row
from anomalib_pack.sweep.settings import Experiment

RESULTS = "results.csv"
VISIBLE = "CUDA_VISIBLE_DEVICES"


class SweepJob(Job):
    """One experiment, in a process of its own: its memory is free afterwards, and its crash touches nothing else.

    Args:
        experiment: What to run.
        folder: Results of the sweep.
        place: For messages, e.g. ``"3/40"``.
    """

    name = "sweep"

    def __init__(self, experiment: Experiment, folder: Path, place: str) -> None:
        super().__init__()
        self.experiment = experiment
        self.folder = folder
        self.place = place

    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Run the experiment and write its row.

        Args:
            task_id: Index of the GPU; given by the parallel runner alone.

        Returns:
            The row; with an `error` if the experiment failed.
        """
        tqdm.write(f"[{self.place}] {self.experiment.title}")  # beside the runner's bar
        start = time.perf_counter()
        end_with_parent()
        try:
            with one_gpu(task_id):
                results = in_own_process(run_or_error, self.experiment, self.folder)
        except Exception as error:  # the process was killed, or its result cannot be passed on
            results = {"error": one_line(error)}
        row = self.record(results)
        outcome = "failed" if row["error"] else "done"
        tqdm.write(f"[{self.place}] {outcome} after {time.perf_counter() - start:.0f} s")
        return row

    def record(self, results: dict[str, Any], written: dict[str, bytes] | None = None) -> dict[str, Any]:
        """Write what a job that ran somewhere has returned.

        Args:
            results: What is measured, or the `error`.
            written: Its files by their paths in the folder of the sweep; None if the job has put them there itself.

        Returns:
            The row.
        """
        row = self._description() | results
        try:
            if written is not None:
                place(written, self.folder, self.experiment.key)
            write_row(row, self.folder / RESULTS)
        except OSError as error:  # e.g. a full disk; without its row the job runs again when the sweep is resumed
            row["error"] = one_line(error)
            again = f"anomalib sweep --config {self.folder / 'config.yaml'} --resume {self.folder}"
            again = again if self.experiment.measures is None else "the same command"
            tqdm.write(f"[{self.place}] {error.strerror} Resume with {again}. What is not in it: {results}")
        return row

    @property
    def log(self) -> str:
        """Path of its log in the folder of the sweep."""
        return f"{LOGS}/{self.experiment.key}.log"

    def _description(self) -> dict[str, Any]:
        experiment = self.experiment
        names = {"model": experiment.model_name, "dataset": experiment.dataset, "row": experiment.row}
        asked = {} if experiment.measures is None else {"measured": json.dumps(experiment.asked, sort_keys=True)}
        return {
            "job": experiment.key,
            **names,
            "error": "",
            **flatten_dict(experiment.config),
            **asked,
        }

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows as they are."""
        return results

    @staticmethod
    def save(results: list[dict[str, Any]]) -> None:
        """Do nothing: each job has written its row."""


class SweepJobGenerator(JobGenerator):
    """Makes the jobs of a runner; nothing is built before a job runs.

    Args:
        accelerator: ``"cpu"`` or ``"cuda"``; None takes the jobs of both.
    """

    def __init__(self, accelerator: str | None = None) -> None:
        self.accelerator = accelerator

    @property
    def job_class(self) -> type:
        """The class of the jobs."""
        return SweepJob

    def generate_jobs(self, args: dict[str, Any], _prev_stage_result: PREV_STAGE_RESULT = None) -> list[SweepJob]:
        """List the jobs.

        Args:
            args: `experiments` and `folder`.

        Returns:
            A list, so that the runner's bar knows how many there are.
        """
        experiments = [each for each in args["experiments"] if self.accelerator in (None, each.accelerator)]
        return [
            SweepJob(experiment, args["folder"], f"{position}/{len(experiments)}")
            for position, experiment in enumerate(experiments, start=1)
        ]


@contextmanager
def one_gpu(index: int | None) -> Iterator[None]:
    """Hide all GPUs but one from processes that start meanwhile; with None hide nothing.

    Choosing it by the Trainer's `devices` is not enough: models may have a say in that (Patchcore takes the first).
    """
    if index is None:
        yield
        return
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = before.split(",")[index] if before else str(index)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before
