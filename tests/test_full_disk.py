"""A disk that is full: files are whole or absent, and a picture never costs the metrics."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shutil import disk_usage
from types import SimpleNamespace

import pytest
import torch
import yaml
from anomalib.engine import Engine
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Callback
from PIL import Image
from tiny_model import TinyModel

from anomalib_pack.data import MVTecLoco
from anomalib_pack.defaults import OneClassDefaults
from anomalib_pack.efficiency import pipeline
from anomalib_pack.files import replace_file
from anomalib_pack.resuming import KeepTraining, WholeFiles
from anomalib_pack.sweep import Sweep, job
from anomalib_pack.sweep.results import read_rows, write_row
from anomalib_uniad import rendering

SIZE = 2**20  # bytes


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Root of a disk of 1 MiB."""
    root = tmp_path / "disk"
    root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(root)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield root
    subprocess.run(["umount", "--lazy", str(root)], check=True)  # a file may still be open in an exception's frames


def fill(root: Path) -> None:
    """Leave no space."""
    with (root / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
    assert disk_usage(root).free == 0


class Tiny(OneClassDefaults, TinyModel):
    """The tiny model with what the pack's models share, pictures too."""

    def __init__(self, visualizer: Visualizer | bool = True) -> None:
        super().__init__(visualizer=visualizer)


class Thumbnails(Visualizer):
    """A user's own visualizer."""

    def __init__(self) -> None:
        self.batches = self.ends = 0

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.batches += 1
        Image.new("RGB", (64, 64)).save(Path(trainer.default_root_dir) / f"{batch_idx}.png")

    def on_test_end(self, trainer, pl_module) -> None:
        self.ends += 1


class FillInSecondEpoch(Callback):
    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            fill(self.root)


def engine(root: Path, *callbacks: Callback) -> Engine:
    return Engine(
        list(callbacks), default_root_dir=root / "runs", accelerator="cpu", max_epochs=2, enable_progress_bar=False
    )


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def test_file_is_whole_or_absent(disk: Path) -> None:
    path = disk / "folder" / "file"
    with pytest.raises(OSError, match=f"Cannot write {path}: No space left"):
        replace_file(path, bytes(2 * SIZE))
    assert not list(path.parent.iterdir())
    replace_file(path, bytes(SIZE // 2))
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, bytes(SIZE * 3 // 4))
    assert [each.name for each in path.parent.iterdir()] == ["file"]
    assert path.read_bytes() == bytes(SIZE // 2)


def test_anomalibs_own_checkpoint_is_cut(disk: Path) -> None:
    """What the pack's way to write is there for: when this fails, Lightning does better and ours may go."""
    path = disk / "model.ckpt"
    with pytest.raises(OSError, match="No space left"):
        AnomalibCheckpointIO().save_checkpoint({"weights": torch.zeros(SIZE)}, path)
    assert path.is_file()
    path.unlink()
    with pytest.raises(OSError, match=f"Cannot write {path}"):
        WholeFiles().save_checkpoint({"weights": torch.zeros(SIZE)}, path)
    assert not list(disk.iterdir())


def test_disk_full_in_training(loco: MVTecLoco, disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The timed save warns, the checkpoint of the second validation ends the training, those of before are whole."""
    with pytest.raises(OSError, match=r"Cannot write .*model.*\.ckpt: No space left"):
        engine(disk, FillInSecondEpoch(disk), KeepTraining(save_minutes=1e-9)).fit(Tiny(), datamodule=loco)
    weights = next(disk.rglob("weights/lightning"))
    assert sorted(each.name for each in weights.iterdir()) == ["model.ckpt", "resume.ckpt"]
    assert load(weights / "model.ckpt")["global_step"] == 4
    assert load(weights / "resume.ckpt")["global_step"] == 3
    assert "resume.ckpt: No space left on device. The training goes on." in caplog.text
    assert "What was trained up to step 3" in caplog.text
    assert "anomalib fit --ckpt_path" in caplog.text


@pytest.mark.parametrize("visualizer", [True, ImageVisualizer(), Thumbnails()], ids=["default", "stock", "own"])
def test_pictures_do_not_cost_the_metrics(
    loco: MVTecLoco, disk: Path, caplog: pytest.LogCaptureFixture, visualizer: Visualizer | bool
) -> None:
    runs, model = engine(disk), Tiny(visualizer)
    runs.fit(model, datamodule=loco)
    fill(disk)
    with pytest.warns(UserWarning, match=r"Cannot write .*metrics.csv: No space left"):
        (metrics,) = runs.test(model, datamodule=loco)
    assert "image_AUROC" in metrics
    assert caplog.text.count("Cannot write pictures to") == 1
    if isinstance(visualizer, Thumbnails):
        assert (visualizer.batches, visualizer.ends) == (3, 1)
        return  # only Anomalib's names of pictures are known
    for picture in disk.rglob("*.png"):
        with Image.open(picture) as image:
            image.verify()


class Explained(Tiny):
    """With explanations so long that the rows of a batch need more than is left of a block of the disk."""

    def test_step(self, batch, batch_idx):
        return super().test_step(batch, batch_idx).update(explanation=["x" * 2000] * batch.batch_size)


class FillAndFree(Callback):
    """A disk that is full when the first batch has been tested, and not any more after the second."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines = []

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        records = Path(trainer.default_root_dir) / "test_predictions.csv"
        self.lines.append(records.read_text().count("\n"))
        if batch_idx == 1:
            fill(self.root)
        if batch_idx == 2:
            (self.root / "filler").unlink()


def test_records_do_not_cost_the_metrics(loco: MVTecLoco, disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What could not be written follows when there is space; until then the file ends with a whole row."""
    filling, model = FillAndFree(disk), Explained(visualizer=False)
    runs = engine(disk, filling)
    (metrics,) = runs.test(model, datamodule=loco)
    assert "image_AUROC" in metrics
    assert caplog.text.count("test_predictions.csv: No space left on device. The metrics do not need it") == 1
    records = Path(runs.trainer.default_root_dir) / "test_predictions.csv"
    assert filling.lines == [1, 5, 5]
    assert records.read_text().count("\n") == 13


def test_sweep_says_what_is_lost(disk: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of before stay; a row that cannot be written is printed, and the job counts as failed."""
    results = disk / job.RESULTS
    write_row({"job": "a", "error": "", "image_AUROC": 0.5}, results)
    fill(disk)
    monkeypatch.setattr(job, "in_own_process", lambda *_: {"error": "", "image_AUROC": 0.25})
    monkeypatch.setattr(job.SweepJob, "_description", lambda _self: {"job": "b"})

    class Experiment:
        title, key, measures = "Ulsad on tray", "b", None

    row = job.SweepJob(Experiment(), disk, "2/2").run()
    assert "No space left" in row["error"]
    written = capsys.readouterr().out
    assert f"Cannot write {results}: No space left on device. Resume with anomalib sweep " in written
    assert f"--resume {disk}." in written
    assert "0.25" in written
    assert [each["job"] for each in read_rows(results)] == ["a"]


def test_sweep_that_cannot_begin(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One line, before any job, instead of half a file that could not be resumed."""
    model = {"class_path": "Uniad", "init_args": {"backbone": "resnet18", "layers": ["layer1"], "weights": None}}
    sweep = {"accelerator": "cpu", "benchmark": {"seed": 0, "model": model, "data": {"class_path": "SyntheticLoco"}}}
    config = tmp_path / "sweep.yaml"
    config.write_text(yaml.safe_dump(sweep))
    monkeypatch.chdir(disk)
    fill(disk)
    with pytest.raises(SystemExit) as stop:
        Sweep().run(Sweep.get_parser().parse_args(["--config", str(config)]))
    assert stop.value.code == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(disk.rglob("config.yaml"))


def test_efficiency_prints_what_it_cannot_write(disk: Path, capsys: pytest.CaptureFixture) -> None:
    """A full disk costs neither the table nor the reasons of failures."""
    fill(disk)
    measured = {"latency_mean_ms": 1.0, "latency_p95_ms": 1.0, "parameters": 1, "bank": None, "flops": 1}
    measured |= {"peak_memory_mib": 1.0, "device_name": "CPU", "image_AUROC": 0.5}
    failed = {"error": "it fell", "traceback": "File lightning_model.py, line 7"}
    pipeline._conclude([{"model": "A", **measured}, {"model": "B", **failed}], "image_AUROC", disk)
    written = capsys.readouterr().out
    for name in ("errors.log", "latency_accuracy.png"):
        assert f"Cannot write {disk / name}: No space left on device." in written
        assert not (disk / name).exists()
    assert "line 7" in written
    assert "B failed: it fell" in written


def test_decoder_of_pictures_is_whole_or_absent(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a checkpoint is; the error names the file."""
    fill(disk)
    uniad = SimpleNamespace(model=SimpleNamespace(backbone=SimpleNamespace(channels=[4])), device="cpu")
    monkeypatch.setattr(rendering, "_load", lambda *_: uniad)
    monkeypatch.setattr(rendering, "_categories", lambda *_: {"tray": None})
    monkeypatch.setattr(rendering, "_loader", lambda *_, **__: None)
    monkeypatch.setattr(rendering, "_train", lambda *_: None)
    with pytest.raises(OSError, match=f"Cannot write {disk / 'tray.pt'}: No space left"):
        rendering.train_renderer(disk / "model.ckpt", SimpleNamespace(train_batch_size=1), disk, width=1, device="cpu")
    assert [each.name for each in disk.iterdir()] == ["filler"]
