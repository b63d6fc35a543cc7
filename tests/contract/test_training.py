"""Contract points 1, 4, 6, 8 and 9: training, checkpoints, repeatability, bad input."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder
from anomalib.models import AnomalibModule
from cases import Case
from lightning.pytorch import Callback
from PIL import Image
from runs import SEED, Trained, quiet_engine, run_cli, run_command, write_config
from waiting import TIMEOUT

from anomalib_pack.data import MVTecLoco

HERE = Path(__file__).parent


def loco_batch(datamodule: MVTecLoco, model: AnomalibModule) -> torch.Tensor:
    datamodule.setup()
    dataset = datamodule.test_data
    return torch.stack([model.pre_processor.transform(dataset[index].image) for index in range(0, len(dataset), 3)])


def same_state(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(value, right[key], atol=0, rtol=0, equal_nan=True, msg=key)


def test_command_trains_and_tests(trained: Trained, case: Case) -> None:
    assert trained.checkpoint.is_file()
    assert (trained.folder / "config.yaml").is_file()
    for metric in ("image_AUROC", "image_AUROC_logical_anomalies", "image_AUROC_structural_anomalies", "pixel_AUPRO"):
        assert metric in trained.output
    pictures = sorted(path.parent.name for path in trained.folder.glob("images/**/*.png"))
    assert pictures == 4 * ["good"] + 4 * ["logical_anomalies"] + 4 * ["structural_anomalies"]
    for label in case.progress:
        assert label in trained.output


def test_command_repeats_itself(trained: Trained, tmp_path: Path) -> None:
    """Same configuration, same machine: the same model, in another process."""
    run_cli("fit", "--config", trained.config, "--default_root_dir", tmp_path)
    again = next(tmp_path.glob("**/v0/**/model.ckpt"))
    same_state(load(trained.checkpoint)["state_dict"], load(again)["state_dict"])


def load(checkpoint: Path) -> dict:
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def test_checkpoint_predicts_the_same(
    trained: Trained, model_class: type[AnomalibModule], loco: MVTecLoco, tmp_path: Path
) -> None:
    """Bit-equal before saving and after loading, without unpickling anything but tensors and plain data."""
    model = model_class.load_from_checkpoint(trained.checkpoint, weights_only=True).eval()
    engine = quiet_engine(tmp_path, max_epochs=model.trainer_arguments.get("max_epochs", 1))
    engine.fit(model, datamodule=loco)
    batch = loco_batch(loco, model)
    restored = model_class.load_from_checkpoint(engine.best_model_path, weights_only=True).eval()
    with torch.no_grad():
        for ours, theirs in zip(model.eval()(batch), restored(batch), strict=True):
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_gradients(model: AnomalibModule) -> None:
    """Every trainable parameter learns, no frozen one does."""
    network = model.model.train()
    if not list(network.parameters()) or not any(p.requires_grad for p in network.parameters()):
        return
    images = torch.rand(2, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
    outputs = model.loss(network(images))
    loss = torch.stack(list(outputs.values())).sum() if isinstance(outputs, dict) else outputs
    assert loss.ndim == 0
    assert loss.isfinite()
    loss.backward()
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
        else:
            assert parameter.grad is None, key


def test_a_planted_defect_outscores_normal_images(
    trained: Trained, model_class: type[AnomalibModule], loco: MVTecLoco
) -> None:
    model = model_class.load_from_checkpoint(trained.checkpoint).eval()
    loco.setup()
    normal = torch.stack([loco.val_data[index].image for index in range(len(loco.val_data))])
    normal = model.pre_processor.transform(normal)
    height, width = normal.shape[-2:]
    top, left = height // 3, width // 3
    defect = normal.clone()
    defect[..., top : top + height // 6, left : left + width // 6] = torch.tensor([0.9, 0.1, 0.9]).view(3, 1, 1)
    with torch.no_grad():
        scores, result = model.model(normal).pred_score, model.model(defect)
    assert result.pred_score.min() > scores.max()
    inside = result.anomaly_map[..., top : top + height // 6, left : left + width // 6].mean()
    assert inside > result.anomaly_map.mean()


def test_resumes_after_a_kill(trained: Trained, name: str, case: Case, loco_root: Path, tmp_path: Path) -> None:
    """Killed in its second epoch, resumed from last.ckpt: the epochs, steps and optimiser go on where they were."""
    checkpoints = {
        "class_path": "anomalib.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(tmp_path / "checkpoints"), "save_last": True},
    }
    keep = {"class_path": "anomalib_pack.resuming.KeepTraining", "init_args": {"save_minutes": 1e-9}}  # each step
    callbacks = [checkpoints, keep, {"class_path": "kill.KillInSecondEpoch"}]
    config = write_config(tmp_path / "c.yaml", name, case, loco_root, tmp_path, callbacks=callbacks, max_epochs=2)
    killed = run_command("fit", "--config", config, PYTHONPATH=str(HERE))
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    before = load(last)
    assert before["epoch"] == 0
    resume = load(next(tmp_path.rglob("resume.ckpt")))
    assert (resume["epoch"], resume["global_step"]) == (1, before["global_step"] + 1)

    config = write_config(tmp_path / "c.yaml", name, case, loco_root, tmp_path, callbacks=[checkpoints], max_epochs=2)
    engine = run_cli("fit", "--config", config, "--ckpt_path", last).engine
    assert engine.trainer.current_epoch == 2
    assert engine.trainer.global_step == 2 * before["global_step"]
    saved = before["optimizer_states"][0]["state"].values()
    for state, earlier in zip(engine.trainer.optimizers[0].state.values(), saved, strict=True):
        assert state["step"] == 2 * earlier["step"]
    after = engine.model.state_dict()
    for key in case.statistics:
        torch.testing.assert_close(after[key], before["state_dict"][key], atol=0, rtol=0)


class Interrupt(Callback):
    """Presses Ctrl+C in the second epoch, before its second batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise KeyboardInterrupt


