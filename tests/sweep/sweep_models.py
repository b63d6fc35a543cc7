"""Tiny models and data for sweeps, importable in the processes of the jobs."""

import os
import time
from pathlib import Path

from tiny_model import TinyModel

from anomalib_pack.data import MVTecLoco


class Adjustable(TinyModel):
    """Says with its metrics how it was built and trained, or fails where it is told to.

    Its argument is called like the key of a grid, and its evaluator, Anomalib's, has other metrics than the pack's.
    """

    def __init__(self, grid_size: int = 1, fail: str = "", seconds: float = 0.0):
        super().__init__()
        if fail == "build":
            raise ValueError("cannot be\nbuilt")
        self.grid_size = grid_size
        self.fail = fail
        self.seconds = seconds
        self.initial = float(self.model.encode.weight.detach().sum())

    def training_step(self, batch, batch_idx):
        if self.fail == "train":
            raise RuntimeError("cannot be trained")
        if self.fail == "exit":
            raise SystemExit(3)
        if self.fail == "crash":
            os._exit(3)
        time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        self.epochs = self.current_epoch

    def test_step(self, batch, batch_idx):
        self.log_dict({"initial": self.initial, "epochs": float(self.epochs), "size": float(self.grid_size)})
        return super().test_step(batch, batch_idx)


class Kolektor(MVTecLoco):
    """A namesake of one of Anomalib's datamodules, which knows nothing of this folder format."""


class Scaled(TinyModel):
    """Says with its metrics which factor and which weights are tested."""

    def __init__(self, factor: float = 1.0, evaluator=True, post_processor=True):
        super().__init__(evaluator=evaluator, post_processor=post_processor)
        self.factor = factor

    def test_step(self, batch, batch_idx):
        self.log_dict({"factor": self.factor, "weight": float(self.model.encode.weight.detach().sum())})
        return super().test_step(batch, batch_idx)


class Waiting(TinyModel):
    """Leaves a file with its process in a folder when its training starts, and waits for a file `go` there."""

    def __init__(self, folder: str):
        super().__init__()
        self.folder = Path(folder)

    def on_train_start(self):
        self.folder.joinpath(str(os.getpid())).touch()
        while not self.folder.joinpath("go").exists():
            time.sleep(0.05)


class Blind(TinyModel):
    """Has the same score for all images."""

    def test_step(self, batch, batch_idx):
        batch = super().test_step(batch, batch_idx)
        return batch.update(pred_score=batch.pred_score * 0 + 20)
