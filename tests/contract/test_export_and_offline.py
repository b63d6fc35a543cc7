"""Contract points 5 and 7: exported models agree, and nothing needs a network that need not."""

import socket
from pathlib import Path
from types import SimpleNamespace

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
from PIL import Image
from runs import Trained, quiet_engine, run_cli, write_model_config
from safetensors.torch import save_file

TOLERANCE = 1e-4  # of the map's range
COMPARED = ("anomaly_map", "pred_score", "pred_label")
OPENVINO_IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # its default is bfloat16 where the processor has it


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
    """Files for images of one size, by the real command."""
    with torch.no_grad():
        eager = restored(images)._asdict()
    size = f"[{images.shape[-2]},{images.shape[-1]}]"
    for kind in ("torch", "openvino"):
        run_cli(
            "export", "--config", write_model_config(trained), "--export_type", kind, "--ckpt_path", trained.checkpoint,
            "--export_root", tmp_path, "--input_size", size,
        )  # fmt: skip
    pickled = torch.load(tmp_path / "weights/torch/model.pt", weights_only=False)["model"].eval()
    with torch.no_grad():
        agree({key: value.numpy() for key, value in pickled(images)._asdict().items()}, eager)

    compiled = openvino.compile_model(tmp_path / "weights/openvino/model.xml", "CPU", OPENVINO_IN_FLOAT32)
    results = [compiled(image[None].numpy()) for image in images]
    agree({key: np.concatenate([result[key] for result in results]) for key in COMPARED}, eager)


@pytest.fixture
def files(restored: AnomalibModule, loco_root: Path, tmp_path: Path) -> list[Path]:
    """Image files of 60 %, 100 %, 137 % and 400 % of the model's input, higher or wider, with fine texture."""
    generator = np.random.default_rng(0)
    height, width = restored.input_size
    shapes = [(0.6, 0.8), (1, 1), (1.37, 1), (1, 1.37), (4, 3)]
    sources = sorted((loco_root / "tray" / "test").glob("*/*.png"))[::2]  # normal images and anomalies
    folder = tmp_path / "files"
    folder.mkdir()
    for number, (down, across) in enumerate(shapes):
        size = (round(across * width), round(down * height))
        pixels = np.asarray(Image.open(sources[number]).convert("RGB").resize(size))
        texture = generator.integers(-20, 21, (*pixels.shape[:2], 1))
        Image.fromarray((pixels + texture).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def test_files_of_any_size(
    restored: AnomalibModule, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files exported without an input size score image files as the engine does, also in Anomalib's own inferencers."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # what Anomalib asks for before it unpickles a model
    monkeypatch.chdir(tmp_path)  # OpenVINO's inferencer writes a cache into the working directory
    engine = quiet_engine(tmp_path)
    predicted = engine.predict(restored, data_path=files[0].parent)
    assert [path for batch in predicted for path in batch.image_path] == [str(file) for file in files]
    expected = {key: torch.cat([getattr(batch, key).reshape(1, -1) for batch in predicted]) for key in COMPARED}

    torch_file = engine.export(restored, ExportType.TORCH, export_root=tmp_path)
    onnx_file = engine.export(restored, ExportType.ONNX, export_root=tmp_path)
    session = onnxruntime.InferenceSession(onnx_file)
    outputs = [output.name for output in session.get_outputs()]

    def run_onnx(file: str) -> SimpleNamespace:
        image = read_image(file, as_tensor=True)[None].numpy()
        return SimpleNamespace(
            **dict(zip(outputs, session.run(None, {session.get_inputs()[0].name: image}), strict=True))
        )

    for predict in (
        TorchInferencer(torch_file, device="cpu").predict,
        run_onnx,
        OpenVINOInferencer(onnx_file, device="CPU", config=OPENVINO_IN_FLOAT32).predict,
    ):
        with torch.no_grad():
            rows = [predict(str(file)) for file in files]
        agree(
            {key: np.concatenate([np.asarray(getattr(row, key)).reshape(1, -1) for row in rows]) for key in COMPARED},
            expected,
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
