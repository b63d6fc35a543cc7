"""Lines now and then where a progress bar cannot be drawn."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from anomalib.engine import Engine
from lightning.pytorch import Callback
from tiny_model import TinyModel

from anomalib_pack import progress
from anomalib_pack.data import MVTecLoco
from anomalib_pack.defaults import OneClassDefaults
from anomalib_pack.progress import ProgressLines, progress_bar


class Tiny(OneClassDefaults, TinyModel):
    """The tiny model with what the pack's models share, and a loss in the progress bar."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def train(loco: MVTecLoco, results: Path, *callbacks: Callback, **arguments: Any) -> Engine:
    engine = Engine(list(callbacks), default_root_dir=results, accelerator="cpu", max_epochs=2, **arguments)
    engine.fit(Tiny(), datamodule=loco)
    return engine


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"Epoch \d+, |Validation: |Test: ", line)]


def test_lines_of_a_training(loco: MVTecLoco, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    engine = train(loco, tmp_path, ProgressLines(seconds=0))
    written = lines(capsys.readouterr().out)
    clock = r"\d+:\d\d:\d\d"
    assert re.fullmatch(rf"Epoch 1, step 1 of 8, train_loss [\d.e-]+, {clock}, about {clock} to come", written[0])
    assert [line[: len("Epoch 1")] for line in written] == [
        *4 * ["Epoch 1"],
        *2 * ["Validat"],
        *4 * ["Epoch 2"],
        *2 * ["Validat"],
        "Epoch 2",  # the last line, with the loss of all
    ]
    assert written[4] == "Validation: batch 1 of 2"
    assert written[-1].startswith("Epoch 2, step 8 of 8, train_loss ")
    assert "to come" not in written[-1]
    engine.test(engine.model, datamodule=loco)
    assert lines(capsys.readouterr().out) == [f"Test: batch {batch} of 3" for batch in (1, 2, 3)]


class Clock(Callback):
    """Stands still, but for a minute that the second epoch begins with."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.now = 60.0 * trainer.current_epoch


def test_time_to_come(loco: MVTecLoco, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """A line after half a minute, and one at the end. Five of eight steps took a minute, so three take 36 s."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    train(loco, tmp_path, clock)
    first, last = lines(capsys.readouterr().out)
    assert first.startswith("Epoch 2, step 5 of 8, ")
    assert first.endswith(", 0:01:00, about 0:00:36 to come")
    assert last.endswith(", 0:01:00")


def test_half_a_minute_of_silence(
    loco: MVTecLoco, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without being asked a short training says how it ended; the callback is there once, also in a test after it."""
    monkeypatch.setattr(progress, "time", Clock())
    engine = train(loco, tmp_path)
    engine.test(engine.model, datamodule=loco)
    assert len(lines(capsys.readouterr().out)) == 1
    assert sum(isinstance(each, ProgressLines) for each in engine.trainer.callbacks) == 1


def test_silent_where_nobody_wants_lines(
    loco: MVTecLoco, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(loco, tmp_path, ProgressLines(seconds=0), enable_progress_bar=False)
    assert not lines(capsys.readouterr().out)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    train(loco, tmp_path, ProgressLines(seconds=0))
    assert not lines(terminal.getvalue())


def test_bar_in_a_pipe(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start and the end of a short pass, every half a minute of a long one."""
    assert list(progress_bar(range(4), desc="Quantiles", leave=False)) == [0, 1, 2, 3]
    written = capsys.readouterr().err
    assert "\r" not in written
    assert [line.split("|")[0] for line in written.splitlines()] == ["Quantiles:   0%", "Quantiles: 100%"]
    monkeypatch.setattr(progress, "SECONDS", 0)
    list(progress_bar(range(4), desc="Quantiles"))
    assert len(capsys.readouterr().err.splitlines()) >= 5


def test_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress_bar(range(4), desc="Quantiles"))
    assert "\rQuantiles: 100%" in terminal.getvalue()
