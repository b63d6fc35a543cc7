"""What exports say of themselves: raw scores from normalised ones, and the file beside the file."""

import json
import logging
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from pack_model import PackModel, set_statistics
from torchvision.transforms.v2 import Resize

from anomalib_pack.metadata import Normalization, normalizations, read_metadata, write_metadata
from anomalib_pack.post_processing import RankPreservingPostProcessor
from anomalib_pack.records.thresholds import image_thresholds


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def of(post_processor: PostProcessor) -> Normalization:
    set_statistics(post_processor)
    return normalizations(post_processor)[0]


def normalized(post_processor: PostProcessor, raw: torch.Tensor) -> np.ndarray:
    return post_processor(InferenceBatch(pred_score=raw)).pred_score.numpy()


def test_raw_scores_are_as_exact_as_is_said() -> None:
    post_processor = RankPreservingPostProcessor()
    found = of(post_processor)
    assert (found.kind, found.center, found.scale) == ("rank_preserving", 50, 10)
    z = torch.cat([torch.logspace(-3, 5, 2000), -torch.logspace(-3, 5, 2000), torch.zeros(1)]).numpy()
    raw = torch.from_numpy(50 + 10 * z)
    error = np.abs(found.raw(normalized(post_processor, raw)) - raw.numpy())
    bound = 10 * 2e-7 * np.where(z > 0, (1 + np.abs(z)) ** 2, 1 + np.abs(z)) + np.abs(raw.numpy()) * 2e-7
    assert (error <= bound).all()
    assert np.isfinite(found.raw(np.ones(1, np.float32))).all()  # what rounds to 1
    assert error[z > 1e4].max() > 1  # the bound is not loose: the spacing of float32 is seen far above the threshold


def test_anomalibs_own_normalisation_is_inverted_where_it_does_not_clamp() -> None:
    post_processor = PostProcessor()
    found = of(post_processor)
    raw = torch.tensor([10.0, 31.0, 50.0, 69.0, 90.0])
    np.testing.assert_allclose(
        found.raw(normalized(post_processor, raw)), [np.nan, 31.0, 50.0, 69.0, np.nan], rtol=1e-6
    )
    assert (found.threshold, found.raw_threshold, found.decision) == (0.5, 50, ">")


@pytest.mark.parametrize("kind", [RankPreservingPostProcessor, PostProcessor])
@pytest.mark.parametrize(
    "arguments", [{}, {"image_sensitivity": 0.7}, {"enable_normalization": False}, {"enable_thresholding": False}]
)
def test_thresholds_are_those_of_the_labels(kind: type[PostProcessor], arguments: dict) -> None:
    """On raw and on normalised scores, whatever is switched off."""
    post_processor = kind(**arguments)
    found = of(post_processor)
    raw = torch.linspace(20, 80, 601)
    result = post_processor(InferenceBatch(pred_score=raw))
    if result.pred_label is None:
        assert found.threshold is None
        assert found.raw_threshold is None
        return
    for scores, threshold in ((raw, found.raw_threshold), (result.pred_score, found.threshold)):
        labels = scores >= threshold if found.decision == ">=" else scores > threshold
        away = (scores - threshold).abs() > 1e-5  # of where rounding decides
        assert torch.equal(labels[away], result.pred_label[away])


@pytest.mark.parametrize("values", [1, 2])
@pytest.mark.parametrize("sensitivity", [0, 1])
def test_anomalibs_own_thresholds_at_the_ends(sensitivity: float, values: int) -> None:
    """Scores are cut at 0 and 1, so none is above 1; records of a run say the same."""
    post_processor = PostProcessor(image_sensitivity=sensitivity)
    set_statistics(post_processor)
    if values == 1:  # all validation scores are equal
        post_processor._image_min = post_processor._image_max = post_processor.image_threshold.clone()
    found = normalizations(post_processor)[0]
    raw = torch.tensor([20.0, 29.0, 31.0, 49.0, 51.0, 90.0])
    result = post_processor(InferenceBatch(pred_score=raw))
    labels = found.is_anomalous(raw.numpy(), result.pred_score.numpy())
    assert labels.tolist() == result.pred_label.tolist()
    assert (raw > image_thresholds(post_processor).raw).tolist() == result.pred_label.tolist()


