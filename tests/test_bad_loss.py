"""Losses and weights that are not finite: seen late, named right, never kept."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from line_model import Line, train
from waiting import TIMEOUT

LINE_MODEL = Path(__file__).with_name("line_model.py")


def test_loss_is_named_late() -> None:
    """Step 11 is seen 50 steps after the last look, and its images are named alone."""
    model = Line()
    with pytest.raises(ValueError, match=r"loss is nan on the images \['11.png'\]"):
        train(model, {11: torch.nan}, steps=70)
    assert model.trainer.global_step == 50


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_last_loss(value: float) -> None:
    """Where an epoch ends before there have been 50 steps, nothing is validated."""
    model = Line()
    with pytest.raises(ValueError, match=rf"loss is {value} on the images \['6.png'\]"):
        train(model, {6: value}, steps=7)
    assert model.validations == 0


def test_gradient() -> None:
    """The root of 0 is finite, its gradient is not: all batches of the step are named, and no checkpoint is written."""
    model = Line()
    with pytest.raises(ValueError, match=r"weights 'weight' are not finite .* \['6.png', '7.png'\]"):
        train(model, {7: 0.0}, steps=8, accumulate_grad_batches=2)
    assert model.validations == 0
    with pytest.raises(ValueError, match="weights"):
        train(Line(), {7: 0.0}, steps=8, limit_val_batches=0)


def test_checkpoint_within_an_epoch(tmp_path: Path) -> None:
    model = Line()
    model.save_after = (5, tmp_path / "5.ckpt"), (9, tmp_path / "9.ckpt")
    with pytest.raises(ValueError, match=r"loss is nan on the images \['7.png'\]"):
        train(model, {7: torch.nan}, steps=20)
    assert [path.name for path in tmp_path.iterdir()] == ["5.ckpt"]


def test_finite_losses_change_nothing() -> None:
    model = Line()
    train(model, {}, steps=120)
    assert model.trainer.global_step == 120
    assert model.validations == 1


def test_all_processes_stop(tmp_path: Path) -> None:
    """A loss of the second process: both raise the same error."""
    command = [sys.executable, LINE_MODEL, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode != 0
    errors = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert errors.keys() == {"0", "1"}, run.stderr[-3000:]
    assert all("loss is nan on the images ['11.png']" in error for error in errors.values())
