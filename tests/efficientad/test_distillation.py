"""Distillation from a folder of images: what it writes, how it goes on, what it says of bad input."""

import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.models.image.efficient_ad.torch_model import MediumPatchDescriptionNetwork, SmallPatchDescriptionNetwork
from kill_distillation import DISTIL
from lightning.pytorch.trainer.states import TrainerStatus
from PIL import Image
from waiting import TIMEOUT

from anomalib_efficientad.distillation import TeacherDistillation, command, distill
from anomalib_efficientad.images import ImageFiles, find_images

HERE = Path(__file__).parent


@dataclass
class Watch:
    """What a distillation does."""

    losses: list[float] = field(default_factory=list)
    module: TeacherDistillation | None = None


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    seen = Watch()

    class Watched(TeacherDistillation):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.losses.append(loss.item())
            seen.module = self
            return loss

    monkeypatch.setattr(command, "TeacherDistillation", Watched)
    return seen


def test_command(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It writes a file that Anomalib's network loads strictly, and shows what it is doing."""
    options = {**DISTIL, "layers": "[layer1,layer2]", "weights": "null", "images": photos, "size": "m", "steps": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["anomalib_efficientad", "distill", *words])
    monkeypatch.chdir(tmp_path)
    runpy.run_module("anomalib_efficientad", run_name="__main__")
    assert [path.name for path in tmp_path.iterdir()] == ["pretrained_teacher_medium.pth"]
    state = torch.load("pretrained_teacher_medium.pth", weights_only=True)
    MediumPatchDescriptionNetwork(8).load_state_dict(state, strict=True)
    output = "".join(capfd.readouterr())
    for label in ("Checking images", "Channel statistics", "loss"):
        assert label in output, label


def test_loss_falls(photos: Path, watch: Watch, tmp_path: Path) -> None:
    """And the teacher says what the pretrained network says, up to the normalisation."""
    out = tmp_path / "new" / "small.pth"
    distill(photos, out, steps=25, **(DISTIL | {"lr": 2e-3}))
    assert len(watch.losses) == 25
    assert np.mean(watch.losses[-5:]) < 0.7 * np.mean(watch.losses[:2])
    teacher = SmallPatchDescriptionNetwork(8, padding=True)
    teacher.load_state_dict(torch.load(out, weights_only=True), strict=True)
    assert sorted(path.name for path in out.parent.iterdir()) == ["small.pth"]  # the checkpoint has done its work


def test_same_seed_same_teacher(photos: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.pth" for name in "abc"]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        distill(photos, file, steps=1, seed=seed, **DISTIL)
    first, again, other = (torch.load(file, weights_only=True)["conv1.weight"] for file in files)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_goes_on_after_a_kill(photos: Path, watch: Watch, tmp_path: Path, monkeypatch) -> None:
    """The same command again, and no other: the steps go on, the statistics are not measured again."""
    out = tmp_path / "small.pth"
    script = [sys.executable, HERE / "kill_distillation.py", photos, out, "20", "4"]
    killed = subprocess.run(list(map(str, script)), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    checkpoint = torch.load(tmp_path / "small.pth.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert not any("backbone" in name for name in checkpoint["state_dict"])

    with pytest.raises(ValueError, match=r"distillation with \{'lr': 0\.0001\}"):
        distill(photos, out, steps=20, **(DISTIL | {"lr": 1e-3}))
    monkeypatch.setattr(TeacherDistillation, "_measure_statistics", lambda _: pytest.fail("measured again"))
    distill(photos, out, steps=20, **DISTIL)
    assert len(watch.losses) == 20 - 4
    assert watch.module.trainer.global_step == 20
    assert torch.equal(watch.module.feature_mean, checkpoint["state_dict"]["feature_mean"])
    adam = watch.module.trainer.optimizers[0]
    assert all(state["step"] == 20 for state in adam.state.values())


def test_stopped_by_hand(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Lightning swallows the interruption, no unfinished teacher is written and the checkpoint stays."""

    def fit(trainer, *_, **__) -> None:
        trainer.state.status = TrainerStatus.INTERRUPTED

    monkeypatch.setattr(command.Trainer, "fit", fit)
    checkpoint = tmp_path / "small.pth.ckpt"
    torch.save({"global_step": 1}, checkpoint)
    with pytest.raises(KeyboardInterrupt):
        distill(photos, tmp_path / "small.pth", steps=2, **DISTIL)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_optimiser() -> None:
    """Alg. 3, line 13, for the teacher alone."""
    module = TeacherDistillation(backbone="resnet18", weights=None)
    optimizer = module.configure_optimizers()
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-4, 1e-5)
    assert len(group["params"]) == len(list(module.teacher.parameters()))


def test_images_of_any_kind(tmp_path: Path) -> None:
    """Modes, formats, letter case, sizes, nested folders and links; other files are left alone."""
    nested, linked = tmp_path / "images" / "a" / "b", tmp_path / "elsewhere"
    nested.mkdir(parents=True)
    linked.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels)
    rgba.save(nested / "alpha.png")
    rgba.convert("L").save(nested / "gray.JPEG")
    rgba.convert("P").save(nested / "palette.png")
    rgba.convert("1").save(nested / "binary.tif")
    rgba.convert("CMYK").resize((301, 7)).save(linked / "print.jpg")
    (nested / "notes.txt").write_text("no image")
    (tmp_path / "images" / "link").symlink_to(linked)
    paths = find_images("images", tmp_path / "images")
    assert [path.name for path in paths] == ["alpha.png", "binary.tif", "gray.JPEG", "palette.png", "print.jpg"]
    images = ImageFiles(paths, lambda image: image)
    assert all(images[index].mode == "RGB" for index in range(len(images)))
    np.testing.assert_array_equal(np.asarray(images[0]), pixels[..., :3])
    distill(tmp_path / "images", tmp_path / "t.pth", steps=1, **(DISTIL | {"num_workers": 1}))


@pytest.mark.parametrize(("folder", "problem"), [("nowhere", "does not exist"), ("empty", "has no images")])
def test_no_images(tmp_path: Path, folder: str, problem: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"images must be .*{folder}.*{problem}"):
        distill(tmp_path / folder, tmp_path / "t.pth", **DISTIL)


def broken_copy(photos: Path, target: Path) -> Path:
    shutil.copytree(photos, target)
    broken = sorted(target.rglob("*.png"))[4]
    broken.write_bytes(broken.read_bytes()[:200])
    return broken


def test_unreadable_image(photos: Path, watch: Watch, tmp_path: Path) -> None:
    """Named before anything is trained."""
    broken = broken_copy(photos, tmp_path / "images")
    with pytest.raises(ValueError, match=str(broken)):
        distill(tmp_path / "images", tmp_path / "t.pth", **DISTIL)
    assert watch.losses == []


def test_unreadable_image_beyond_those_checked_beforehand(photos: Path, tmp_path: Path, monkeypatch) -> None:
    """Named when its turn comes, also by a worker."""
    monkeypatch.setattr("anomalib_efficientad.images.CHECKED_BEFOREHAND", 2)
    broken = broken_copy(photos, tmp_path / "images")
    with pytest.raises(ValueError, match=str(broken)):
        distill(tmp_path / "images", tmp_path / "t.pth", steps=60, **(DISTIL | {"num_workers": 1}))


def test_image_that_would_become_white(photos: Path, tmp_path: Path) -> None:
    paths = sorted(photos.rglob("*.png"))
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(deep)
    images = ImageFiles([paths[0], deep], np.asarray)
    assert images[0].dtype == np.uint8
    with pytest.raises(ValueError, match=f"{deep}: it has more than 8 bits per channel"):
        images[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("image_size", 66),
        ("image_size", 28),
        ("out_channels", 0),
        ("statistics_images", 0),
        ("lr", 0.0),
        ("weight_decay", -1.0),
        ("layers", ["layer9"]),
        ("backbone", "no_such_network"),
    ],
)
def test_impossible_values(photos: Path, tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        distill(photos, tmp_path / "t.pth", **(DISTIL | {name: value}))


def test_folder_as_output(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out must be a file"):
        distill(photos, tmp_path, **DISTIL)


def test_loss_that_is_not_a_number(photos: Path, tmp_path: Path) -> None:
    """The first step makes weights with which the second cannot count: no teacher, and the first one's checkpoint."""
    with pytest.raises(ValueError, match=r"loss is (nan|inf)\. Check"):
        distill(photos, tmp_path / "t.pth", **(DISTIL | {"lr": 1e37, "steps": 20}))
    assert [path.name for path in tmp_path.iterdir()] == ["t.pth.ckpt"]
    kept = torch.load(tmp_path / "t.pth.ckpt", weights_only=True)
    assert kept["global_step"] == 1
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_failure_between_two_checkpoints(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The steps since the last checkpoint are kept, and the same command goes on after them."""

    class Failing(TeacherDistillation):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(command, "TeacherDistillation", Failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        distill(photos, tmp_path / "t.pth", **(DISTIL | {"steps": 100}))  # a checkpoint after every fifth step
    assert torch.load(tmp_path / "t.pth.ckpt", weights_only=True)["global_step"] == 3
    assert "t.pth.ckpt. Go on with the same command." in caplog.text