def test_before_a_validation_nothing_is_known() -> None:
    for post_processor in (None, RankPreservingPostProcessor()):
        for found in normalizations(post_processor):
            assert (found.kind, found.center, found.threshold, found.raw_threshold) == ("none", None, None, None)
    assert of(RankPreservingPostProcessor(image_sensitivity=0)).raw_threshold is None  # no score reaches 1

    class Other(PostProcessor):
        pass

    assert of(Other()).kind == "unknown"
    assert np.isnan(of(Other()).raw(np.array([0.3]))).all()


def load(file: Path) -> dict:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(file.with_name("metadata.json").read_text(), parse_constant=refuse)  # no NaN, which is no JSON


def test_onnx(tmp_path: Path) -> None:
    """Anomalib's outputs, and behind them more; raw scores are also the inverse of the normalised ones."""
    model = PackModel().eval()
    images = noise(3, 3, 40, 60)
    file = model.to_onnx(tmp_path, extra_outputs=True)
    assert not model.extra_outputs
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    usual = ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
    assert names == [*usual, "raw_score", "structural_score", "logical_score"]
    found = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
    with torch.no_grad():
        raw, branches = model.model.with_branch_scores(model.pre_processor(images))
    np.testing.assert_allclose(found["raw_score"], raw.pred_score, rtol=1e-5)
    np.testing.assert_allclose(found["logical_score"], branches["logical"], rtol=1e-5)
    np.testing.assert_allclose(read_metadata(file).image.raw(found["pred_score"]), raw.pred_score, rtol=1e-5)

    metadata = load(file)
    assert [output["name"] for output in metadata["outputs"]] == names
    assert metadata["model"] == "pack_model.PackModel"
    assert metadata["versions"].keys() == {"anomalib-pack", "anomalib", "torch"}
    assert metadata["versions"]["anomalib"] == version("anomalib")
    assert metadata["input"] == {
        "name": "input",
        "dtype": "float32",
        "shape": ["any", 3, "any", "any"],
        "layout": "NCHW",
        "colors": "RGB",
        "range": [0, 1],
        "image_size": "any",
    }
    assert metadata["pre_processing"]["network_input"] == [32, 32]
    assert metadata["outputs"][2] == {"name": "anomaly_map", "dtype": "float32", "shape": ["any", 1, 32, 32]}
    assert metadata["normalization"]["pixel"]["raw_threshold"] == 35
    assert metadata["explanation"] == ["logical", "structural"]
    assert metadata["region"] is metadata["tiles"] is None


def test_openvino(tmp_path: Path) -> None:
    metadata = load(PackModel().to_openvino(tmp_path, "tiny", (32, 32), CompressionType.FP16, extra_outputs=True))
    assert metadata["file"] == "tiny.xml"
    assert metadata["input"]["image_size"] == [32, 32]
    assert metadata["input"]["shape"] == ["any", 3, 32, 32]
    extra = ["raw_score", "structural_score", "logical_score"]
    names = [output["name"] for output in metadata["outputs"]]
    assert names == ["pred_score", "pred_label", "anomaly_map", "pred_mask", *extra]
    assert metadata["outputs"][1]["dtype"] == "bool"


def test_torch(tmp_path: Path) -> None:
    images = noise(2, 3, 40, 60)
    model = PackModel(pre_processor=PreProcessor(Resize((32, 48)))).eval()
    usual = torch.load(model.to_torch(tmp_path), weights_only=False)["model"](images)
    assert isinstance(usual, InferenceBatch)
    file = model.to_torch(tmp_path, "more", extra_outputs=True)
    more = torch.load(file, weights_only=False)["model"](images)
    assert more._fields == (*InferenceBatch._fields, "raw_score", "structural_score", "logical_score")
    assert torch.equal(more.pred_score, usual.pred_score)
    assert read_metadata(file).transform.size == [32, 48]


def test_state_of_the_trained_model(tmp_path: Path) -> None:
    state = {"region": [[[0.1, 0.2], [0.9, 0.2], [0.5, 0.8]]], "tiles": {"tile_size": [16, 16]}}

    class Inspected(PackModel):
        trained_state = property(lambda _self: state)

    file = tmp_path / "model.pt"
    write_metadata(Inspected(), file, None)
    metadata = load(file)
    assert {"region": metadata["region"], "tiles": metadata["tiles"]} == state


def test_metadata_of_another_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = PackModel().to_torch(tmp_path)
    assert read_metadata(file) is not None
    with caplog.at_level(logging.WARNING):
        assert read_metadata(file.with_name("other.pt")) is None
    assert "belongs to model.pt" in caplog.text
    file.with_name("metadata.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what an export of the pack's models writes"):
        read_metadata(file)
    file.with_name("metadata.json").unlink()
    assert read_metadata(file) is None
