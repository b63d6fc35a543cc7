"""Contract point 7: nothing needs a network that need not, and weights come from where the user says."""

import socket
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from anomalib.data.utils import read_image
from anomalib.models import AnomalibModule
from cases import Case
from runs import Trained, quiet_engine
from safetensors.torch import save_file


@pytest.fixture
def restored(trained: Trained, model_class: type[AnomalibModule]) -> AnomalibModule:
    return model_class.load_from_checkpoint(trained.checkpoint).eval()


@pytest.fixture
def images(restored: AnomalibModule, loco_root: Path) -> torch.Tensor:
    paths = sorted((loco_root / "tray" / "test").glob("*/000.png"))
    return restored.pre_processor.transform(torch.stack([read_image(path, as_tensor=True) for path in paths]))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Attempts to reach a network, each of which fails."""
    attempts: list[object] = []

    def refuse(*arguments: object, **_keywords: object) -> None:
        attempts.append(arguments)
        raise OSError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


def test_no_network_is_needed(
    trained: Trained,
    model_class: type[AnomalibModule],
    case: Case,
    loco,
    images: torch.Tensor,
    no_network: list[object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Building with any weights, restoring a checkpoint and training on local weights ask no server."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # conftest.py sets it: asking must show
    model_class()
    restored = model_class.load_from_checkpoint(trained.checkpoint, weights="hub").eval()
    with torch.no_grad():
        restored(images)
    fit(model_class(**case.arguments), loco, tmp_path)
    assert no_network == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_weights(model_class: type[AnomalibModule], case: Case, loco, tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    state = timm.create_model(case.arguments["backbone"]).state_dict()
    file = tmp_path / f"weights{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    model = model_class(**(case.arguments | {"weights": file}))
    checkpoint = fit(model, loco, tmp_path)
    assert model_class.load_from_checkpoint(checkpoint).hparams["weights"] == str(file)
    ours = model.model.state_dict()
    loaded = {key: value for key, value in ours.items() if key.startswith("backbone.")}
    assert loaded
    for key, value in loaded.items():
        torch.testing.assert_close(value, state[key.removeprefix("backbone.network.")], atol=0, rtol=0)


def fit(model: AnomalibModule, datamodule, root: Path) -> str:
    engine = quiet_engine(root, max_epochs=1)
    engine.fit(model, datamodule=datamodule)
    return engine.best_model_path


def test_missing_weights(model_class: type[AnomalibModule], case: Case, loco, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.pth"
    with pytest.raises(FileNotFoundError, match=str(missing)):
        fit(model_class(**(case.arguments | {"weights": str(missing)})), loco, tmp_path)


def test_weights_of_another_network(model_class: type[AnomalibModule], case: Case, loco, tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save({"foreign.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"foreign\.weight"):
        fit(model_class(**(case.arguments | {"weights": str(file)})), loco, tmp_path)
