"""The subcommand `anomalib sweep`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from textwrap import shorten

import torch
import yaml
from anomalib.pipelines import Benchmark
from anomalib.pipelines.components.base import Runner
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from anomalib_pack.files import replace_file
from anomalib_pack.sweep.job import LOGS, RESULTS, SweepJobGenerator
from anomalib_pack.sweep.results import read_rows
from anomalib_pack.sweep.settings import Plan, read_plan
from anomalib_pack.sweep.tables import NOTE, console_tables, markdown, metric_tables

CONFIG = "config.yaml"
ERROR_WIDTH = 160  # some of PyTorch's errors fill a page


class Sweep(Benchmark):
    """Fit and test many models on many data sets with many seeds; resumes where it was stopped.

    Results are in ``runs/sweep/<time>/`` and written after each job. A job that fails costs its own row only.
    """

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """Return a parser for the path of a configuration file, and of a sweep to resume."""
        if parser is None:
            parser = Benchmark.get_parser()
            parser.add_argument(
                "--resume",
                type=Path | None,
                help="Folder of an earlier sweep: its successful jobs are kept, those that failed are tried again.",
            )
        return parser

    def run(self, args: Namespace | None = None) -> None:
        """Run all jobs that have no results yet, and report.

        Args:
            args: What :meth:`get_parser` parsed; by default from the command line.

        Raises:
            SystemExit: With status 2 if the configuration is wrong, before any job runs, and with status 1 after the
                report if a job failed.
        """
        parser = self.get_parser()
        args = parser.parse_args() if args is None else args
        try:
            plan = read_plan(self._get_args(args))
            _check_devices(plan.accelerators)
            folder = _folder(args.resume)
            config = Path(args.config).read_bytes()
            (folder / LOGS).mkdir(parents=True, exist_ok=True)
            replace_file(folder / CONFIG, config)
        except (OSError, ValueError, yaml.YAMLError) as error:
            parser.error(str(error))
        Console().print(f"Results: {folder}", soft_wrap=True)
        done = {row["job"] for row in read_rows(folder / RESULTS) if not row["error"]}
        pending = [experiment for experiment in plan.experiments if experiment.key not in done]
        for runner in self._setup_runners({"accelerator": plan.accelerators}):
            runner.run({"experiments": pending, "folder": folder})
        if _report(plan, folder):
            raise SystemExit(1)

    @staticmethod
    def _setup_runners(args: dict) -> list[Runner]:
        """Let Anomalib choose: one job after another, or one on each of several GPUs."""
        runners = Benchmark._setup_runners(args)
        for runner in runners:
            runner.generator = SweepJobGenerator(runner.generator.accelerator)
        return runners


def _check_devices(accelerators: list[str]) -> None:
    if "cuda" in accelerators and not torch.cuda.is_available():
        msg = "accelerator cuda: PyTorch sees no CUDA device. Set it to cpu."
        raise ValueError(msg)


def _folder(resume: Path | None) -> Path:
    if resume is None:
        # A time, as `anomalib benchmark` names its folders.
        return Path("runs", "sweep", f"{datetime.now():%Y-%m-%d-%H_%M_%S}")
    if not (resume / CONFIG).is_file():
        msg = f"resume must be the folder of a sweep, with a {CONFIG}, got {resume}."
        raise ValueError(msg)
    return resume


def _report(plan: Plan, folder: Path) -> bool:
    """Write and print the tables and the jobs that failed; return whether there are any."""
    results = {row["job"]: row for row in read_rows(folder / RESULTS)}
    tables = metric_tables(plan, results)
    failed = {
        experiment.title: (shorten(error, ERROR_WIDTH, placeholder=" ..."), folder / LOGS / f"{experiment.key}.log")
        for experiment in plan.experiments
        if (error := results.get(experiment.key, {"error": "did not run"})["error"])
    }
    text = markdown(tables, {title: error for title, (error, _) in failed.items()})
    console = Console()
    try:
        replace_file(folder / "results.md", text.encode())
    except OSError as error:
        console.print(error.strerror, markup=False, soft_wrap=True)
    for table in tables:
        console.print(*console_tables(table, console.width))
    if tables:
        console.print(NOTE)
    for title, (error, log) in failed.items():
        console.print(f"{title} failed: {error} ({log})", markup=False, soft_wrap=True)
    if failed:
        again = f"anomalib sweep --config {folder / CONFIG} --resume {folder}"
        console.print(f"{len(failed)} of {len(plan.experiments)} jobs failed. Try them again: {again}", soft_wrap=True)
    console.print(f"Results: {folder}", soft_wrap=True)
    return bool(failed)