def test_resumes_after_an_interruption(
    model: AnomalibModule, model_class: type[AnomalibModule], case: Case, loco: MVTecLoco, tmp_path: Path
) -> None:
    """Interrupted in its second epoch, resumed from the file that names itself: no step is lost or done twice."""
    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores it afterwards
    with pytest.raises(SystemExit):
        quiet_engine(tmp_path, max_epochs=2, callbacks=[Interrupt()]).fit(model, datamodule=loco)
    signal.signal(signal.SIGINT, handler)
    kept = next(tmp_path.rglob("v0/weights/lightning/resume.ckpt"))
    before = load(kept)
    engine = quiet_engine(tmp_path, max_epochs=2)
    engine.fit(model_class(**case.arguments), datamodule=loco, ckpt_path=kept)
    assert engine.trainer.current_epoch == 2
    assert engine.trainer.global_step == 2 * (before["global_step"] - 1)
    for key in case.statistics:
        torch.testing.assert_close(engine.model.state_dict()[key], before["state_dict"][key], atol=0, rtol=0)
    assert [path.name for path in tmp_path.rglob("v1/weights/lightning/*")] == ["model.ckpt"]


def test_two_processes_measure_what_one_does(
    trained: Trained, name: str, case: Case, loco_root: Path, tmp_path
) -> None:
    """Training statistics, and everything that validation measures for given weights."""
    results = {}
    for devices in (1, 2):
        output = tmp_path / f"{devices}.pt"
        command = [sys.executable, HERE / "ddp.py", name, loco_root, trained.checkpoint, output, str(devices)]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        results[devices] = load(output)
    for part in ("trained", "validated"):
        one, two = results[1][part], results[2][part]
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=1e-5, equal_nan=True, msg=f"{part} {key}")


def test_seeds_decide(model_class: type[AnomalibModule], case: Case) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return model_class(**case.arguments).state_dict()

    same_state(state(SEED), state(SEED))
    with pytest.raises(AssertionError):
        same_state(state(SEED), state(SEED + 1))


def copy_of(loco_root: Path, target: Path) -> Path:
    shutil.copytree(loco_root / "tray", target / "tray")
    return target


@pytest.mark.parametrize("split", ["train", "validation"])
def test_unreadable_image(model: AnomalibModule, loco_root: Path, tmp_path: Path, split: str) -> None:
    root = copy_of(loco_root, tmp_path)
    broken = root / "tray" / split / "good" / "002.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=str(broken)):
        fit_on(model, root, tmp_path)


