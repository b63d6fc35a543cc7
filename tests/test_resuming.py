"""What is trained outlives interruptions, crashes and full disks; as a script: a training that saves after each step.

python test_resuming.py DATA RESULTS: ends itself in the second epoch as a power cut would.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback
from tiny_model import TinyModel
from waiting import TIMEOUT

from anomalib_pack.data import MVTecLoco
from anomalib_pack.defaults import OneClassDefaults
from anomalib_pack.resuming import KeepTraining
from anomalib_pack.training import EndsOnBadLoss

EVERY_STEP = 1e-9  # minutes
STEPS = 4  # of an epoch


class Tiny(EndsOnBadLoss, OneClassDefaults, TinyModel):
    """The tiny model with what the pack's models share."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.watch_loss(loss, batch.image_path)
        return loss


class Within(Callback):
    """Does something before the second batch of an epoch, of the second one by default."""

    def __init__(self, do: Callable[[Any], None], epoch: int = 1) -> None:
        self.do, self.epoch = do, epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            self.do(pl_module)


def interrupt(_module: Any) -> None:
    raise KeyboardInterrupt  # what Ctrl+C does; the signal itself may reach the process that runs the tests elsewhere


def terminate(module: Any) -> None:
    # What Lightning's handler of SIGTERM does. There is none outside the main thread: the signal would end the tests.
    module.trainer._signal_connector.received_sigterm = True


def kill(_module: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(_module: Any) -> None:
    raise RuntimeError("out of memory")


def spoil(module: Tiny) -> None:
    with torch.no_grad():
        module.model.encode.weight.fill_(torch.nan)


def data(root: Path) -> MVTecLoco:
    return MVTecLoco(root=root, category="tray", train_batch_size=4, eval_batch_size=4, num_workers=0)


def train(root: Path, results: Path, *callbacks: Callback, ckpt_path: Path | None = None, **arguments: Any) -> Engine:
    engine = Engine(
        list(callbacks),
        default_root_dir=results,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 3} | arguments,
    )
    engine.fit(Tiny(), datamodule=data(root), ckpt_path=ckpt_path)
    return engine


def resume_file(results: Path, version: str = "v0") -> Path:
    return results / "Tiny" / "MVTecLoco" / "tray" / version / "weights" / "lightning" / "resume.ckpt"


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Lightning ignores Ctrl+C once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(
    ("do", "error", "steps"),
    [(interrupt, SystemExit, STEPS + 1), (terminate, SystemExit, STEPS + 2), (fail, RuntimeError, STEPS + 1)],
)
def test_what_is_trained_is_kept(
    loco_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, do: Any, error: type, steps: int
) -> None:
    """The second epoch goes on where it was, and the file goes when the training has ended."""
    with pytest.raises(error):
        train(loco_root, tmp_path, Within(do))
    path = resume_file(tmp_path)
    assert f"anomalib fit --ckpt_path {path.resolve()}" in caplog.text.replace(str(path), str(path.resolve()))
    kept = load(path)
    assert (kept["epoch"], kept["global_step"]) == (1, steps)

    watch = FirstStep()
    trainer = train(loco_root, tmp_path, watch, ckpt_path=path).trainer
    assert watch.first == (1, steps)
    assert (trainer.current_epoch, trainer.global_step) == (3, 3 * STEPS)
    (state, *_) = trainer.optimizers[0].state.values()
    assert state["step"] == 3 * STEPS
    assert path.is_file()  # of the run before, which the user named
    assert not resume_file(tmp_path, "v1").exists()
    assert resume_file(tmp_path, "v1").with_name("model.ckpt").is_file()


