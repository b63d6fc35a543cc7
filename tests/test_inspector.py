"""Frames of a camera: the engine's results on image files, from a checkpoint and from exported files."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from pathlib import Path

import cv2
import numpy as np
import openvino
import pytest
import torch
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Patchcore
from anomalib.pre_processing import PreProcessor
from pack_model import PackModel
from tiny_model import TinyModel
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

import anomalib_pack
from anomalib_pack.data import MVTecLoco, PredictImages
from anomalib_pack.inspector import Inspection, Inspector
from anomalib_pack.metrics.original_size import at_size, predicted_masks
from anomalib_pack.post_processing import RankPreservingPostProcessor
from anomalib_pack.records import find_defects

WHITE = 4095


def engine(root: Path) -> Engine:
    arguments = {"max_epochs": 1, "logger": False, "enable_progress_bar": False}
    return Engine(default_root_dir=root, accelerator="cpu", devices=1, **arguments)


def fit(model: AnomalibModule, loco_root: Path, root: Path) -> tuple[AnomalibModule, Path]:
    """Train a model, and give it with its checkpoint."""
    data = MVTecLoco(root=loco_root, category="tray", train_batch_size=4, eval_batch_size=4, num_workers=0)
    running = engine(root)
    running.fit(model, datamodule=data)
    running.trainer.save_checkpoint(root / "model.ckpt")
    return model.eval(), root / "model.ckpt"


@pytest.fixture(scope="module")
def tiny(loco_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[AnomalibModule, Path]:
    return fit(PackModel(), loco_root, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def inspectors(tiny: tuple[AnomalibModule, Path]) -> dict[str, Inspector]:
    """From all kinds of files; the one of ONNX is for any size, that of OpenVINO for images of one size.

    That of the checkpoint sees one frame at a time, as the engine does: larger batches may be rounded otherwise.
    """
    model, checkpoint = tiny
    folder = checkpoint.parent
    files = {
        "torch": model.to_torch(folder),
        "onnx": model.to_onnx(folder),
        "openvino": model.to_openvino(folder, input_size=(32, 32), extra_outputs=True),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUST_REMOTE_CODE", "1")
        found = {kind: Inspector(file, white_level=WHITE) for kind, file in files.items()}
    return found | {"checkpoint": Inspector(checkpoint, model=PackModel, white_level=WHITE, batch_size=1)}


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """Colour, gray and 12 bits, of sizes below and above the network's, some of which are equal."""
    random = np.random.default_rng(0)
    return [
        random.integers(0, 256, (50, 70, 3), dtype=np.uint8),
        random.integers(0, 256, (24, 20), dtype=np.uint8),
        random.integers(0, WHITE + 1, (50, 70), dtype=np.uint16),
        random.integers(0, 100, (50, 70, 3), dtype=np.uint8),
        random.integers(0, WHITE + 1, (32, 32, 3), dtype=np.uint16),
        random.integers(0, 256, (120, 64, 1), dtype=np.uint8),
    ]


@pytest.fixture(scope="module")
def files(frames: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("frames")
    for number, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{number}.png"), frame[..., ::-1] if frame.shape[2:] == (3,) else frame)
    return sorted(folder.iterdir())


def agree(found: list[Inspection], expected: list[Inspection], tolerance: float) -> None:
    """Scores and maps, in shares of the range of all maps, and decisions away from where rounding makes them."""
    raw = np.array([each.raw_score for each in expected])
    np.testing.assert_allclose([each.raw_score for each in found], raw, atol=tolerance * np.ptp(raw))
    spread = float(np.ptp(np.concatenate([each.anomaly_map.ravel() for each in expected])))
    for one, other in zip(found, expected, strict=True):
        assert one.pred_score == pytest.approx(other.pred_score, abs=tolerance * spread)
        assert one.pred_label == other.pred_label
        np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, atol=tolerance * spread)
        differs = one.pred_mask != other.pred_mask
        assert differs.mean() < 1e-3
        assert len(one.defects) == len(other.defects) or differs.any()


