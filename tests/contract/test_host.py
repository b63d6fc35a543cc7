"""Contract points 1 and 5: what Anomalib's integration tests ask of its models, asked of ours.

Its engine, subcommands, exports, inferencers and tiled ensemble, with its own MVTec AD datamodule where a datamodule is
free to choose. Beside that it runs, exported models must agree with the engine.
"""

import csv
import json
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import anomalib.models
import numpy as np
import onnxruntime
import openvino
import pandas as pd
import pytest
import torch
import yaml
from anomalib.data import ImageBatch, MVTecAD
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.models import AnomalibModule, get_model
from anomalib.pipelines.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble
from anomalib.utils.path import convert_to_snake_case
from cases import Case
from PIL import Image
from runs import SEED, Trained, quiet_engine, run_cli, write_model_config

from anomalib_pack.exporting import detailed
from anomalib_pack.inspector import Inspection, Inspector
from anomalib_pack.runtimes import OpenVinoRuntime

TOLERANCE = 1e-4  # of the map's range
COMPARED = ("anomaly_map", "pred_score", "pred_label")
OPENVINO_IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # its default is bfloat16 where the processor has it


@pytest.fixture(scope="module")
def mvtec_ad(loco_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a category of MVTec LOCO in MVTec AD's layout, which has one mask for each image."""
    root, category = tmp_path_factory.mktemp("MVTecAD"), loco_root / "tray"
    for part in ("train/good", "test/good", "test/structural_anomalies"):
        shutil.copytree(category / part, root / "tray" / part)
    masks = root / "tray" / "ground_truth" / "structural_anomalies"
    masks.mkdir(parents=True)
    for folder in (category / "ground_truth" / "structural_anomalies").iterdir():
        shutil.copy(next(folder.iterdir()), masks / f"{folder.name}_mask.png")
    return root


def data_arguments(root: Path) -> dict[str, object]:
    batches = {"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
    return {"root": str(root), "category": "tray", **batches}


# --- Engine ---


@pytest.fixture(scope="module")
def fitted(name: str, case: Case, mvtec_ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of an epoch, where Anomalib puts it."""
    root = tmp_path_factory.mktemp("host")
    torch.manual_seed(SEED)
    model = get_model(convert_to_snake_case(name), **case.arguments)
    quiet_engine(root, logger=False, devices=1, max_epochs=1).fit(model, datamodule=MVTecAD(**data_arguments(mvtec_ad)))
    return root / name / "MVTecAD" / "tray" / "v0" / "weights" / "lightning" / "model.ckpt"


@pytest.mark.parametrize("method", ["validate", "test", "train", "predict"])
def test_engine_takes_a_checkpoint(
    method: str, fitted: Path, name: str, case: Case, mvtec_ad: Path, tmp_path: Path
) -> None:
    engine = quiet_engine(tmp_path, logger=False, devices=1, max_epochs=1)
    model, data = get_model(convert_to_snake_case(name), **case.arguments), MVTecAD(**data_arguments(mvtec_ad))
    results = getattr(engine, method)(model=model, datamodule=data, ckpt_path=fitted)
    if method == "predict":
        assert [path for batch in results for path in batch.image_path] == list(data.test_data.samples.image_path)
        for batch in results:
            assert batch.pred_label.dtype == torch.bool
            assert batch.pred_score.min() >= 0
            assert batch.pred_score.max() <= 1
    elif method != "validate":  # by default there are no metrics of the validation
        [metrics] = results
        assert 0 <= metrics["image_AUROC"] <= 1
        assert 0 <= metrics["pixel_AUROC"] <= 1


# --- Command ---


def test_command_tests_and_validates_a_checkpoint(trained: Trained, tmp_path: Path) -> None:
    """It finds in a test what the training found at its end."""
    shared = ("--config", trained.config, "--ckpt_path", trained.checkpoint, "--default_root_dir", tmp_path)
    run_cli("validate", *shared)
    tested = run_cli("test", *shared).engine.trainer.callback_metrics
    with (trained.folder / "metrics.csv").open() as file:
        before = {row["group"]: row for row in csv.DictReader(file)}["overall"]
    for metric, value in before.items():
        if metric != "group":
            assert float(value) == pytest.approx(float(tested[metric]), abs=1e-5), metric


def test_command_predicts(
    trained: Trained, name: str, loco_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a datamodule, a folder and an image there are pictures."""
    monkeypatch.chdir(tmp_path)
    shared = ("--config", write_model_config(trained, tmp_path), "--ckpt_path", trained.checkpoint)
    folder = loco_root / "tray" / "test" / "good"
    data = [text for key, value in data_arguments(loco_root).items() for text in (f"--data.{key}", value)]
    for arguments, count in ((("MVTecLoco", *data), 12), ((folder,), 4), ((folder / "000.png",), 1)):
        before = len(list(tmp_path.rglob("*.png")))
        run_cli("predict", *shared, "--data", *arguments, "--default_root_dir", tmp_path / str(count))
        assert len(list(tmp_path.rglob("*.png"))) == before + count


# --- Exports and inferencers ---


@pytest.fixture
def restored(trained: Trained, model_class: type[AnomalibModule]) -> AnomalibModule:
    return model_class.load_from_checkpoint(trained.checkpoint).eval()


def images_of(model: AnomalibModule, loco_root: Path) -> torch.Tensor:
    """One image of each group, of the model's size."""
    paths = sorted((loco_root / "tray" / "test").glob("*/000.png"))
    return model.pre_processor.transform(torch.stack([read_image(path, as_tensor=True) for path in paths]))


def agree(exported: dict[str, np.ndarray], eager: dict[str, torch.Tensor]) -> None:
    spread = float(eager["anomaly_map"].max() - eager["anomaly_map"].min())
    assert spread > 0
    for key in ("anomaly_map", "pred_score"):
        assert np.abs(exported[key].reshape(eager[key].shape) - eager[key].numpy()).max() < TOLERANCE * spread, key
    np.testing.assert_array_equal(exported["pred_label"].reshape(-1), eager["pred_label"].numpy().reshape(-1))


def export_by_command(trained: Trained, kind: str, folder: Path, *arguments: str) -> None:
    shared = ("--config", write_model_config(trained, folder), "--ckpt_path", trained.checkpoint)
    shared += ("--export_root", folder)
    run_cli("export", *shared, "--export_type", kind, *arguments)


def test_exports(trained: Trained, restored: AnomalibModule, loco_root: Path, tmp_path: Path, monkeypatch) -> None:
    """Files for images of one size."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # what Anomalib asks for before it unpickles a model
    monkeypatch.chdir(tmp_path)  # OpenVINO's inferencer writes a cache into the working directory
    images = images_of(restored, loco_root)
    with torch.no_grad():
        eager = restored(images)._asdict()
        for name, value in detailed(restored, images).batch._asdict().items():
            assert torch.equal(value, eager[name]), name
    size = f"[{images.shape[-2]},{images.shape[-1]}]"
    for kind in ("torch", "openvino"):
        export_by_command(trained, kind, tmp_path, "--input_size", size)

    inferencer = TorchInferencer(tmp_path / "weights/torch/model.pt", device="cpu")
    with torch.no_grad():
        agree(stack([inferencer.predict(image) for image in images]), eager)
    file = tmp_path / "weights/openvino/model.xml"
    inferencer = OpenVINOInferencer(file, device="CPU", config=OPENVINO_IN_FLOAT32)
    agree(stack([inferencer.predict(image) for image in images]), eager)
    paths = sorted((loco_root / "tray" / "test").glob("*/000.png"))
    same_findings(Inspector(file).predict(paths), Inspector(trained.checkpoint).predict(paths))


def stack(rows: Sequence) -> dict[str, np.ndarray]:
    return {key: np.concatenate([np.asarray(getattr(row, key)).reshape(1, -1) for row in rows]) for key in COMPARED}


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
    trained: Trained, restored: AnomalibModule, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files exported without an input size score image files as the engine does, also in Anomalib's own inferencers."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)
    engine = quiet_engine(tmp_path)
    predicted = engine.predict(restored, data_path=files[0].parent)
    assert [path for batch in predicted for path in batch.image_path] == [str(file) for file in files]
    expected = {key: torch.cat([getattr(batch, key).reshape(1, -1) for batch in predicted]) for key in COMPARED}

    torch_file = engine.export(restored, ExportType.TORCH, export_root=tmp_path)
    export_by_command(trained, "onnx", tmp_path)
    onnx_file = tmp_path / "weights/onnx/model.onnx"
    session = onnxruntime.InferenceSession(onnx_file)
    outputs = [output.name for output in session.get_outputs()]

    def run_onnx(file: str) -> SimpleNamespace:
        image = read_image(file, as_tensor=True)[None].numpy()
        return SimpleNamespace(
            **dict(zip(outputs, session.run(None, {session.get_inputs()[0].name: image}), strict=True))
        )

    inspected = [Inspector(file).predict(files) for file in (trained.checkpoint, torch_file, onnx_file)]
    for found in inspected:
        same_findings(found, inspected[0])
        scores = np.array([each.pred_score for each in found])
        np.testing.assert_allclose(scores, expected["pred_score"].flatten(), atol=TOLERANCE)
        assert [each.pred_label for each in found] == expected["pred_label"].flatten().tolist()
    assert [each.explanation for each in inspected[0]] == [text for batch in predicted for text in explanations(batch)]

    for predict in (
        TorchInferencer(torch_file, device="cpu").predict,
        run_onnx,
        OpenVINOInferencer(onnx_file, device="CPU", config=OPENVINO_IN_FLOAT32).predict,
    ):
        with torch.no_grad():
            agree(stack([predict(str(file)) for file in files]), expected)


def same_findings(found: Sequence[Inspection], expected: Sequence[Inspection]) -> None:
    """Scores, maps, labels and masks, the latter but for pixels on the threshold."""
    raw = np.array([each.raw_score for each in expected])
    assert np.ptp(raw) > 0
    np.testing.assert_allclose([each.raw_score for each in found], raw, atol=10 * TOLERANCE * np.ptp(raw))
    for one, other in zip(found, expected, strict=True):
        assert one.pred_label == other.pred_label
        assert one.pred_score == pytest.approx(other.pred_score, abs=TOLERANCE)
        np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, atol=TOLERANCE)
        assert (one.pred_mask != other.pred_mask).mean() < 1e-3


def explanations(batch: ImageBatch) -> list[str | None]:
    return batch.explanation or [None] * len(batch.image_path)


@pytest.mark.slow
def test_extra_outputs(restored: AnomalibModule, loco_root: Path, tmp_path: Path) -> None:
    """Raw score and branch scores of the graph are the model's, which metadata tells of."""
    images = images_of(restored, loco_root)
    with torch.no_grad():
        raw, _, branches = detailed(restored, images)
    file = restored.to_openvino(tmp_path, extra_outputs=True)
    found = OpenVinoRuntime(file)(images.numpy())
    names = [output["name"] for output in json.loads(file.with_name("metadata.json").read_text())["outputs"]]
    assert names == list(found)
    assert names[:4] == ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
    expected = {"raw_score": raw.pred_score} | {f"{name}_score": scores for name, scores in branches.items()}
    assert names[4:] == list(expected)
    for name, scores in expected.items():
        np.testing.assert_allclose(found[name], scores.numpy(), rtol=1e-3, atol=1e-3 * float(scores.abs().max()))


@pytest.mark.slow
def test_int8(
    trained: Trained, restored: AnomalibModule, loco_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantised after training on a few validation images: rounded, but the same model."""
    monkeypatch.chdir(tmp_path)
    images = images_of(restored, loco_root)
    size = f"[{images.shape[-2]},{images.shape[-1]}]"
    data = [str(text) for key, value in data_arguments(loco_root).items() for text in (f"--data.{key}", value)]
    quantised = ("--compression_type", "INT8_PTQ", "--data", "MVTecLoco", *data)
    export_by_command(trained, "openvino", tmp_path, "--input_size", size, *quantised)
    file = tmp_path / "weights/openvino/model.xml"
    kinds = [operation.get_type_name() for operation in openvino.Core().read_model(file).get_ops()]
    assert "FakeQuantize" in kinds
    found = Inspector(file).predict(sorted((loco_root / "tray" / "test").glob("*/000.png")))
    assert all(each.raw_score is not None for each in found)  # metadata.json is beside it
    inferencer = OpenVINOInferencer(file, device="CPU", config=OPENVINO_IN_FLOAT32)
    maps = stack([inferencer.predict(image) for image in images])["anomaly_map"]
    with torch.no_grad():
        exact = restored(images).anomaly_map.numpy()
    assert np.corrcoef(maps.ravel(), exact.ravel())[0, 1] > 0.8  # least where neighbours are searched: 0.84


# --- Tiled ensemble, which builds models itself and takes their resize away ---


def small_by_default(model_class: type[AnomalibModule], case: Case) -> type[AnomalibModule]:
    """The model without arguments: Anomalib's ensemble cannot give a pre-processor to one that has some."""

    class Small(model_class):
        def __init__(self, pre_processor=True, visualizer=True) -> None:
            super().__init__(**case.arguments, pre_processor=pre_processor, visualizer=visualizer)

    return Small


def test_tiled_ensemble(
    model_class: type[AnomalibModule],
    case: Case,
    mvtec_ad: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """Trains, merges the tiles' maps, and reports metrics; the second pipeline loads the checkpoints."""
    monkeypatch.setattr(anomalib.models, "Small", small_by_default(model_class, case), raising=False)
    monkeypatch.chdir(tmp_path)  # the pipelines write a log there
    splits = {"val_split_mode": "from_train", "val_split_ratio": 0.3, "test_split_mode": "from_dir"}
    arguments = {
        "seed": 0,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path),
        "tiling": {"image_size": [case.tile, 2 * case.tile], "tile_size": 2 * [case.tile], "stride": case.tile},
        "normalization_stage": "image",
        "thresholding_stage": "image",
        "data": {"class_path": "MVTecAD", "init_args": data_arguments(mvtec_ad) | splits},
        "SeamSmoothing": {"apply": True, "sigma": 2, "width": 0.1},
        "TrainModels": {"model": {"class_path": "Small"}, "trainer": {"max_epochs": 1, "enable_progress_bar": False}},
    }
    config = tmp_path / "ensemble.yaml"
    config.write_text(yaml.safe_dump(arguments))
    training = TrainTiledEnsemble()
    training.run(Namespace(config=config))
    folder = training.root_dir
    assert sorted(path.name for path in folder.glob("weights/lightning/*.ckpt")) == ["model0_0.ckpt", "model0_1.ckpt"]
    EvalTiledEnsemble(folder).run(Namespace(config=config))
    assert len(list(folder.glob("images/**/*.png"))) == 8
    assert not list(tmp_path.rglob("*predictions.csv"))  # nobody wants a row for each tile
    metrics = pd.read_csv(folder / "metric_results.csv")
    assert metrics["image_AUROC"].between(0, 1).all()
    assert metrics["pixel_AUROC"].between(0, 1).all()
    assert "error" not in capfd.readouterr().out  # the pipelines go on after an error, and say that there was one
