"""INT8: which layers stay in float, by what, and that no more do than have to."""

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from torch import nn

from anomalib_pack.data import MVTecLoco
from anomalib_pack.quantizing import (
    difference,
    latest_start,
    maps_of,
    normal_validation_images,
    quantize,
    quantize_file,
)
from anomalib_pack.region import Region

pytest.importorskip("nncf")


class Detector(nn.Module):
    """Two convolutions, and a map in which INT8 loses everything: a small difference of large numbers."""

    def __init__(self, inside: torch.Tensor | float = 1.0) -> None:
        super().__init__()
        self.inside = inside
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.map = nn.Conv2d(8, 1, 1)
        self.map.weight.data.copy_(torch.tensor([1000.0, -1000.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).view(1, 8, 1, 1))
        self.features[2].weight.data[1] = self.features[2].weight.data[0] * 1.001

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"anomaly_map": self.map(self.features(images)) * self.inside}


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).random((6, 1, 3, 32, 32), dtype=np.float32))


@pytest.fixture(scope="module")
def model(images: list[np.ndarray]) -> openvino.Model:
    return openvino.convert_model(Detector().eval(), example_input=torch.from_numpy(images[0]), input=[-1, 3, -1, -1])


def convolutions_in_int8(model: openvino.Model) -> list[bool]:
    """For each convolution, in the order of the graph, whether its input passes a quantiser."""
    found = [op for op in model.get_ordered_ops() if op.get_type_name() == "Convolution"]
    return [op.input_value(0).get_node().get_type_name() == "FakeQuantize" for op in found]


def test_all_layers_where_maps_allow_it(model: openvino.Model, images: list[np.ndarray]) -> None:
    assert convolutions_in_int8(model) == [False, False, False]
    assert convolutions_in_int8(quantize(model, images, deviation=np.inf)) == [True, True, True]


def test_last_layers_stay_in_float_where_maps_need_it(model: openvino.Model, images: list[np.ndarray]) -> None:
    """The first convolution's error is the same in both large numbers, and goes when they are subtracted."""
    expected = maps_of(model, images)
    whole = difference(maps_of(quantize(model, images, deviation=np.inf), images), expected)
    quantized = quantize(model, images)
    assert whole > 0.02 >= difference(maps_of(quantized, images), expected) > 0
    in_int8 = convolutions_in_int8(quantized)
    assert in_int8[0]
    assert not in_int8[2]


def test_maps_are_compared_within_the_region(model: openvino.Model, images: list[np.ndarray]) -> None:
    """What lies outside, where no precision changes the 0 there, does not thin out the difference inside."""
    mask = np.zeros((32, 32), dtype=bool)
    mask[:4, :8] = True
    inside = openvino.convert_model(
        Detector(torch.from_numpy(mask).float()).eval(),
        example_input=torch.from_numpy(images[0]),
        input=[1, 3, 32, 32],
    )
    in_int8 = quantize(inside, images, Region(mask), deviation=np.inf)
    everywhere = difference(maps_of(in_int8, images), maps_of(inside, images))
    within = difference(maps_of(in_int8, images, Region(mask)), maps_of(inside, images, Region(mask)))
    assert within > 10 * everywhere > 0
    deviation = (within + everywhere) / 2
    assert convolutions_in_int8(quantize(inside, images, deviation=deviation)) == [True, True, True]
    assert not convolutions_in_int8(quantize(inside, images, Region(mask), deviation))[2]


def test_float_where_nothing_else_will_do(model: openvino.Model, images: list[np.ndarray]) -> None:
    assert quantize(model, images, deviation=0) is model


@pytest.mark.parametrize("needed", range(6))
def test_as_few_layers_in_float_as_it_takes(needed: int) -> None:
    """Found by halving, by a few attempts; the one that is kept was within the limit."""
    attempts = []

    def attempt(start: int) -> tuple[str, float]:
        attempts.append(start)
        return f"from {start}", 0.01 if start <= 10 * needed else 0.5

    made = latest_start(attempt, [0, 10, 20, 30, 40, 50], 0.02)
    assert made == (f"from {10 * needed}" if needed else None)
    assert len(attempts) == len(set(attempts)) <= 4


def test_without_images(model: openvino.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one normal validation image"):
        quantize(model, [])
    with pytest.raises(ValueError, match="INT8_PTQ needs a datamodule"):
        quantize_file(tmp_path / "model.xml", tmp_path / "int8.xml", None)


def test_images_are_normal_ones_for_validation(loco: MVTecLoco) -> None:
    images = normal_validation_images(loco, None)
    assert [image.shape for image in images] == 5 * [(1, 3, 64, 64)]  # conftest.py: as many as were rendered
    np.testing.assert_array_equal(images[1][0], loco.val_data[1].image.numpy())
    assert [image.shape for image in normal_validation_images(loco, (32, 48), 2)] == 2 * [(1, 3, 32, 48)]


def test_anomalies_are_left_out(loco: MVTecLoco) -> None:
    loco.setup()
    loco.val_data = loco.test_data
    loco.setup = lambda _stage: None
    images = normal_validation_images(loco, None)
    normal = [one for one in map(loco.test_data.__getitem__, range(len(loco.test_data))) if one.gt_label == 0]
    assert len(normal) == 4
    np.testing.assert_array_equal(np.concatenate(images), np.stack([one.image.numpy() for one in normal]))
