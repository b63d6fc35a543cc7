"""Testing a checkpoint with other quantiles and weights than those that it was measured with (Figure 8)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import settings_ddp_run
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from lightning import seed_everything
from settings_ddp_run import SMALL
from torch.utils.data import DataLoader
from waiting import TIMEOUT

from anomalib_pack.data import MVTecLoco
from anomalib_ulsad import Ulsad

STATISTICS = (
    *("model.structural_quantiles", "model.logical_quantiles"),
    *("post_processor._image_threshold", "post_processor._pixel_threshold"),
    *("post_processor.image_min", "post_processor.image_max", "post_processor.pixel_min", "post_processor.pixel_max"),
)
CHANGES = [{"alpha": 0.5, "beta": 0.9}, {"lambda_l": 0.0, "lambda_g": 3.0}]
MEASURING = "Measuring quantiles"


def engine(root: Path, **arguments) -> Engine:
    return Engine(default_root_dir=root, accelerator="cpu", enable_progress_bar=False, **arguments)


def statistics(model: Ulsad) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: state[name] for name in STATISTICS}


@pytest.fixture(scope="module")
def checkpoint(loco_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    seed_everything(0)
    datamodule = MVTecLoco(root=loco_root, category="tray", train_batch_size=4, eval_batch_size=4, num_workers=0)
    trainer = engine(tmp_path_factory.mktemp("trained"), max_epochs=1)
    trainer.fit(Ulsad(**SMALL), datamodule=datamodule)
    return Path(trainer.best_model_path)


def validated(checkpoint: Path, loco: MVTecLoco, root: Path, **changes: float) -> Ulsad:
    """Reference: the weights in a model with other values, which is validated."""
    model = Ulsad(**SMALL, **changes)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    engine(root).validate(model, datamodule=loco)
    return model


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_other_values_are_measured_before_the_test(
    checkpoint: Path, loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, float]
) -> None:
    model = Ulsad(**SMALL, **changes)
    metrics = engine(tmp_path / "tested").test(model, datamodule=loco, ckpt_path=checkpoint)
    [line] = [message for message in caplog.messages if MEASURING in message]
    assert all(f"{name}={value:g}" in line for name, value in changes.items())

    expected = validated(checkpoint, loco, tmp_path / "validated", **changes)
    torch.testing.assert_close(statistics(model), statistics(expected), atol=0, rtol=0)
    assert metrics == engine(tmp_path / "expected").test(expected, datamodule=loco)
    with torch.no_grad():
        maps = expected.model.eval().raw_maps(torch.stack([item.image for item in loco.val_data]))
    probabilities = (changes.get("alpha", 0.9), changes.get("beta", 0.995))
    measured_quantiles = (model.model.structural_quantiles, model.model.logical_quantiles)
    for measured, values in zip(measured_quantiles, maps[:2], strict=True):
        np.testing.assert_allclose(measured, np.quantile(values.numpy(), probabilities), rtol=1e-4)
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    with pytest.raises(AssertionError):  # the values make a difference
        torch.testing.assert_close(statistics(model), {name: stored[name] for name in STATISTICS})


def test_the_same_values_are_not_measured_again(
    checkpoint: Path, loco: MVTecLoco, loco_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Ulsad(**SMALL)
    engine(tmp_path, limit_test_batches=1).test(model, datamodule=loco, ckpt_path=checkpoint)
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, stored[name], atol=0, rtol=0)
    engine(tmp_path).predict(model, dataset=images(loco_root), ckpt_path=checkpoint)  # and needs no validation data
    assert MEASURING not in caplog.text


def test_a_model_restored_with_other_values(checkpoint: Path, loco: MVTecLoco, tmp_path: Path) -> None:
    """``load_from_checkpoint`` overwrites the checkpoint's hyper-parameters with its own arguments."""
    model = Ulsad.load_from_checkpoint(checkpoint, alpha=0.5, beta=0.9)
    runs = engine(tmp_path / "tested", limit_test_batches=1)
    runs.test(model, datamodule=loco)
    expected = validated(checkpoint, loco, tmp_path / "validated", alpha=0.5, beta=0.9)
    torch.testing.assert_close(statistics(model), statistics(expected), atol=0, rtol=0)

    runs.trainer.save_checkpoint(tmp_path / "measured.ckpt")
    assert Ulsad.load_from_checkpoint(tmp_path / "measured.ckpt").measured_with == model.settings