def test_the_engine_finds_the_same_in_files(
    tiny: tuple[AnomalibModule, Path],
    inspectors: dict[str, Inspector],
    frames: list[np.ndarray],
    files: list[Path],
    tmp_path: Path,
) -> None:
    """Of frames and of files, at the size of the frame: the raw map is resized, as for records and metrics."""
    model, _ = tiny
    data = PredictImages(files[0].parent, white_level=WHITE)
    loader = DataLoader(data, batch_size=1, collate_fn=data.collate_fn)
    predicted = engine(tmp_path).predict(model, dataloaders=loader)
    expected = inspectors["checkpoint"].predict(frames)
    assert len({each.pred_label for each in expected}) == 2
    for frame, one, batch in zip(frames, expected, predicted, strict=True):
        size = frame.shape[:2]
        assert one.pred_score == batch.pred_score.item()
        assert one.pred_label == batch.pred_label.item()
        with torch.no_grad():
            raw = model.model(batch.image)
        assert one.raw_score == raw.pred_score.item()
        large = at_size(raw.anomaly_map[0, 0], size)
        mask = predicted_masks(large[None], model.post_processor)[0].numpy()
        np.testing.assert_array_equal(one.pred_mask, mask)
        assert list(one.defects) == find_defects(mask, large.numpy())
        assert one.anomaly_map.shape == size
        assert one.anomaly_map.dtype == np.float32
        np.testing.assert_array_equal(one.anomaly_map >= 0.5, mask)
    assert any(each.defects for each in expected)
    assert expected[0].explanation.startswith("logical ")
    for kind, inspector in inspectors.items():
        agree(inspector.predict(frames), expected, 1e-4)
        agree(inspector.predict(files), expected, 1e-4)
        explanations = [each.explanation for each in inspector.predict(frames)]
        assert explanations == [None if kind == "onnx" else each.explanation for each in expected]  # no extra outputs


def test_a_frame_is_as_one_of_a_list(inspectors: dict[str, Inspector], frames: list[np.ndarray]) -> None:
    """In batches of two sizes, mixed with a path; and a result cannot be changed by accident."""
    inspector = inspectors["onnx"]
    inspector._batch_size = 2
    together = inspector.predict(frames)
    for frame, expected in zip(frames, together, strict=True):
        alone = inspector.predict(frame)
        assert alone.pred_score == pytest.approx(expected.pred_score, rel=1e-6)
        assert alone.anomaly_map.shape == frame.shape[:2]
    assert inspector.predict([]) == []
    mirrored = inspector.predict(frames[0][:, ::-1])  # a view of it
    assert mirrored.pred_score == inspector.predict(frames[0][:, ::-1].copy()).pred_score
    with pytest.raises(FrozenInstanceError):
        together[0].pred_score = 0


def test_threads(inspectors: dict[str, Inspector], frames: list[np.ndarray]) -> None:
    for kind in ("openvino", "checkpoint"):
        expected = [each.raw_score for each in inspectors[kind].predict(frames)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(inspectors[kind].predict, 5 * frames))
        np.testing.assert_allclose([each.raw_score for each in found], 5 * expected, rtol=1e-5)


def test_small_defects_are_dropped(tiny: tuple[AnomalibModule, Path], frames: list[np.ndarray]) -> None:
    """From defects, mask and label; areas are those of the frame's pixels."""
    checkpoint = tiny[1]
    frame = frames[0]
    everything = Inspector(checkpoint, model=PackModel, pixel_size=0.5).predict(frame)
    assert everything.pred_label
    areas = sorted(defect.area for defect in everything.defects)
    assert len(areas) > 1
    assert [defect.area_mm2 for defect in everything.defects] == [defect.area / 4 for defect in everything.defects]
    largest = Inspector(checkpoint, model=PackModel, min_area=areas[-1]).predict(frame)
    assert [defect.area for defect in largest.defects] == [area for area in areas if area == areas[-1]]
    assert largest.pred_mask.sum() == sum(defect.area for defect in largest.defects)
    assert largest.pred_label
    with pytest.raises(ValueError, match="min_area must be 0 where there is no mask, got 5"):
        Inspector(TinyModel(post_processor=False), min_area=5)
    nothing = Inspector(checkpoint, model=PackModel, min_area=areas[-1] + 1).predict(frame)
    assert (nothing.defects, nothing.pred_label, nothing.pred_mask.any()) == ((), False, False)
    assert nothing.pred_score == everything.pred_score


