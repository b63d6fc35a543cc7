"""What a model says about the arguments of a checkpoint, on one that trains in a moment."""

import re
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from tiny_model import TinyModel, TinyNet
from torch import nn
from torchvision.transforms.v2 import Compose, RandomHorizontalFlip, Resize

from anomalib_pack.checkpoints import FollowsCheckpoint
from anomalib_pack.data import MVTecLoco


class Net(TinyNet):
    """A network that takes any size."""

    def check_image_size(self, size):
        assert len(size) == 2


class Followed(FollowsCheckpoint, TinyModel):
    """The tiny model with arguments of all kinds."""

    without_effect = ("margin",)

    def __init__(
        self,
        layers=("one", "two"),
        power=3,
        margin=0.5,
        lr=1e-2,
        weights=None,
        width=4,
        pre_processor=True,
        post_processor=True,
    ):
        super().__init__(pre_processor, post_processor, evaluator=False)
        self.model = Net(width)
        self.lr = lr

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def engine(root: Path, **arguments) -> Engine:
    return Engine(default_root_dir=root, accelerator="cpu", enable_progress_bar=False, logger=False, **arguments)


def trained(loco: MVTecLoco, root: Path, **arguments) -> str:
    run = engine(root / "trained", max_epochs=1)
    run.fit(Followed(**arguments), datamodule=loco)
    return run.best_model_path


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "anomalib_pack.checkpoints"]


