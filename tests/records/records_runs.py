"""Running a tiny model, and reading its records."""

import csv
from pathlib import Path
from typing import Any

from anomalib.engine import Engine
from lightning.pytorch import Callback
from tiny_model import TinyModel

from anomalib_pack.defaults import OneClassDefaults


class Tiny(OneClassDefaults, TinyModel):
    """The tiny model with what the pack's models share."""


def engine(root: Path, *callbacks: Callback, **arguments: Any) -> Engine:
    return Engine(
        list(callbacks),
        default_root_dir=root,
        accelerator="cpu",
        max_epochs=1,
        enable_progress_bar=False,
        logger=False,
        **arguments,
    )


def folder(running: Engine) -> Path:
    """Folder of the run."""
    return Path(running.trainer.default_root_dir)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
