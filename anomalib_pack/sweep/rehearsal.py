"""What can be known before a sweep runs: what is done, and whether every model and datamodule can be built."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from anomalib_pack.loggers import warnings_alone
from anomalib_pack.sweep.components import build_component, find_class, without_defaults
from anomalib_pack.sweep.experiment import is_stock, one_line
from anomalib_pack.sweep.results import is_done
from anomalib_pack.sweep.settings import Config, Experiment, fingerprint, model_of_test

DOWNLOADS = ("weights", "vit_weights", "dtd_dir")  # arguments that name files or downloads
PRE_TRAINED = "pre_trained"  # the one of Anomalib's


def list_jobs(experiments: list[Experiment], results: dict[str, dict[str, str]]) -> None:
    """Print the jobs and what of them is done.

    Args:
        experiments: The jobs.
        results: Rows by job.
    """
    console = Console()
    for experiment in experiments:
        failed = results.get(experiment.key, {}).get("error")
        state = "done" if is_done(experiment, results) else "failed" if failed else "to do"
        console.print(f"{state:7}{experiment.key}  {experiment.title}", markup=False, highlight=False, soft_wrap=True)
    done = sum(is_done(experiment, results) for experiment in experiments)
    console.print(f"{len(experiments)} jobs, {done} of them done.")


def rehearse(experiments: list[Experiment]) -> None:
    """Build each distinct model and datamodule once, without weights, memory or images, and say what was not built.

    Raises:
        ValueError: If one cannot be built, or a category is unknown.
    """
    console = Console()
    models = _distinct("model", [model_of_test(each, test) for each in experiments for test in ("", *each.tests)])
    with warnings_alone("anomalib"):  # which has a line for each model
        built = [_build_model(model) for model in models]
    data = [
        part
        for each in experiments
        for part in (each.data, *(test["data"] for test in each.tests.values() if "data" in test))
    ]
    datamodules = _distinct("data", data)
    for each in datamodules:
        _build_data(each)
    console.print(
        f"{len(experiments)} jobs: the classes, arguments and categories of {len(models)} models and "
        f"{len(datamodules)} datamodules are right; {built.count('')} models were built."
    )
    for reason in dict.fromkeys(filter(None, built)):
        console.print(f"Not built, class and arguments alone: {reason}", markup=False, soft_wrap=True)


def _distinct(section: str, given: list[Config]) -> list[Config]:
    return list({fingerprint(without_defaults(section, each)): each for each in given}.values())


def _build_model(given: Config) -> str:
    """Build a model on the device `meta`; return why not, where it is one of Anomalib's that cannot be."""
    cls = find_class("model", given["class_path"], "model")
    parameters = inspect.signature(cls).parameters
    without = {name: None for name in DOWNLOADS if name in parameters} | (
        {PRE_TRAINED: False} if PRE_TRAINED in parameters else {}
    )
    if is_stock(cls) and not without:
        return f"{cls.__name__}: its constructor may download"
    changed = {**given, "init_args": {**given.get("init_args", {}), **without}}
    try:
        with torch.device("meta"):
            build_component("model", changed)
    except Exception as error:
        if is_stock(cls):
            return f"{cls.__name__}: {one_line(error)}"
        msg = f"model {given} cannot be built: {one_line(error)}"
        raise ValueError(msg) from error
    return ""


def _build_data(given: Config) -> None:
    try:
        datamodule = build_component("data", given)
    except Exception as error:
        msg = f"data {given} cannot be built: {one_line(error)}"
        raise ValueError(msg) from error
    arguments = given.get("init_args", {})
    name = arguments.get("dataset", type(datamodule))  # of MultiCategory: a name or a list of Folder
    known = _known_categories(find_class("data", name, "dataset") if isinstance(name, str) else name)
    asked = arguments.get("categories", arguments.get("category", []))
    names = set(asked if isinstance(asked, list) else [asked]) - {*known, "all"}
    unknown = [each for each in names if not (Path(datamodule.root) / each).is_dir()] if known else []
    if unknown:
        msg = f"data {given}: there is no category {', '.join(map(str, unknown))}, but {', '.join(known)}."
        raise ValueError(msg)


def _known_categories(datamodule: Any) -> tuple[str, ...]:
    """Categories that the module of a datamodule lists, or that of Anomalib's data set of the same name."""
    name = getattr(datamodule, "__module__", "")
    modules = (sys.modules.get(name), sys.modules.get(name.replace(".datamodules.", ".datasets.")))
    return next((module.CATEGORIES for module in modules if hasattr(module, "CATEGORIES")), ())
