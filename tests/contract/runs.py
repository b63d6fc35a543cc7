"""Running the ``anomalib`` command on small data."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.engine import Engine
from cases import Case
from waiting import TIMEOUT

ANOMALIB = Path(sys.executable).with_name("anomalib")
SEED = 7


def write_config(path: Path, name: str, case: Case, root: Path, results: Path, **trainer) -> Path:
    """Write a configuration of the ``anomalib`` command."""
    seeding = {"class_path": "anomalib_pack.callbacks.SeedEverything", "init_args": {"seed": SEED}}
    callbacks = [seeding, *trainer.pop("callbacks", [])]
    config = {
        "model": {"class_path": name, "init_args": case.arguments},
        "data": {
            "class_path": "MVTecLoco",
            "init_args": {
                "root": str(root),
                "category": "tray",
                "train_batch_size": 4,
                "eval_batch_size": 4,
                "num_workers": 0,
            },
        },
        "trainer": {"max_epochs": case.epochs, "accelerator": "cpu", "callbacks": callbacks, **trainer},
        "default_root_dir": str(results),
    }
    path.write_text(yaml.safe_dump(config))
    return path


def run_command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Run the real ``anomalib`` command."""
    return subprocess.run(
        [ANOMALIB, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def quiet_engine(root: Path, **arguments: Any) -> Engine:
    """Build an engine that runs on the CPU without progress bars."""
    return Engine(default_root_dir=root, accelerator="cpu", enable_progress_bar=False, **arguments)


def run_cli(*arguments: str | Path) -> AnomalibCLI:
    """Run the command in this process, which saves importing Anomalib again."""
    return AnomalibCLI([str(argument) for argument in arguments])


@dataclass(frozen=True)
class Trained:
    """A training run of the real command."""

    config: Path
    folder: Path  # of the run's results
    checkpoint: Path
    output: str


def write_model_config(trained: Trained, folder: Path) -> Path:
    """Write the model's part of a training configuration, for subcommands that take no data."""
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump({"model": yaml.safe_load(trained.config.read_text())["model"]}))
    return path
