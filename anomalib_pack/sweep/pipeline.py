"""The subcommand `anomalib sweep`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from textwrap import shorten

import torch
import yaml
from anomalib.pipelines import Benchmark
from anomalib.pipelines.components.base import Runner
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from anomalib_pack.files import dated_folder, replace_file
from anomalib_pack.sweep.cluster import RayRunner
from anomalib_pack.sweep.comparison import compare
from anomalib_pack.sweep.job import RESULTS, SweepJobGenerator
from anomalib_pack.sweep.keeping import LOGS, read_kinds
from anomalib_pack.sweep.papers import command as papers
from anomalib_pack.sweep.papers.files import is_table, locate
from anomalib_pack.sweep.rehearsal import list_jobs, rehearse
from anomalib_pack.sweep.results import is_done, rows_by_job
from anomalib_pack.sweep.settings import Experiment, Plan, read_plan
from anomalib_pack.sweep.tables import NOTE, console_tables, markdown, metric_tables

CONFIG = "config.yaml"
SWEEPS, STORE = Path("runs", "sweep"), Path("runs", "papers")
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
            parser.prog = "anomalib sweep"
            parser.add_argument(
                "--resume",
                type=Path | None,
                help="Folder of an earlier sweep: its successful jobs are kept, those that failed are tried again.",
            )
            parser.add_argument(
                "--store",
                type=Path,
                default=STORE,
                help="Folder of the runs that tables of papers read; each is run once, whichever table asks first.",
            )
            parser.add_argument(
                "--keep",
                type=str | None,
                help="What to keep of each run beside its tables: pictures, checkpoints, or pictures,checkpoints.",
            )
            parser.add_argument(
                "--compare",
                nargs=2,
                metavar=("MODEL_A", "MODEL_B"),
                help="Print how sure the difference of two models' image AUROCs is, by their names in the tables; run "
                "nothing.",
            )
            parser.add_argument(
                "--runner",
                choices=["local", "ray"],
                default="local",
                help="Who runs the jobs: this machine one after another, one on each GPU; or Ray (the extra ray).",
            )
            parser.add_argument(
                "--ray.address",
                type=str | None,
                help="Address of a cluster of Ray, or auto for that of this machine. By default Ray starts here.",
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
        with ExitStack() as stack:
            try:
                of_papers, plan, config = _read(args)
                keep = read_kinds(args.keep)
                plan = replace(plan, experiments=[replace(each, keep=keep) for each in plan.experiments])
                if _look(args, plan.experiments, of_papers):
                    return
                folder = args.store if of_papers else _earlier(args.resume)
                run_jobs = self._run_jobs
                if args.runner == "ray":
                    cluster = stack.enter_context(RayRunner(args.ray.address))
                    plan = _on(cluster.accelerator, plan) if of_papers else plan
                    cluster.check(plan.experiments)
                    run_jobs = cluster.run_jobs
                elif not of_papers:
                    _check_devices(plan.accelerators)
                folder = folder or dated_folder(SWEEPS)
                (folder / LOGS).mkdir(parents=True, exist_ok=True)
                if not of_papers:
                    replace_file(folder / CONFIG, config.encode())
            except (OSError, ValueError, yaml.YAMLError) as error:
                parser.error(str(error))
            failed = (papers.run_plan if of_papers else _run_sweep)(plan, folder, run_jobs)
        if failed:
            raise SystemExit(1)

    def _run_jobs(self, experiments: list[Experiment], folder: Path) -> None:
        accelerators = list(dict.fromkeys(each.accelerator for each in experiments))
        for runner in self._setup_runners({"accelerator": accelerators}):
            runner.run({"experiments": experiments, "folder": folder})

    @staticmethod
    def _setup_runners(args: dict) -> list[Runner]:
        """Let Anomalib choose: one job after another, or one on each of several GPUs."""
        runners = Benchmark._setup_runners(args)
        for runner in runners:
            runner.generator = SweepJobGenerator(runner.generator.accelerator)
        return runners


def _read(args: Namespace) -> tuple[bool, Plan | papers.Plan, str]:
    """Read the configuration; return whether it is of papers, what is to be done, and the text of its file.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If anything is wrong.
        yaml.YAMLError: If it is no YAML.
    """
    if args.ray.address is not None and args.runner != "ray":
        msg = "ray.address needs --runner ray."
        raise ValueError(msg)
    path = locate(args.config)
    if path.is_dir():
        return True, papers.read_plan(path), ""
    with path.open(encoding="utf-8") as file:  # whose name is in YAML's errors
        content = yaml.safe_load(file)
    if is_table(content):
        return True, papers.read_plan(path), ""
    return False, read_plan(content), path.read_text(encoding="utf-8")


def _look(args: Namespace, experiments: list[Experiment], of_papers: bool) -> bool:
    """Do what is asked for and runs nothing; return whether there was something.

    Raises:
        ValueError: If it cannot be done.
    """
    if args.compare:
        _compare(args, experiments, of_papers)
    elif args.list:
        folder = args.store if of_papers else _earlier(args.resume)
        list_jobs(experiments, rows_by_job(folder / RESULTS) if folder else {})
    elif args.dry_run:
        rehearse(experiments)
    return bool(args.compare or args.list or args.dry_run)


def _compare(args: Namespace, experiments: list[Experiment], of_papers: bool) -> None:
    """Print how sure a difference is.

    Raises:
        ValueError: If a model is unknown or runs are missing.
    """
    folder = args.store if of_papers else args.resume or _latest(experiments)
    command = f"anomalib sweep --config {args.config}"
    if folder is not None and folder != STORE:
        command += f" {'--store' if of_papers else '--resume'} {folder}"
    folder = folder or SWEEPS
    compare(args.compare, experiments, folder, rows_by_job(folder / RESULTS), command)
    Console().print(f"Results: {folder}", soft_wrap=True)


def _latest(experiments: list[Experiment]) -> Path | None:
    """The latest sweep that has one of these jobs."""
    keys = {experiment.key for experiment in experiments}
    folders = [path.parent for path in SWEEPS.glob(f"*/{RESULTS}") if keys & rows_by_job(path).keys()]
    return max(folders, default=None)  # named by their times


def _on(accelerator: str, plan: papers.Plan) -> papers.Plan:
    return replace(plan, experiments=[replace(each, accelerator=accelerator) for each in plan.experiments])


def _run_sweep(plan: Plan, folder: Path, run_jobs: papers.RunJobs) -> bool:
    """Run what is not done, and report; return whether a job failed."""
    Console().print(f"Results: {folder}", soft_wrap=True)
    results = rows_by_job(folder / RESULTS)
    run_jobs([experiment for experiment in plan.experiments if not is_done(experiment, results)], folder)
    return _report(plan, folder)


def _check_devices(accelerators: list[str]) -> None:
    if "cuda" in accelerators and not torch.cuda.is_available():
        msg = "accelerator cuda: PyTorch sees no CUDA device. Set it to cpu."
        raise ValueError(msg)


def _earlier(resume: Path | None) -> Path | None:
    if resume is not None and not (resume / CONFIG).is_file():
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
