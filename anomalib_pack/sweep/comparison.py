"""Is the difference of two models real? A paired bootstrap of their AUROCs on the same images."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from anomalib_pack.sweep.keeping import SCORES, kept_of
from anomalib_pack.sweep.results import is_done
from anomalib_pack.sweep.settings import Experiment
from anomalib_pack.sweep.tables import ALL, MEAN

RESAMPLES, LEVEL, SEED = 10_000, 0.95, 0
CHUNK = 500  # resamples at a time, which bounds the memory
NOTE = (
    f"AUROC of raw scores in %, means over seeds ({{seeds}}). Interval: {LEVEL:.0%} percentile bootstrap of the "
    f"difference, {RESAMPLES} resamples (random seed {SEED}) of the test images, normal and anomalous ones apart, the "
    "same images for both models and for all seeds. It says what other images of this kind would change, not what "
    "other trainings would. Bold: without 0."
)

Pair = dict[str, Experiment]  # an experiment of each model, by its name
Rows = dict[str, dict[str, str]]  # of a run's scores, by path of the image


@dataclass(frozen=True)
class Images:
    """Scores of the same images by two models, trained with S seeds.

    Attributes:
        labels: (N,) whether an image is anomalous.
        scores: (2, S, N).
    """

    labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Of two models on some images.

    Attributes:
        areas: AUROC of each, mean over seeds.
        replicates: (RESAMPLES,) differences of the first to the second.
    """

    areas: tuple[float, float]
    replicates: np.ndarray

    @property
    def difference(self) -> float:
        """Of the first to the second."""
        return self.areas[0] - self.areas[1]

    @property
    def interval(self) -> tuple[float, float]:
        """Percentile interval of the difference."""
        low, high = np.quantile(self.replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


def bootstrap(images: Images, rng: np.random.Generator) -> Comparison:
    """Compare two models on resampled images.

    An AUROC is the mean over pairs of an anomalous and a normal image of whether the first has the higher score (1/2
    where both have the same). In a resample a pair counts as often as both of its images are drawn. So all AUROCs come
    from one matrix of the pairs, and the mean over seeds is taken before.

    Args:
        images: At least one normal and one anomalous.
        rng: Source of the resamples.
    """
    first, second = (np.mean([_pairs(seed, images.labels) for seed in model], axis=0) for model in images.scores)
    difference = first - second
    count = difference.shape
    replicates = []
    for start in range(0, RESAMPLES, CHUNK):
        anomalous, normal = (draws(n, min(CHUNK, RESAMPLES - start), rng) for n in count)
        replicates.append(((anomalous @ difference) * normal).sum(axis=1) / np.prod(count))
    return Comparison((float(first.mean()), float(second.mean())), np.concatenate(replicates))


def draws(count: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of some images is drawn, (resamples, count)."""
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float32)


def _pairs(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(anomalous, normal): 1 where the anomalous image has the higher score, 1/2 where both have the same."""
    anomalous, normal = scores[labels][:, None], scores[~labels][None]
    return (anomalous > normal).astype(np.float32) + np.float32(0.5) * (anomalous == normal)


def mean_of(parts: Sequence[Comparison]) -> Comparison:
    """The mean over categories, which are resampled on their own, or over data sets."""
    areas = tuple(float(np.mean([part.areas[index] for part in parts])) for index in (0, 1))
    return Comparison(areas, np.mean([part.replicates for part in parts], axis=0))


def compare(names: Sequence[str], experiments: list[Experiment], folder: Path, results: Rows, command: str) -> None:
    """Print the differences of two models, per category and of the mean over categories and data sets.

    Args:
        names: Of the models, as in the tables.
        experiments: All of the configuration.
        folder: Of their results.
        results: Rows by job.
        command: That makes missing runs.

    Raises:
        ValueError: If a model is unknown, runs are missing, or the models were not tested on the same images.
    """
    pairs = _paired(names, experiments)
    _check_done([each for pair in pairs for each in pair.values()], folder, results, command)
    images = _images(pairs, folder)
    rng = np.random.default_rng(SEED)
    found = {place: bootstrap(each, rng) for place, each in images.items()}
    by_dataset: dict[str, list[Comparison]] = defaultdict(list)
    for (dataset, _), comparison in found.items():
        by_dataset[dataset].append(comparison)
    several = len(by_dataset) > 1
    lines = [(" ".join(place) if several else place[1], comparison) for place, comparison in found.items()]
    if len(lines) > 1:
        lines.append((MEAN, mean_of([mean_of(parts) for parts in by_dataset.values()])))
    console = Console()
    console.print(_table(names, lines))
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(pair[names[0]].seed for pair in pairs))
    console.print(NOTE.format(seeds=seeds), markup=False)


def _paired(names: Sequence[str], experiments: list[Experiment]) -> list[Pair]:
    """Experiments of both models with the same data and seed."""
    known = list(dict.fromkeys(experiment.model_name for experiment in experiments))
    for name in names:
        if name not in known:
            msg = f"compare must be two of {', '.join(known)}; got {name}."
            raise ValueError(msg)
    found: dict[tuple[Any, ...], Pair] = defaultdict(dict)
    for experiment in experiments:
        if experiment.model_name in names:
            place = (experiment.dataset, experiment.row, experiment.seed)
            if experiment.model_name in found[place]:
                msg = f"compare: there are several runs of {experiment.title}. Give one table that has one of them."
                raise ValueError(msg)
            found[place][experiment.model_name] = experiment
    pairs = [pair for pair in found.values() if len(pair) == len(names)]
    if not pairs:
        msg = f"compare: {' and '.join(names)} have no data and seed in common."
        raise ValueError(msg)
    return pairs


def _check_done(experiments: list[Experiment], folder: Path, results: Rows, command: str) -> None:
    missing = [each for each in experiments if not is_done(each, results)]
    if missing:
        msg = f"compare: {len(missing)} runs are missing, e.g. {missing[0].title}. Make them: {command}"
        raise ValueError(msg)
    unkept = [each for each in experiments if not (kept_of(folder, each.key) / SCORES).is_file()]
    if unkept:
        file = kept_of(folder, unkept[0].key) / SCORES
        msg = f"compare: {len(unkept)} runs have no scores of images, e.g. {unkept[0].title}: {file} is not there."
        raise ValueError(msg)


def _images(pairs: list[Pair], folder: Path) -> dict[tuple[str, str], Images]:
    """Scores by data set and category."""
    seeds: dict[tuple[str, str], list[list[Rows]]] = defaultdict(list)  # rows of both models for each seed
    for pair in pairs:
        both = [_read(kept_of(folder, each.key) / SCORES) for each in pair.values()]
        experiment = next(iter(pair.values()))
        categories = list(dict.fromkeys(row["category"] for row in both[0].values()))
        for category in categories if not experiment.row else [experiment.row]:
            name = category if experiment.row or len(categories) > 1 else ALL
            parts = [
                {path: row for path, row in rows.items() if experiment.row or row["category"] == category}
                for rows in both
            ]
            seeds[experiment.dataset, name].append(parts)
    return {place: _stacked(rows, " ".join(place)) for place, rows in seeds.items()}


def _stacked(seeds: list[list[Rows]], place: str) -> Images:
    paths = sorted(seeds[0][0])
    if any(rows.keys() != set(paths) for both in seeds for rows in both):
        msg = f"compare: the models were not tested on the same images of {place}."
        raise ValueError(msg)
    labels = np.array([seeds[0][0][path]["gt_label"] == "1" for path in paths])
    if labels.all() or not labels.any():
        msg = f"compare: {place} needs normal and anomalous images."
        raise ValueError(msg)
    scores = [[[float(rows[path]["raw_score"] or "nan") for path in paths] for rows in both] for both in seeds]
    stacked = np.swapaxes(np.array(scores), 0, 1)  # (2, S, N)
    if np.isnan(stacked).any():
        msg = f"compare: images of {place} have no score."
        raise ValueError(msg)
    return Images(labels, stacked)


def _read(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["image_path"]: row for row in csv.DictReader(file)}


def _table(names: Sequence[str], lines: list[tuple[str, Comparison]]) -> Table:
    shown = Table("", title=f"AUROC of {' and '.join(names)}, in %", box=box.HORIZONTALS, pad_edge=False)
    for name in (*names, "difference", f"{LEVEL:.0%} interval"):
        shown.add_column(name, justify="right", vertical="bottom", overflow="fold")
    for position, (label, comparison) in enumerate(lines, start=1):
        low, high = (100 * bound for bound in comparison.interval)
        values = [f"{100 * area:.1f}" for area in comparison.areas]
        real = low > 0 or high < 0
        cells = [*values, f"{100 * comparison.difference:+.1f}", f"{low:+.1f} to {high:+.1f}"]
        before_mean = position == len(lines) - 1 and lines[-1][0] == MEAN
        shown.add_row(label, *cells, style="bold" if real else None, end_section=before_mean)
    return shown
