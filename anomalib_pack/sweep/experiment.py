"""What happens in the process of a job: build, fit, test."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import connection, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import torch
from anomalib.engine import Engine
from anomalib.models import AnomalibModule

from anomalib_pack.callbacks import SeedEverything, WriteRecords
from anomalib_pack.efficiency.environment import library_versions
from anomalib_pack.post_processing import RankPreservingPostProcessor
from anomalib_pack.progress import ProgressLines
from anomalib_pack.resuming import KeepTraining
from anomalib_pack.sweep.components import build_component, build_trainer_arguments
from anomalib_pack.sweep.keeping import LOGS, keep, kept_of
from anomalib_pack.sweep.metrics import evaluator_of
from anomalib_pack.sweep.settings import Experiment, model_of_test
from anomalib_pack.sweep.throughput import Throughput

STDOUT, STDERR = 1, 2


def run_or_error(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Run an experiment and say where; if it fails, return the `error` in one line, with its traceback in the log.

    Args:
        experiment: What to run.
        folder: Of the sweep; takes all output and what is kept.
    """
    end_with_parent()
    log = folder / LOGS / f"{experiment.key}.log"
    with _output_to(log):
        try:
            return _place() | run_experiment(experiment, kept_of(folder, experiment.key))
        except (Exception, SystemExit) as error:  # whatever is wrong with one job, the others run
            with suppress(OSError), log.open("a", encoding="utf-8") as file:  # e.g. on a full disk
                traceback.print_exc(file=file)
            return _place() | {"error": one_line(error)}


def _place() -> dict[str, Any]:
    """Machine, threads and versions of this process."""
    return {"host": socket.gethostname(), "threads": torch.get_num_threads(), **library_versions()}


def one_line(error: BaseException) -> str:
    """Type and message of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run_experiment(experiment: Experiment, kept: Path) -> dict[str, Any]:
    """Build model and data, fit and test.

    Args:
        experiment: What to run.
        kept: Folder of what stays; further tests have folders of their names in it.

    Returns:
        Durations in seconds, throughput in images per second, and every test metric; those of further tests have the
        name of the test and a slash before theirs.
    """
    start = time.perf_counter()
    # First of all, so that the seed controls the initial weights. `anomalib benchmark` seeds after the model is built.
    seeding, throughput = SeedEverything(experiment.seed), Throughput()
    model = build_model(experiment)
    datamodule = build_component("data", experiment.data)
    arguments = build_trainer_arguments(experiment.trainer)
    ours = [seeding, throughput, KeepTraining(save_minutes=0), ProgressLines(), WriteRecords()]
    callbacks = [*ours, *_as_list(arguments.pop("callbacks", None))]
    tests = ["", *experiment.tests] if experiment.measures is None else list(experiment.measures)
    metrics: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        engine = Engine(callbacks, default_root_dir=folder, accelerator=experiment.accelerator, **arguments)
        fit_start = time.perf_counter()
        engine.fit(model, datamodule=datamodule)
        test_start = time.perf_counter()
        if "" in tests:
            (metrics,) = engine.test(model, datamodule=datamodule)
            keep(Path(engine.trainer.default_root_dir), kept, experiment.keep)
        checkpoint = Path(folder, "trained.ckpt")
        if any(tests):
            engine.trainer.save_checkpoint(checkpoint)
        for test in filter(None, tests):
            data = build_component("data", experiment.tests[test].get("data", experiment.data))
            tested = build_model(experiment, test)
            (found,) = engine.test(tested, datamodule=data, ckpt_path=checkpoint)
            keep(Path(engine.trainer.default_root_dir), kept / test.replace("/", "_"), ())
            metrics |= {f"{test}/{name}": value for name, value in found.items()}
        end = time.perf_counter()
    return {
        "job_duration": round(end - start, 2),
        "fit_duration": round(test_start - fit_start, 2),
        "test_duration": round(end - test_start, 2),
        "throughput": round(throughput.images_per_second, 3),
        **metrics,
    }


def build_model(experiment: Experiment, test: str = "") -> AnomalibModule:
    """Build the model as it is trained, or for one of its further tests.

    Where metrics are asked for, it gets an evaluator that has them, and one of Anomalib's own a post-processor that
    keeps the ranking of the scores, as those of the pack have.
    """
    model = build_component("model", model_of_test(experiment, test))
    if test or "pictures" not in experiment.keep:
        model.visualizer = None
    if experiment.measures is not None:
        model.evaluator = evaluator_of(experiment.measures.get(test, []), experiment.map_size)
        if is_stock(model):
            model.post_processor = RankPreservingPostProcessor()
    return model


def is_stock(model: AnomalibModule | type[AnomalibModule]) -> bool:
    """Whether a model is one of Anomalib's own."""
    cls = model if isinstance(model, type) else type(model)
    return cls.__module__.startswith("anomalib.")


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


@cache
def end_with_parent() -> None:
    """End this process when the one that waits for it has been killed, instead of keeping the device."""
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: connection.wait([parent.sentinel]) and os._exit(1), daemon=True).start()


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what the process writes, libraries in C included, to the end of a file."""
    saved = [os.dup(descriptor) for descriptor in (STDOUT, STDERR)]
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), STDOUT)
            os.dup2(file.fileno(), STDERR)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((STDOUT, STDERR), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
