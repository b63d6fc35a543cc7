"""GPU hours of the tables of papers, estimated by counting: `python benchmarks/paper_hours.py > table.md`.

A training costs the images that pass through the network, times its FLOPs for an image, times three (forward, and twice
as much backward), by an assumed rate of a GPU. A model that fits by one pass costs once. Nothing is measured here:
loading images, tests, the search for a coreset and metrics, which can take as long in short trainings, are not counted,
and a GPU reaches the rate or not. The numbers say whether a table is an hour or a month.
"""

import argparse
from pathlib import Path

from anomalib_pack.sweep.papers.files import CONFIGS, table_files
from anomalib_pack.sweep.papers.settings import PaperTable, read_tables
from anomalib_pack.sweep.papers.store import runs_of
from anomalib_pack.sweep.settings import Experiment

# Normal training images in all categories together, and categories: the papers' own counts.
IMAGES = {
    "BTech": (1799, 3),
    "MPDD": (888, 6),
    "MVTecAD": (3629, 15),
    "MVTecLoco": (1772, 5),
    "Visa": (8659, 12),
    "RealIAD": (36465, 30),
    "GoodsAD": (3136, 6),
    "AeBAD": (521, 1),
    "CIFAR10Unified": (25000, 1),
    "AeBAD and MVTecAD": (521 + 3629, 1),
}
# 10^9 FLOPs of an image: docs/efficiency.md; of Cflow and Draem, which are not there, as `anomalib efficiency` counts;
# Padim's with WideResNet-50-2 as UniAD's Table A7 has it.
GFLOPS = {
    "Ulsad": 50.9,
    "Uniad": 5.24,
    "MiniMaxAd": 14.1,
    "Unislad": 69.5,
    "DistilledEfficientAd": 75.9,
    "EfficientAd": 75.9,
    "Patchcore": 38.7,
    "Padim": 23.3,
    "ReverseDistillation": 56.9,
    "Fastflow": 85.2,
    "Dsr": 266,
    "Cflow": 70.2,
    "Draem": 396,
}
MEDIUM = 235 / 75.9  # EfficientAD-M's by -S's
ONE_PASS = {"Patchcore", "Padim", "Unislad"}
TRAINING = 3
HELD_BACK = 0.1
DEFAULT_BATCH = 32


def images_of(run: Experiment) -> float:
    """Training images of a run."""
    arguments = run.data["init_args"]
    name = arguments.get("dataset", run.data["class_path"])
    total, categories = IMAGES[name if isinstance(name, str) else "AeBAD and MVTecAD"]
    share = 1 if run.data["class_path"] == "MultiCategory" and not run.row else categories
    return total / share * (1 if arguments.get("val_split_mode") is None else 1 - HELD_BACK)


def hours(run: Experiment, rate: float) -> float:
    """Estimated hours of a run at a rate in FLOPs per second."""
    name, trainer = run.model["class_path"], run.trainer
    flops = 1e9 * GFLOPS[name] * (MEDIUM if run.model["init_args"].get("model_size") == "medium" else 1)
    if name in ONE_PASS:
        return images_of(run) * flops / rate / 3600
    passes = trainer["max_epochs"] * images_of(run)
    if "max_steps" in trainer:
        passes = trainer["max_steps"] * run.data["init_args"].get("train_batch_size", DEFAULT_BATCH)
    return TRAINING * passes * flops / rate / 3600


def row(table: PaperTable, rate: float) -> str:
    """Line of the index."""
    runs = runs_of([table], [table])
    kind, _, number = table.path.stem.partition("_")
    return f"| {kind.title()} {number.upper()} | `papers/{table.name}` | {len(runs)} | {estimate(runs, rate)} |"


def estimate(runs: list[Experiment], rate: float) -> str:
    """Hours of runs as text."""
    total = sum(hours(run, rate) for run in runs)
    return f"{total:.0f}" if total >= 10 else f"{total:.1f}" if total else "0"


def main() -> None:
    """Print a line for each table, and the hours of each paper."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=2e13, help="FLOPs per second that a GPU reaches in training")
    rate = parser.parse_args().rate
    tables = read_tables(table_files(Path(CONFIGS, "papers")), "cpu")
    for paper in dict.fromkeys(table.path.parent.name for table in tables):
        own = [table for table in tables if table.path.parent.name == paper]
        runs = runs_of(own, own)
        print(f"\n{paper}: {len(own)} tables, {len(runs)} runs, {estimate(runs, rate)} hours\n")
        print(*(row(table, rate) for table in own), sep="\n")


if __name__ == "__main__":
    main()
