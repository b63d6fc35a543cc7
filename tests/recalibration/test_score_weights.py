"""Weights of scores: chosen where that pays on images that did not choose them, and then state of the model."""

import logging
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from recalibration_cases import Folders
from sklearn.metrics import roc_auc_score
from torch import Tensor

from anomalib_pack.data import MVTecLoco
from anomalib_pack.recalibration.command import run
from anomalib_pack.recalibration.weights import auroc, choose, grid
from anomalib_pack.restoring import model_from_checkpoint, read_checkpoint
from anomalib_unislad import Unislad


def weighed(weights: tuple[float, ...], parts: Tensor) -> Tensor:
    return (1 - weights[0]) * parts[:, 0] + weights[0] * parts[:, 1]


def parts(count: int, shifts: tuple[float, float], seed: int) -> Tensor:
    return torch.tensor(shifts) + torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def test_auroc_with_equal_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randint(0, 6, (3, 20), generator=generator).float()
    anomalous = torch.randint(2, 8, (3, 9), generator=generator).float()
    truth = [0] * 20 + [1] * 9
    expected = [roc_auc_score(truth, torch.cat(pair)) for pair in zip(normal, anomalous, strict=True)]
    torch.testing.assert_close(auroc(normal, anomalous), torch.tensor(expected), check_dtype=False)


def test_all_weights_are_tried() -> None:
    assert len(grid(3)) == len(set(grid(3))) == 11**3
    assert {weight for weights in grid(2) for weight in weights} == {step / 10 for step in range(11)}


@pytest.mark.parametrize("count", [8, 40])
def test_a_part_that_finds_the_anomalies(count: int) -> None:
    """The other one is noise: its weight falls, and that is worth more than the spread."""
    choice = choose(weighed, (0.0,), parts(count, (0, 0), 1), parts(count, (0, 4), 2))
    assert choice.pays
    assert choice.weights[0] >= 0.2  # the nearest of those that are the best
    assert choice.after > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_mistaken_for_a_gain(seed: int) -> None:
    """Weights that are the best on few images are not better on others."""
    images = parts(8, (0, 0), seed), parts(8, (0.5, 0.5), seed + 50)
    choice = choose(weighed, (0.5,), *images)
    best, now = (auroc(*(weighed(weights, rows)[None] for rows in images)) for weights in (choice.weights, (0.5,)))
    assert best >= now
    assert not choice.pays


def test_the_nearest_of_equally_good_weights() -> None:
    choice = choose(weighed, (0.33,), parts(8, (0, 0), 1), parts(8, (99, 99), 2))
    assert choice.weights == (0.33,)
    assert not choice.pays


@pytest.fixture(scope="module")
def misled(loco_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of an Unislad whose patch score has its sign turned, so that only other weights are of use."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("unislad")
    model = Unislad(
        "resnet18",
        ["layer1.0", "layer2.1"],
        "test_vit",
        2,
        weights=None,
        vit_weights=None,
        local_dim=16,
        index="flat",
        pre_processor=Unislad.configure_pre_processor((64, 64)),
        visualizer=False,
    )
    engine = Engine(default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(model, datamodule=MVTecLoco(root=loco_root, category="tray", num_workers=0))
    checkpoint = read_checkpoint(engine.best_model_path)
    checkpoint["state_dict"]["model.score_std"][3] *= -0.01
    torch.save(checkpoint, root / "misled.ckpt")
    return root / "misled.ckpt"


def weights_in(checkpoint: Path) -> dict[str, float]:
    """Weights that a checkpoint has as state."""
    state = read_checkpoint(checkpoint)["trained_state"]
    return {name: state[name] for name in ("w_i", "w_ig", "w")}


def test_weights_are_chosen(
    misled: Path,
    folders: Folders,
    loco: MVTecLoco,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    """They are in the checkpoint, and win over the constructor's, which is said in one line."""
    new, folder = tmp_path / "new.ckpt", ["--normal", str(folders.normal), "--anomalous", str(folders.anomalous)]
    capsys.readouterr()  # what the training printed
    assert run(["--ckpt_path", str(misled), *folder, "--weights", "--out", str(new)]) == 0
    chosen = weights_in(new)
    assert capsys.readouterr().out.startswith(
        f"Weights w_i {chosen['w_i']:g}, w_ig {chosen['w_ig']:g}, w {chosen['w']:g} in place of w_i 0.5"
    )
    assert chosen["w"] == 0
    assert model_from_checkpoint(new).settings == chosen
    old = read_checkpoint(misled)
    kept = {name: value for name, value in old["state_dict"].items() if "post_processor" not in name}
    for name, value in kept.items():
        assert torch.equal(read_checkpoint(new)["state_dict"][name], value), name
    assert read_checkpoint(new)["hyper_parameters"] == old["hyper_parameters"]

    model = Unislad(
        **old["hyper_parameters"] | {"w": 0.9},
        visualizer=False,
        pre_processor=Unislad.configure_pre_processor((64, 64)),
    )
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    with caplog.at_level(logging.WARNING, "anomalib_pack"):
        engine.test(model, datamodule=loco, ckpt_path=new)
    assert model.settings == chosen
    said = [record.message for record in caplog.records if record.name.startswith("anomalib_pack")]
    assert [line for line in said if "values are used" in line] == said  # nothing is measured anew
    assert f"w={chosen['w']} instead of 0.9" in said[-1]
    model.setup("predict")  # as the next run does, with the tiles of the checkpoint
    assert model.trained_state.items() >= chosen.items()
    model.take_trained_state({"tiles": None})  # of a checkpoint for which none were chosen
    assert model.settings == {"w_i": 0.5, "w_ig": 0.5, "w": 0.9}

    capsys.readouterr()  # what the test printed
    assert run(["--ckpt_path", str(new), *folder, "--weights", "--out", str(tmp_path / "again.ckpt")]) == 0
    assert capsys.readouterr().out.startswith(f"Weights stay w_i {chosen['w_i']:g}")
    assert weights_in(tmp_path / "again.ckpt") == chosen


def test_too_few_images(misled: Path, folders: Folders, tmp_path: Path) -> None:
    few = ["--normal", str(folders.validation), "--anomalous", str(folders.anomalous)]
    with pytest.raises(ValueError, match="at least 8 normal and 8 anomalous images, got 5 and 8"):
        run(["--ckpt_path", str(misled), *few, "--weights", "--out", str(tmp_path / "new.ckpt")])
