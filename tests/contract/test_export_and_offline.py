"""Contract points 5 and 7: exported models agree, and nothing needs a network that need not."""

import socket
from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime
import openvino
import pytest
import timm
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.models import AnomalibModule
from cases import Case
from runs import Trained, quiet_engine, run_cli, write_model_config
from safetensors.torch import save_file

TOLERANCE = 1e-4  # of the map's range


@pytest.fixture
def restored(trained: Trained, model_class: type[AnomalibModule]) -> AnomalibModule:
    return model_class.load_from_checkpoint(trained.checkpoint).eval()


@pytest.fixture
def images(restored: AnomalibModule, loco_root: Path) -> torch.Tensor:
    paths = sorted((loco_root / "tray" / "test").glob("*/000.png"))
    return restored.pre_processor.transform(torch.stack([read_image(path, as_tensor=True) for path in paths]))


def agree(exported: dict[str, np.ndarray], eager: dict[str, torch.Tensor]) -> None:
    spread = float(eager["anomaly_map"].max() - eager["anomaly_map"].min())
    assert spread > 0
    for key in ("anomaly_map", "pred_score"):
        assert np.abs(exported[key].reshape(eager[key].shape) - eager[key].numpy()).max() < TOLERANCE * spread, key
    np.testing.assert_array_equal(exported["pred_label"].reshape(-1), eager["pred_label"].numpy().reshape(-1))


def test_exports(trained: Trained, restored: AnomalibModule, images: torch.Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        eager = restored(images)._asdict()
    size = f"[{images.shape[-2]},{images.shape[-1]}]"
    for kind in ("torch", "onnx"):
        run_cli(
            "export", "--config", write_model_config(trained), "--export_type", kind, "--ckpt_path", trained.checkpoint,
            "--export_root", tmp_path, "--input_size", size,
        )  # fmt: skip
    pickled = torch.load(tmp_path / "weights/torch/model.pt", weights_only=False)["model"].eval()
    with torch.no_grad():
        agree({key: value.numpy() for key, value in pickled(images)._asdict().items()}, eager)

    session = onnxruntime.InferenceSession(tmp_path / "weights/onnx/model.onnx")
    outputs = [output.name for output in session.get_outputs()]
    rows = [session.run(None, {session.get_inputs()[0].name: image[None].numpy()}) for image in images]
    agree({key: np.concatenate(parts) for key, parts in zip(outputs, zip(*rows, strict=True), strict=True)}, eager)


def test_anomalib_inferencers(
    restored: AnomalibModule, images: torch.Tensor, loco_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files exported without an input size take images of any size, also in Anomalib's own inferencers."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # what Anomalib asks for before it unpickles a model
    monkeypatch.chdir(tmp_path)  # OpenVINO's inferencer writes a cache into the working directory
    engine = quiet_engine(tmp_path)
    image = next((loco_root / "tray" / "test" / "logical_anomalies").iterdir())
    torch_file = engine.export(restored, ExportType.TORCH, export_root=tmp_path)
    xml_file = engine.export(restored, ExportType.OPENVINO, export_root=tmp_path)
    torch_score = TorchInferencer(torch_file, device="cpu").predict(str(image)).pred_score.item()
    openvino_score = OpenVINOInferencer(xml_file, device="CPU").predict(str(image)).pred_score.item()
    assert torch_score == pytest.approx(openvino_score, abs=1e-3)

    with torch.no_grad():
        eager = restored(images)._asdict()
    compiled = openvino.compile_model(xml_file, "CPU")
    results = [compiled(image[None].numpy()) for image in images]
    agree(
        {
            key: np.concatenate([result[key] for result in results])
            for key in ("anomaly_map", "pred_score", "pred_label")
        },
        eager,
    )


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
