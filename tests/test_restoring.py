"""Building a model from a checkpoint file: whose class may be named by it, and what is said where it cannot be."""

from pathlib import Path

import pytest
import torch
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from small_patchcore import trained_patchcore

from anomalib_pack.post_processing import RankPreservingPostProcessor
from anomalib_pack.restoring import model_class_of, model_from_checkpoint, read_checkpoint


@pytest.fixture(scope="module")
def patchcore(loco_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of Anomalib's Patchcore with the pack's post-processor."""
    post_processor = RankPreservingPostProcessor(image_quantile=0.9)
    return trained_patchcore(loco_root, tmp_path_factory.mktemp("patchcore"), post_processor, size=(64, 96))


@pytest.mark.parametrize("name", ["Patchcore", "patchcore", "anomalib.models.Patchcore", Patchcore])
@torch.no_grad()
def test_a_model_of_anomalib_is_named(patchcore: Path, name: str | type) -> None:
    model = model_from_checkpoint(patchcore, name)
    assert type(model) is Patchcore
    assert model.hparams["layers"] == ["layer1"]
    assert model.input_size == (64, 96)
    assert not model.training
    assert model.post_processor.image_quantile == 0.9
    assert model(torch.rand(1, 3, 50, 50)).anomaly_map.shape[-2:] == (64, 96)


def test_nothing_is_downloaded(patchcore: Path, tmp_path: Path) -> None:
    """The trained weights that the constructor would ask the hub for are in the checkpoint."""
    checkpoint = read_checkpoint(patchcore)
    checkpoint["hyper_parameters"]["pre_trained"] = True
    torch.save(checkpoint, tmp_path / "trained.ckpt")
    model_from_checkpoint(tmp_path / "trained.ckpt", "Patchcore")


def test_a_checkpoint_that_does_not_say_its_class(patchcore: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.ckpt does not say its class: name the model, e\.g\. model='Patchcore' or --model"
    ):
        model_from_checkpoint(patchcore)
    with pytest.raises(ValueError, match=r"There is no model Pathcore\. .* are AiVad, .*Unislad"):
        model_from_checkpoint(patchcore, "Pathcore")


@pytest.mark.parametrize("path", ["os.system", "anomalib_pack.restoring.read_checkpoint", "tiny_model.TinyModel", 3])
def test_only_registered_models_are_built(path: str | int) -> None:
    with pytest.raises(ValueError, match=f"x.ckpt says {path}, which is not registered with Anomalib"):
        model_class_of({"class_path": path}, "x.ckpt")


def test_a_name_may_not_contradict_the_checkpoint() -> None:
    checkpoint = {"class_path": "anomalib_ulsad.lightning_model.Ulsad"}
    assert model_class_of(checkpoint, "x.ckpt") is model_class_of(checkpoint, "x.ckpt", "Ulsad")
    with pytest.raises(ValueError, match=r"x\.ckpt is of anomalib_ulsad\.lightning_model\.Ulsad, not of anomalib\.m"):
        model_class_of(checkpoint, "x.ckpt", Patchcore)


def test_files_that_are_no_checkpoints(patchcore: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.ckpt"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*file\.ckpt"):
        read_checkpoint(file)
    for content in (b"", b"text", patchcore.read_bytes()[:5000]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"file\.ckpt is not a checkpoint, or only a part of one"):
            read_checkpoint(file)
    torch.save({"state_dict": PreProcessor()}, file)
    with pytest.raises(ValueError, match=r"file\.ckpt cannot be read as a checkpoint: Weights only load failed"):
        read_checkpoint(file)
    torch.save({"weights": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"file\.ckpt is not a checkpoint of a model"):
        read_checkpoint(file)