def test_a_graph_for_one_image_at_a_time(
    tiny: tuple[AnomalibModule, Path], inspectors: dict[str, Inspector], frames: list[np.ndarray], tmp_path: Path
) -> None:
    file = tiny[0].to_onnx(tmp_path, input_size=(32, 32), dynamic_axes=None)
    inspector = Inspector(file, white_level=WHITE)
    assert inspector._graph.runtime.batch_size == 1
    agree(inspector.predict(frames), inspectors["checkpoint"].predict(frames), 1e-4)


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), TypeError, r"got float32.*whether 1 or 255 is white.*255 \* frame"),
        (np.zeros((8, 8, 3), np.int16), TypeError, "uint8 or uint16, got int16"),
        (torch.zeros(3, 8, 8), TypeError, "NumPy array or the path of an image, got Tensor"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"got the shape \(3, 8, 8\). Channels come last"),
        (np.zeros((8, 8, 4), np.uint8), ValueError, r"Leave the fourth channel out: frame\[:, :, :3\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), ValueError, "Give several as a list"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "H x W x 3"),
        (np.full((8, 8), 5000, np.uint16), ValueError, "its values are 5000 to 5000, not 0 to 4095"),
        ("no_such.png", OSError, "Cannot read no_such.png"),
    ],
)
def test_what_is_no_frame(inspectors: dict[str, Inspector], frame: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        inspectors["onnx"].predict([np.zeros((8, 8, 3), np.uint8), frame])


def test_what_is_no_model(tiny: tuple[AnomalibModule, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny[1]
    with pytest.raises(FileNotFoundError, match=r"There is no file .*missing\.onnx"):
        Inspector(tmp_path / "missing.onnx")
    with pytest.raises(ValueError, match=r"suffixes \.ckpt, \.onnx, \.xml, \.pt"):
        Inspector(tmp_path / "model.engine")
    with pytest.raises(ValueError, match="device 'cuda:77' is not there"):
        Inspector(checkpoint, model=PackModel, device="cuda:77")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Inspector(checkpoint, model=PackModel, batch_size=0)
    with pytest.raises(ValueError, match="white_level must be above 0"):
        Inspector(checkpoint, model=PackModel, white_level=0)
    with pytest.raises(ValueError, match=r"a frame of 16 bits needs white_level.* largest is 3000"):
        Inspector(checkpoint, model=PackModel).predict(np.full((8, 8), 3000, np.uint16))
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    file = tiny[0].to_torch(tmp_path)
    with pytest.raises(ValueError, match="TRUST_REMOTE_CODE=1"):
        Inspector(file)
    with pytest.raises(ValueError, match="model must be left out for an exported file"):
        Inspector(file, model="Patchcore")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    torch.save({"weights": 1}, file)
    with pytest.raises(ValueError, match="holds no model of Anomalib's"):
        Inspector(file)


def test_maps_of_a_part_are_left_out(frames: list[np.ndarray], caplog: pytest.LogCaptureFixture) -> None:
    model = PackModel(pre_processor=PreProcessor(Compose([Resize((40, 40)), CenterCrop(32)])))
    with caplog.at_level(logging.WARNING):
        found = Inspector(model).predict(frames[0])
    assert re.search(r"(?s)no maps, masks and defects: .*CenterCrop", caplog.text)
    assert found.anomaly_map is found.pred_mask is None
    assert found.raw_score > 20


def test_other_models_of_anomalib(
    loco_root: Path, frames: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patchcore with Anomalib's own post-processor: files say nothing of themselves, and raw scores are not known."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    torch.manual_seed(0)
    model, checkpoint = fit(
        Patchcore(
            "resnet18",
            ["layer1"],
            pre_trained=False,
            coreset_sampling_ratio=0.01,
            pre_processor=PreProcessor(Resize((64, 64), antialias=False)),  # as its exports have it
            visualizer=False,
        ),
        loco_root,
        tmp_path,
    )
    images = [*sorted((loco_root / "tray" / "test").glob("*/*.png"))[::4], frames[0]]
    expected = Inspector(checkpoint, model="Patchcore").predict(images)
    assert len({each.pred_label for each in expected}) == 2
    onnx_file = model.to_onnx(tmp_path)
    openvino.save_model(openvino.convert_model(onnx_file), tmp_path / "model.xml", compress_to_fp16=False)
    for file in (model.to_torch(tmp_path), onnx_file, tmp_path / "model.xml"):
        found = Inspector(file).predict(images)
        for one, other in zip(found, expected, strict=True):
            assert one.pred_score == pytest.approx(other.pred_score, abs=1e-4)
            assert one.pred_label == other.pred_label
            np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, atol=1e-3)
            assert (one.pred_mask != other.pred_mask).mean() < 1e-2
            assert one.raw_score == (other.raw_score if file.suffix == ".pt" else None)


def test_before_a_validation(caplog: pytest.LogCaptureFixture) -> None:
    """Scores are raw, and all frames normal, which is said; without a post-processor there are no labels."""
    frame = np.zeros((8, 8, 3), np.uint8)
    with caplog.at_level(logging.WARNING):
        found = Inspector(TinyModel(post_processor=RankPreservingPostProcessor())).predict(frame)
    assert "all frames are labelled normal" in caplog.text
    assert not found.pred_label
    assert found.pred_score == found.raw_score > 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = Inspector(TinyModel(post_processor=False)).predict(frame)
    assert "normal" not in caplog.text
    assert found.pred_label is found.pred_mask is None
    assert found.anomaly_map.shape == (8, 8)


def test_it_is_imported_when_it_is_asked_for() -> None:
    assert anomalib_pack.Inspector is Inspector
    with pytest.raises(AttributeError, match="no attribute 'Inspektor'"):
        _ = anomalib_pack.Inspektor