def fit_on(model: AnomalibModule, root: Path, results: Path) -> None:
    datamodule = MVTecLoco(root=root, category="tray", train_batch_size=4, eval_batch_size=4, num_workers=0)
    quiet_engine(results / "results", max_epochs=1).fit(model, datamodule=datamodule)


def test_image_that_anomalib_misreads(model: AnomalibModule, tmp_path: Path) -> None:
    """Anomalib's prediction from a folder would take an image of 16 bits for white; tests/data has the rest."""
    image = tmp_path / "photos" / "000.png"
    image.parent.mkdir()
    Image.fromarray(np.full((64, 64), 4095, dtype=np.uint16)).save(image)
    with pytest.raises(OSError, match=f"Cannot read {image}: it has 16 bits per channel"):
        quiet_engine(tmp_path / "results").predict(model, data_path=image.parent)


def test_empty_training_set(model: AnomalibModule, loco_root: Path, tmp_path: Path) -> None:
    root = copy_of(loco_root, tmp_path)
    for image in (root / "tray" / "train" / "good").iterdir():
        image.unlink()
    with pytest.raises((ValueError, RuntimeError), match=str(root / "tray" / "train")):
        fit_on(model, root, tmp_path)


def test_validation_without_normal_images(model: AnomalibModule, loco_root: Path, tmp_path: Path) -> None:
    folders = {"normal_dir": "train/good", "abnormal_dir": "test/logical_anomalies"}
    data = Folder("tray", root=loco_root / "tray", **folders, num_workers=0, val_split_mode="none")
    with pytest.raises(ValueError, match="no normal images"):
        quiet_engine(tmp_path, max_epochs=1).fit(model, datamodule=data)


def test_loss_that_is_not_a_number(model: AnomalibModule, loco_root: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"loss is nan .*\.png"):
        fit_on(model, loco_root, tmp_path)


class Spoil(Callback):
    """Makes the weights NaN in the second epoch, before its second batch or after its last step."""

    def __init__(self, after_the_last: bool) -> None:
        self.after_the_last = after_the_last
        self.images: list[str] = []  # of the batch that is to be named
        self.validated = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1 and not self.after_the_last:
            self.images = batch.image_path
            self.spoil(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.current_epoch == 1 and self.after_the_last:
            self.images = batch.image_path if outputs else self.images  # not of a batch that was left out
            if trainer.is_last_batch:
                self.spoil(pl_module)

    def spoil(self, module: AnomalibModule) -> None:
        with torch.no_grad():
            for parameter in module.model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(float("nan"))

    def on_validation_start(self, trainer, pl_module) -> None:
        self.validated += 1


@pytest.mark.parametrize("after_the_last", [False, True], ids=["loss", "weights"])
def test_bad_weights_never_replace_good_ones(
    model: AnomalibModule, loco: MVTecLoco, tmp_path: Path, after_the_last: bool
) -> None:
    """Where a loss or a gradient breaks, the training ends, names the images, and leaves the last good checkpoint."""
    spoil, checkpoints = Spoil(after_the_last), ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    engine = quiet_engine(tmp_path, max_epochs=3, callbacks=[spoil, checkpoints])
    with pytest.raises(ValueError, match="weights .* are not finite" if after_the_last else "loss is nan") as failure:
        engine.fit(model, datamodule=loco)
    assert f"on the images {spoil.images}." in str(failure.value)
    assert spoil.validated == 1
    kept = [load(path) for path in (tmp_path / "checkpoints").iterdir()]
    assert kept
    for checkpoint in kept:
        assert checkpoint["epoch"] == 0
        assert all(checkpoint["state_dict"][f"model.{key}"].isfinite().all() for key in model.model.state_dict())


def test_uniform_images(model: AnomalibModule, loco_root: Path, tmp_path: Path) -> None:
    """A training set without any variation gives no NaN, but a warning that names the images."""
    root = copy_of(loco_root, tmp_path)
    for split in ("train", "validation"):
        for image in (root / "tray" / split / "good").iterdir():
            Image.fromarray(np.full((64, 64, 3), 128, dtype=np.uint8)).save(image)
    with pytest.warns(UserWarning, match=f"of one colour everywhere, .*{root}/tray/train/good/000.png"):
        fit_on(model, root, tmp_path)
    assert all(value.isfinite().all() for value in model.model.state_dict().values())
