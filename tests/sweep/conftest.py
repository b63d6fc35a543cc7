"""Fixtures for sweeps over tiny models on rendered images."""

import pytest

from anomalib_pack.sweep import job


@pytest.fixture(scope="session")
def tray(loco_root):
    """A data section."""
    init_args = {"root": str(loco_root), "category": "tray", "train_batch_size": 4, "eval_batch_size": 4}
    return {"class_path": "MVTecLoco", "init_args": {**init_args, "num_workers": 0}}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Sweeps run in an empty working directory, and their jobs in this process, where a start costs nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "in_own_process", lambda function, *arguments: function(*arguments))
    return tmp_path