class FirstStep(Callback):
    """Keeps where the training began, and its weights."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.first = trainer.current_epoch, trainer.global_step


@pytest.mark.parametrize("name", ["resume.ckpt", "model.ckpt"])
def test_a_training_that_was_resumed_is_resumed(loco_root: Path, tmp_path: Path, name: str) -> None:
    """From within its third epoch or from the end of its second one."""
    with pytest.raises(SystemExit):
        train(loco_root, tmp_path, Within(interrupt))
    with pytest.raises(RuntimeError, match="out of memory"):
        train(loco_root, tmp_path, Within(fail, epoch=2), ckpt_path=resume_file(tmp_path))
    path = resume_file(tmp_path, "v1").with_name(name)
    assert load(path)["global_step"] == 2 * STEPS + (name == "resume.ckpt")
    trainer = train(loco_root, tmp_path, ckpt_path=path).trainer
    assert (trainer.current_epoch, trainer.global_step) == (3, 3 * STEPS)


class FailAfterSteps(Callback):
    """Fails in a hook after the steps of an epoch."""

    def __init__(self, hook: str, epoch: int) -> None:
        self.epoch = epoch
        setattr(self, hook, self.fail)

    def fail(self, trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("minutes", [10, EVERY_STEP])
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_end"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_after_the_steps_of_an_epoch(loco_root: Path, tmp_path: Path, epoch: int, hook: str, minutes: float) -> None:
    """No step is done twice, whether the file is of the last step or of the failure, and the last is validated."""
    with pytest.raises(RuntimeError, match="out of memory"):
        train(loco_root, tmp_path, FailAfterSteps(hook, epoch), KeepTraining(save_minutes=minutes))
    path = resume_file(tmp_path)
    trainer = train(loco_root, tmp_path, ckpt_path=path).trainer
    assert (trainer.current_epoch, trainer.global_step) == (3, 3 * STEPS)
    last = load(resume_file(tmp_path, "v1").with_name("model.ckpt"))
    assert last["global_step"] == 3 * STEPS


class CopyInSecondEpoch(Callback):
    """Keeps the file as a kill in the second epoch would leave it."""

    def __init__(self, path: Path, copy: Path) -> None:
        self.path, self.copy = path, copy

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            self.copy.write_bytes(self.path.read_bytes())


def test_epochs_of_a_single_step(loco_root: Path, tmp_path: Path) -> None:
    """Are saved by the clock too."""
    copy = CopyInSecondEpoch(resume_file(tmp_path), tmp_path / "copy.ckpt")
    train(loco_root, tmp_path, copy, KeepTraining(save_minutes=EVERY_STEP), limit_train_batches=1)
    assert not resume_file(tmp_path).exists()
    assert load(copy.copy)["global_step"] == 1
    trainer = train(loco_root, tmp_path, ckpt_path=copy.copy, limit_train_batches=1).trainer
    assert (trainer.current_epoch, trainer.global_step) == (3, 3)


def test_a_kill_loses_no_more_than_the_interval(loco_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(loco_root), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr[-3000:]
    kept = load(resume_file(tmp_path))
    assert (kept["epoch"], kept["global_step"]) == (1, STEPS)  # and one more was done
    trainer = train(loco_root, tmp_path, ckpt_path=resume_file(tmp_path)).trainer
    assert (trainer.current_epoch, trainer.global_step) == (3, 3 * STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_fails(loco_root: Path, tmp_path: Path, rank: int) -> None:
    """Nobody waits for the one that has failed; the first process saves what it has, or has saved."""
    script = Path(__file__).with_name("resuming_ddp_run.py")
    command = [sys.executable, str(script), str(loco_root), str(tmp_path), str(rank)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode != 0
    assert "out of memory" in run.stderr, run.stderr[-3000:]
    kept = load(resume_file(tmp_path))["global_step"]  # there are 2 steps in an epoch
    assert kept == 3 if rank == 0 else kept in (2, 3)  # the other one is killed, or loses its connection and saves


def test_bad_weights_are_not_kept(loco_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The error is the training's own, and the file, where there is one, is from before."""
    with pytest.raises(ValueError, match="loss is nan"):
        train(loco_root, tmp_path, Within(spoil))
    assert not resume_file(tmp_path).exists()
    with pytest.raises(ValueError, match=r"weights .* are not finite"):
        train(loco_root, tmp_path, Within(spoil), KeepTraining(save_minutes=EVERY_STEP))
    assert load(resume_file(tmp_path, "v1"))["global_step"] == STEPS
    assert f"up to step {STEPS} is in" in caplog.text


@pytest.mark.parametrize("arguments", [{"callback": KeepTraining(save_minutes=0)}, {"fast_dev_run": True}])
def test_nothing_is_kept(loco_root: Path, tmp_path: Path, arguments: dict[str, Any]) -> None:
    callbacks = [arguments.pop("callback")] if "callback" in arguments else []

    class Fails(Tiny):
        def on_train_batch_end(self, *_) -> None:
            raise RuntimeError("out of memory")

    engine = Engine(callbacks, default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, **arguments)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.fit(Fails(), datamodule=data(loco_root))
    assert not list(tmp_path.rglob("resume.ckpt"))


def test_the_users_callback_takes_the_place_of_the_models(loco_root: Path, tmp_path: Path) -> None:
    """Also in a second training with the same engine."""
    own = KeepTraining(save_minutes=5)
    engine = train(loco_root, tmp_path, own, max_epochs=1)
    engine.test(engine.model, datamodule=data(loco_root))
    assert [each for each in engine.trainer.callbacks if isinstance(each, KeepTraining)] == [own]


def test_negative_minutes() -> None:
    with pytest.raises(ValueError, match="save_minutes must be at least 0, got -1"):
        KeepTraining(save_minutes=-1)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), Within(kill), KeepTraining(save_minutes=EVERY_STEP))