def images(loco_root: Path) -> PredictDataset:
    return PredictDataset(loco_root / "tray" / "test" / "good", image_size=(256, 256))


def test_prediction(checkpoint: Path, loco: MVTecLoco, loco_root: Path, tmp_path: Path) -> None:
    """Of images alone it cannot measure anything, of a datamodule's test images it can."""
    model = Ulsad(**SMALL, alpha=0.5)
    with pytest.raises(ValueError, match=r"alpha=0\.9, but the model has alpha=0\.5.*datamodule"):
        engine(tmp_path).predict(model, dataset=images(loco_root), ckpt_path=checkpoint)
    runs = engine(tmp_path / "predicted", limit_predict_batches=1)
    [batch] = runs.predict(model, datamodule=loco, ckpt_path=checkpoint)
    expected = validated(checkpoint, loco, tmp_path / "validated", alpha=0.5)
    torch.testing.assert_close(statistics(model), statistics(expected), atol=0, rtol=0)
    [other] = runs.predict(expected, datamodule=loco)
    torch.testing.assert_close(batch.anomaly_map, other.anomaly_map, atol=0, rtol=0)


def test_validation_data_that_is_not_there(checkpoint: Path, loco: MVTecLoco, loco_root: Path, tmp_path: Path) -> None:
    model, message = Ulsad(**SMALL, lambda_l=0.0), r"lambda_l=0\.5, but the model has lambda_l=0\."
    with pytest.raises(ValueError, match=message):
        engine(tmp_path, limit_val_batches=0).test(model, datamodule=loco, ckpt_path=checkpoint)
    runs = engine(tmp_path, limit_test_batches=1)
    runs.test(model, datamodule=loco, ckpt_path=checkpoint)
    loader = DataLoader(loco.test_data, batch_size=4, collate_fn=loco.test_data.collate_fn)
    with pytest.raises(ValueError, match=message):  # the datamodule of the run before does not count
        runs.test(model, dataloaders=loader, ckpt_path=checkpoint)
    without = Folder(
        "tray",
        root=loco_root / "tray",
        normal_dir="train/good",
        abnormal_dir="test/logical_anomalies",
        num_workers=0,
        val_split_mode="none",
    )
    with pytest.raises(ValueError, match=message):
        engine(tmp_path).test(model, datamodule=without, ckpt_path=checkpoint)


def test_the_command(checkpoint: Path, loco: MVTecLoco, loco_root: Path, tmp_path: Path) -> None:
    arguments = {
        "model": "Ulsad",
        **{f"model.{name}": value for name, value in SMALL.items() if value is not None},
        "model.weights": "null",
        "model.alpha": 0.5,
        "model.beta": 0.9,
        "data": "MVTecLoco",
        "data.root": loco_root,
        "data.category": "tray",
        "data.num_workers": 0,
        "data.eval_batch_size": 4,
        "ckpt_path": checkpoint,
        "trainer.accelerator": "cpu",
        "trainer.limit_test_batches": 1,
        "default_root_dir": tmp_path / "command",
    }
    cli = AnomalibCLI(["test", *(f"--{name}={value}" for name, value in arguments.items())])
    expected = validated(checkpoint, loco, tmp_path / "validated", alpha=0.5, beta=0.9)
    torch.testing.assert_close(statistics(cli.model), statistics(expected), atol=0, rtol=0)


def test_two_processes(checkpoint: Path, loco_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, settings_ddp_run.__file__, loco_root, checkpoint, tmp_path, "2"]
    subprocess.run(list(map(str, command)), env=os.environ, check=True, capture_output=True, timeout=TIMEOUT)
    two = torch.load(tmp_path / "found.pt", weights_only=True)
    one, _ = settings_ddp_run.run(loco_root, checkpoint, tmp_path / "one", devices=1)
    torch.testing.assert_close(two["state"], one["state"], atol=1e-6, rtol=1e-5)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
