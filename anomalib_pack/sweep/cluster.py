"""Jobs as tasks of Ray, on this machine or on a cluster: ``anomalib sweep --runner ray``.

Ray decides where and when a job runs, and starts it anew when its node dies. This process alone writes results.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from anomalib_pack.on_node import Parcel, run_parcel
from anomalib_pack.sweep.components import build_component
from anomalib_pack.sweep.experiment import one_line, run_or_error
from anomalib_pack.sweep.job import SweepJob, SweepJobGenerator
from anomalib_pack.sweep.settings import Config, Experiment, fingerprint

NAMES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}  # of resources: of a task, of a node

CONNECT_SECONDS = 20


class RayRunner:
    """Runs each job as a task of Ray, once, or again where its node dies (three times at most, as Ray does).

    Args:
        address: Of a cluster, or ``"auto"`` for the one that this machine is part of. None starts Ray on this machine,
            unless the environment variable ``RAY_ADDRESS`` names a cluster.

    Raises:
        ValueError: If Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str | None) -> None:
        try:
            import ray  # noqa: PLC0415  # an extra  # pyrefly: ignore [missing-import]
        except ImportError as error:
            msg = "runner ray needs Ray: pip install 'anomalib-pack[ray]'."
            raise ValueError(msg) from error
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            _check_port(address)  # Ray would try for minutes
            ray.init(address=address)
        except (OSError, RuntimeError, ValueError) as error:  # also a ConnectionError
            msg = f"There is no cluster of Ray at {address}: {' '.join(str(error).split())}"
            raise ValueError(msg) from error
        self.ray = ray

    def __enter__(self) -> RayRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.ray.shutdown()  # also ends the tasks that still run

    @property
    def accelerator(self) -> str:
        """What tables of papers are run on: GPUs where a node has some."""
        return "cuda" if any("GPU" in node["Resources"] for node in self._nodes()) else "cpu"

    def check(self, experiments: list[Experiment]) -> None:
        """Check that there is a node for each job, as Ray would wait for one.

        Raises:
            ValueError: If not; the message says what a model needs and what the nodes have.
        """
        nodes = self._nodes()
        for experiment in experiments:
            needed = {NAMES[name]: amount for name, amount in resources_of(experiment).items()}
            if not any(all(node["Resources"].get(name, 0) >= needed[name] for name in needed) for node in nodes):
                there = "; ".join(
                    f"{node['NodeManagerHostname']} {_amounts(node['Resources'], NAMES.values())}" for node in nodes
                )
                msg = f"model {experiment.model_name} needs {_amounts(needed, needed)}, which no node has: {there}."
                raise ValueError(msg)

    def run_jobs(self, experiments: list[Experiment], folder: Path) -> None:
        """Run experiments and write what they return into a folder."""
        task = self.ray.remote(run_parcel)
        data: dict[str, list[str] | str] = {}
        waiting = {}
        for job in SweepJobGenerator().generate_jobs({"experiments": experiments, "folder": folder}):
            files = prepared(job.experiment, data)
            if isinstance(files, str):
                _record(job, {"error": files}, {job.log: files.encode()})
                continue
            resources = resources_of(job.experiment)
            parcel = Parcel(
                job=pickle.dumps((run_or_error, job.experiment)),
                log=job.log,
                folder=str(Path.cwd()),
                modules=[str(Path(path).resolve()) for path in sys.path],
                files=files,
                threads=int(resources["num_cpus"]),
            )
            waiting[task.options(**resources).remote(parcel)] = job
        tqdm.write(f"{len(waiting)} jobs on {len(self._nodes())} nodes")
        while waiting:
            (done,), _ = self.ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done)
            try:
                results, written = self.ray.get(done)
            except self.ray.exceptions.RayError as error:  # e.g. its nodes died too often
                results, written = {"error": one_line(error)}, {job.log: str(error).encode()}
            _record(job, results, written)

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]


def _check_port(address: str | None) -> None:
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _record(job: SweepJob, results: dict[str, Any], written: dict[str, bytes]) -> None:
    row = job.record(results, written)
    outcome = "failed" if row["error"] else f"done on {row['host']} in {row['job_duration']:.0f} s"
    tqdm.write(f"[{job.place}] {job.experiment.title}: {outcome}")


def resources_of(experiment: Experiment) -> dict[str, float]:
    """What a job asks of Ray: what its model's `resources` say, else one CPU, and one GPU where it runs on one."""
    asked = {"num_cpus": 1, "num_gpus": 1, **experiment.resources}
    return asked if experiment.accelerator == "cuda" else {**asked, "num_gpus": 0}


def prepared(experiment: Experiment, known: dict[str, list[str] | str]) -> list[str] | str:
    """Download or render the data here, once for all jobs; return the files that a node must have, or an error.

    Args:
        experiment: Of the job.
        known: What was returned for data, by their fingerprints.
    """
    parts = [experiment.data, *(test["data"] for test in experiment.tests.values() if "data" in test)]
    files = [*_paths([experiment.model, experiment.trainer, experiment.tests])]
    for part in parts:
        name = fingerprint(part)
        if name not in known:
            known[name] = _prepared_data(part)
        found = known[name]
        if isinstance(found, str):
            return found
        files += found
    return files


def _prepared_data(given: Config) -> list[str] | str:
    try:
        datamodule = build_component("data", given)
        datamodule.prepare_data()
    except Exception as error:  # of one data set; the jobs of others run
        return one_line(error)
    root = getattr(datamodule, "root", None)
    return [*([] if root is None else [str(root)]), *_paths(given)]


def _paths(value: Any) -> Iterator[str]:
    """Files and folders of this machine that a configuration names with a slash."""
    if isinstance(value, str) and "/" in value and Path(value).exists():
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _paths(part)


def _amounts(given: dict[str, float], names: Any) -> str:
    return ", ".join(f"{name} {given.get(name, 0):g}" for name in names)
