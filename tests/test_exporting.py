"""Resizes in exported files: the weights, and what becomes of pre-processors."""

import logging
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pack_model
import pytest
import torch
from anomalib.data.transforms import ExportableCenterCrop, SquarePad
from anomalib.deploy import CompressionType
from anomalib.models import AnomalibModule
from anomalib.pre_processing import PreProcessor
from tiny_model import TinyModel
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import CenterCrop, Compose, Grayscale, InterpolationMode, Normalize, Resize, Transform

from anomalib_pack import exporting
from anomalib_pack.defaults import OneClassDefaults
from anomalib_pack.exporting import AntialiasingByProducts, cubic, filter_weights, resize, triangle

ROUNDING = 2e-5  # torch rounds the pixels' positions, the products do not


class PackModel(OneClassDefaults, AnomalibModule):
    """The tiny model as one of the pack's."""

    def __init__(self, pre_processor: PreProcessor | bool = True) -> None:
        super().__init__(pre_processor=pre_processor)
        self.model = torch.nn.Sequential()

    trainer_arguments = TinyModel.trainer_arguments


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("old", "new"),
    [((90, 70), (32, 48)), ((33, 40), (200, 100)), ((300, 401), (224, 224)), ((30, 4000), (8, 256)), ((1, 1), (7, 5))],
)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_products_are_torchs_antialiasing(old: tuple, new: tuple, mode: str) -> None:
    images = noise(2, 3, *old)
    expected = interpolate(images, size=new, mode=mode, antialias=True)
    torch.testing.assert_close(resize(images, new, mode), expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("kernel", [triangle, cubic])
def test_equal_size_changes_nothing(kernel) -> None:
    assert torch.equal(filter_weights(5, 5, kernel), torch.eye(5))


def test_weights_by_hand() -> None:
    """Half the length: the triangle reaches 2 pixels on both sides, and what lies outside counts for nothing."""
    expected = torch.tensor([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    torch.testing.assert_close(filter_weights(4, 2, triangle), expected)


def test_other_interpolation_is_left_alone() -> None:
    images = noise(1, 3, 90, 70)
    for options in ({"mode": "bilinear"}, {"mode": "bicubic"}, {"mode": "nearest"}):
        with AntialiasingByProducts():
            inside = interpolate(images, size=(32, 48), **options)
        assert torch.equal(inside, interpolate(images, size=(32, 48), **options))


def test_a_users_pre_processor_keeps_its_antialiasing() -> None:
    """Given or set later; training and test see the stock transform, exports and eager calls the same result."""
    given = PreProcessor(Compose([Resize((40, 48)), CenterCrop((32, 40)), Normalize([0.5] * 3, [0.1] * 3)]))
    model = PackModel(given)
    images = noise(2, 3, 90, 70)
    assert torch.equal(given(images), given.transform(images))
    assert [type(step) for step in given.transform.transforms] == [Resize, CenterCrop, Normalize]

    model.pre_processor = PreProcessor(Resize((16, 16)))
    assert torch.equal(model.pre_processor(images), Resize((16, 16))(images))
    model.pre_processor = None
    assert PackModel(pre_processor=False).pre_processor is None


def test_a_restored_pre_processor_keeps_its_antialiasing() -> None:
    checkpoint = {"hyper_parameters": {}}
    PackModel(PreProcessor(Resize((40, 48)))).on_save_checkpoint(checkpoint)
    model = PackModel()
    model.on_load_checkpoint(checkpoint)
    images = noise(2, 3, 90, 70)
    assert torch.equal(model.pre_processor(images), Resize((40, 48))(images))


@pytest.mark.parametrize(
    "transform",
    [
        Resize(32),
        Resize(32, max_size=50),
        Compose([Grayscale(3), Resize([32])]),
        Compose([CenterCrop(64), Resize((32, 32))]),
        ExportableCenterCrop(64),
        SquarePad(),
    ],
)
def test_size_that_depends_on_the_image(transform: Transform, tmp_path: Path) -> None:
    """Traced for images of any size, such steps would do what is right for Anomalib's example of 32 x 32 pixels."""
    model = PackModel(PreProcessor(transform))
    with pytest.raises(ValueError, match=r"resizes to a height and a width first, got .*input_size"):
        model.to_onnx(tmp_path)
    assert not list(tmp_path.iterdir())


class Transformed(torch.nn.Module):
    """What a pre-processor of the pack's models gives to the network."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.pre_processor = PackModel(PreProcessor(transform)).pre_processor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.pre_processor(images)


@pytest.mark.parametrize(
    "transform",
    [
        Compose([Resize((80, 101)), CenterCrop((64, 96)), Normalize([0.5] * 3, [0.5] * 3)]),
        Resize((64, 96), interpolation=InterpolationMode.BICUBIC),
        Resize((64, 96), antialias=False),
    ],
    ids=["bilinear", "bicubic", "no antialiasing"],
)
def test_runtimes_agree(transform: Transform, tmp_path: Path) -> None:
    """Images of any size, up and down; also about right where OpenVINO takes the processor's bfloat16."""
    dimensions = {0: "batch_size", 2: "height", 3: "width"}
    file = tmp_path / "model.onnx"
    with AntialiasingByProducts():
        torch.onnx.export(
            Transformed(transform), (torch.zeros(2, 3, 32, 32),), file, dynamo=True, verbose=False,
            dynamic_shapes=({axis: torch.export.Dim(name) for axis, name in dimensions.items()},),
        )  # fmt: skip
    session = onnxruntime.InferenceSession(file)
    exact = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    default = openvino.compile_model(file, "CPU")
    for size in ((38, 57), (64, 96), (96, 64), (88, 131), (257, 255), (400, 300)):
        images = noise(2, 3, *size)
        expected = transform(images).numpy()
        for result in (session.run(None, {session.get_inputs()[0].name: images.numpy()}), exact(images.numpy())):
            np.testing.assert_allclose(result[0], expected, atol=1e-4, rtol=0)
        np.testing.assert_allclose(default(images.numpy())[0], expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", [CompressionType.INT8, CompressionType.INT8_PTQ, CompressionType.INT8_ACQ])
def test_what_to_install_is_said_before_the_conversion(
    kind: CompressionType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "module_available", lambda name: name != "nncf")
    with pytest.raises(ModuleNotFoundError, match=r'needs nncf: pip install "anomalib-pack\[export\]"'):
        PackModel().to_openvino(tmp_path, input_size=(32, 32), compression_type=kind)
    assert list(tmp_path.iterdir()) == []


def test_an_export_says_nothing_of_its_libraries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their information is of no use, and they would fail to convert the graph to the opset that Anomalib asks for."""
    caplog.set_level(logging.INFO)
    assert pack_model.PackModel().to_onnx(tmp_path).is_file()
    assert not [record for record in caplog.records if record.name.startswith(("onnx_ir", "onnxscript"))]
    assert logging.getLogger("onnxscript").level == logging.NOTSET  # as it was