def test_arguments_that_change_results_are_named(
    loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = trained(loco, tmp_path)
    for same in ({}, {"layers": ["one", "two"]}, {"margin": 0.1, "lr": 1.0, "weights": "elsewhere.pth"}):
        engine(tmp_path).test(Followed(**same), datamodule=loco, ckpt_path=checkpoint)
        assert said(caplog) == []
    engine(tmp_path).test(Followed(layers=["one"], power=2), datamodule=loco, ckpt_path=checkpoint)
    [line] = said(caplog)
    assert "layers=('one', 'two') in the checkpoint, ['one'] here; power=3 in the checkpoint, 2 here." in line

    caplog.clear()
    assert Followed.load_from_checkpoint(checkpoint, power=2).hparams["power"] == 2  # given on purpose
    assert said(caplog) == []


def test_a_checkpoint_of_another_network_names_the_arguments(loco: MVTecLoco, tmp_path: Path) -> None:
    """In the error itself: the tensors' names alone say little."""
    checkpoint = trained(loco, tmp_path, width=8)
    expected = r"does not fit the arguments of Followed: width=8 in the checkpoint, 4 here\. .*size mismatch"
    for run in (
        lambda: engine(tmp_path).test(Followed(), datamodule=loco, ckpt_path=checkpoint),
        lambda: engine(tmp_path, max_epochs=2).fit(Followed(), datamodule=loco, ckpt_path=checkpoint),
    ):
        with pytest.raises(RuntimeError, match=re.compile(expected, re.DOTALL)):
            run()
    with pytest.raises(RuntimeError, match=r"^Error\(s\) in loading state_dict"):
        Followed().load_state_dict({"foreign": torch.zeros(1)})


def test_training_goes_on(loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All arguments count, but the optimizer's are in its state."""
    checkpoint, run = trained(loco, tmp_path), engine(tmp_path, max_epochs=2)
    run.fit(Followed(margin=0.1, lr=0.5, weights="x"), datamodule=loco, ckpt_path=checkpoint)
    optimizer, arguments = said(caplog)
    assert optimizer.endswith("goes on with its own values: lr=0.01 in the checkpoint, 0.5 here.")
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    assert "margin=0.5 in the checkpoint, 0.1 here." in arguments
    assert "weights" not in arguments


def test_the_size_of_a_checkpoint_stays_in_training(
    loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = trained(loco, tmp_path, pre_processor=Followed.configure_pre_processor((24, 40)))
    model = Followed()
    engine(tmp_path, max_epochs=2).fit(model, datamodule=loco, ckpt_path=checkpoint)
    assert loco.train_data[0].image.shape[-2:] == (24, 40)
    assert model.input_size == (24, 40)
    assert len(said(caplog)) == 1


def test_a_restored_model_has_the_checkpoints_pre_processor(
    loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = trained(loco, tmp_path, pre_processor=Followed.configure_pre_processor((24, 40)))
    assert Followed.load_from_checkpoint(checkpoint).input_size == (24, 40)
    assert said(caplog) == []  # nothing was given that could be overridden
    given = Followed.configure_pre_processor((16, 16))
    assert Followed.load_from_checkpoint(checkpoint, pre_processor=given).input_size == (24, 40)
    [line] = said(caplog)
    assert "Resize(size=[24, 40]" in line.split("instead of")[0]
    assert "Resize(size=[16, 16]" in line.split("instead of")[1]


def test_components_that_a_checkpoint_does_not_have(
    loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trained on images as they are: neither resized nor normalised afterwards."""
    checkpoint = trained(loco, tmp_path, pre_processor=False, post_processor=False)
    model, run = Followed(), engine(tmp_path)
    [first, *_] = run.predict(model, datamodule=loco, ckpt_path=checkpoint)
    assert first.anomaly_map.shape[-2:] == (64, 64)
    assert first.pred_score.min() > 1  # not normalised
    assert model.pre_processor is None
    first, second = said(caplog)
    assert "pre_processor is the checkpoint's, none, instead of the constructor's, Resize(size=[32, 32]" in first
    assert "post_processor is the checkpoint's, none" in second


def test_switches_of_the_post_processor(loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Anomalib takes the checkpoint's."""
    checkpoint = trained(loco, tmp_path)
    model = Followed(post_processor=PostProcessor(image_sensitivity=0.9))
    engine(tmp_path).test(model, datamodule=loco, ckpt_path=checkpoint)
    assert model.post_processor.image_sensitivity == 0.5
    [line] = said(caplog)
    before, after = line.split("instead of")
    assert "'image_sensitivity': 0.5" in before
    assert "'image_sensitivity': 0.9" in after


def test_a_transform_that_cannot_be_stored(loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The constructor's stays, where Anomalib would take none."""

    def custom() -> PreProcessor:
        return PreProcessor(transform=Compose([Resize((48, 48)), RandomHorizontalFlip(0.0)]))

    checkpoint = trained(loco, tmp_path, pre_processor=custom())
    model = Followed(pre_processor=custom())
    engine(tmp_path).test(model, datamodule=loco, ckpt_path=checkpoint)
    assert model.input_size == (48, 48)
    [line] = said(caplog)
    assert "does not hold the transform" in line


class Bare(nn.Module):
    """A pre-processor that is none of Anomalib's."""

    def forward(self, images):
        return images


def test_any_module_may_be_a_pre_processor(loco: MVTecLoco, tmp_path: Path) -> None:
    checkpoint = trained(loco, tmp_path, pre_processor=Bare())
    engine(tmp_path).test(Followed(pre_processor=Bare()), datamodule=loco, ckpt_path=checkpoint)


class Remembering(Followed):
    """The tiny model, one of whose arguments is state."""

    @property
    def trained_state(self):
        return {"power": self.power}

    def take_trained_state(self, state):
        self.power = state["power"]

    def __init__(self, power=3, lr=1e-2):
        super().__init__(power=power, lr=lr)
        self.power = power


def test_arguments_that_are_state_of_the_trained_model(
    loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint's win, which is said in one line, and are there in what is saved again."""
    run = engine(tmp_path / "trained", max_epochs=1)
    run.fit(Remembering(power=5), datamodule=loco)
    again = engine(tmp_path, max_epochs=2)
    model = Remembering()
    again.fit(model, datamodule=loco, ckpt_path=run.best_model_path)
    assert model.power == 5
    [line] = said(caplog)
    assert line == "The checkpoint's values are used, not the constructor's: power=5 instead of 3."
    saved = torch.load(again.best_model_path, weights_only=True)
    assert saved["trained_state"] == {"power": 5}
    assert saved["class_path"] == "test_checkpoints.Remembering"
    caplog.clear()
    assert Remembering.load_from_checkpoint(run.best_model_path).power == 5
    assert said(caplog) == []
