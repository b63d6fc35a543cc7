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
from anomalib_pack.sweep.papers import command as papers
from anomalib_pack.sweep.papers.files import is_table, locate
from anomalib_pack.sweep.rehearsal import list_jobs, rehearse
from anomalib_pack.sweep.results import is_done, rows_by_job
from anomalib_pack.sweep.settings import Experiment, Plan, read_plan
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
            parser.add_argument(
                "--store",
                type=Path,
                default=Path("runs", "papers"),
                help="Folder of the runs that tables of papers read; each is run once, whichever table asks first.",
            )
            parser.add_argument(
                "--dry_run",
                action="store_true",
                help="Check all and build models without weights or memory; run nothing.",
            )
            parser.add_argument(
                "--list", action="store_true", help="Print the jobs and what of them is done; run nothing."
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
            path = locate(args.config)
            config, content = "", None
            if not path.is_dir():
                config = path.read_text(encoding="utf-8")
                with path.open(encoding="utf-8") as file:  # whose name is in YAML's errors
                    content = yaml.safe_load(file)
            of_papers = path.is_dir() or is_table(content)
            plan = papers.read_plan(path) if of_papers else read_plan(content)
            if not (of_papers or args.dry_run or args.list):
                _check_devices(plan.accelerators)
            folder = args.store if of_papers else _folder(args.resume)
        except (OSError, ValueError, yaml.YAMLError) as error:
            parser.error(str(error))

        if args.list:
            list_jobs(plan.experiments, rows_by_job(folder / RESULTS))
        elif args.dry_run:
            try:
                rehearse(plan.experiments)
            except ValueError as error:
                parser.error(str(error))
        elif of_papers:
            self._run_papers(plan, folder)
        else:
            try:
                (folder / LOGS).mkdir(parents=True, exist_ok=True)
                replace_file(folder / CONFIG, config.encode())
            except OSError as error:  # e.g. a full disk
                parser.error(str(error))
            self._run_sweep(plan, folder)

    def _run_papers(self, plan: papers.Plan, store: Path) -> None:
        def run(experiments: list[Experiment]) -> None:
            for runner in self._setup_runners({"accelerator": sorted({each.accelerator for each in experiments})}):
                runner.run({"experiments": experiments, "folder": store})

        if papers.run_plan(plan, store, run):
            raise SystemExit(1)

    def _run_sweep(self, plan: Plan, folder: Path) -> None:
        Console().print(f"Results: {folder}", soft_wrap=True)
        results = rows_by_job(folder / RESULTS)
        pending = [experiment for experiment in plan.experiments if not is_done(experiment, results)]
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
    results = rows_by_job(folder / RESULTS)
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
