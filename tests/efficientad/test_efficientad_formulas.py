"""Each formula against a slow NumPy version in float64, written from the papers and PatchCore's published code."""

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812

from anomalib_efficientad.distillation import PatchFeatures, TeacherDistillation
from anomalib_efficientad.distillation.command import TwoSizes
from anomalib_efficientad.distillation.torch_model import averaging, patch_kernels
from anomalib_pack.backbones import FrozenBackbone
from anomalib_pack.statistics import channel_sums, mean_and_std


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pooled(values: np.ndarray, outputs: int) -> np.ndarray:
    """Adaptive average pooling of a vector, one output after the other."""
    count = len(values)
    return np.array(
        [
            values[math.floor(index * count / outputs) : math.ceil((index + 1) * count / outputs)].mean()
            for index in range(outputs)
        ]
    )


@pytest.mark.parametrize(("inputs", "outputs"), [(9, 4), (4, 9), (360, 1024), (2048, 384), (7, 7)])
def test_averaging(inputs: int, outputs: int) -> None:
    vector = random(inputs)
    np.testing.assert_allclose(averaging(inputs, outputs) @ vector, pooled(vector.numpy(), outputs), atol=1e-6)
    torch.testing.assert_close(averaging(inputs, outputs) @ vector, F.adaptive_avg_pool1d(vector[None], outputs)[0])


def patches(maps: np.ndarray) -> np.ndarray:
    """3 x 3 neighbourhoods with zeros outside, (C, h, w) -> (C, 3, 3, h, w)."""
    channels, h, w = maps.shape
    result = np.zeros((channels, 3, 3, h, w))
    for row in range(h):
        for column in range(w):
            for i in range(3):
                for j in range(3):
                    y, x = row + i - 1, column + j - 1
                    if 0 <= y < h and 0 <= x < w:
                        result[:, i, j, row, column] = maps[:, y, x]
    return result


def resized(maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Bilinear, corners not aligned, edges repeated: (..., h, w) -> (..., *grid)."""
    h, w = maps.shape[-2:]
    result = np.zeros((*maps.shape[:-2], *grid))
    for row in range(grid[0]):
        for column in range(grid[1]):
            y = min(max((row + 0.5) * h / grid[0] - 0.5, 0), h - 1)
            x = min(max((column + 0.5) * w / grid[1] - 0.5, 0), w - 1)
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            for r, c, share in (
                (top, left, (1 - y + top) * (1 - x + left)),
                (top, right, (1 - y + top) * (x - left)),
                (bottom, left, (y - top) * (1 - x + left)),
                (bottom, right, (y - top) * (x - left)),
            ):
                result[..., row, column] += share * maps[..., r, c]
    return result


def patchcore(layers: list[np.ndarray], channels: int) -> np.ndarray:
    """PatchCore's post-processing in its own order: patches, resizing, two averages for each location."""
    grid = layers[0].shape[-2:]
    same_grid = [patches(layers[0]), *(resized(patches(layer), grid) for layer in layers[1:])]
    result = np.zeros((channels, *grid))
    for row in range(grid[0]):
        for column in range(grid[1]):
            joined = [pooled(layer[..., row, column].reshape(-1), 1024) for layer in same_grid]
            result[:, row, column] = pooled(np.concatenate(joined), channels)
    return result


@pytest.mark.parametrize("channels", [384, 5])
def test_features_are_those_of_patchcore(channels: int) -> None:
    """Two and three layers of which one does not divide the other's grid; channels that straddle layers."""
    layers = [random(4, 3, 4), random(130, 2, 2, seed=1), random(2, 3, 4, seed=2)]
    for used in (layers[:2], layers):
        kernels = patch_kernels([len(layer) for layer in used], channels)
        parts = [F.conv2d(layer[None], kernel, padding=1) for layer, kernel in zip(used, kernels, strict=True)]
        ours = sum(F.interpolate(part, size=(3, 4), mode="bilinear") for part in parts)[0]
        np.testing.assert_allclose(ours, patchcore([layer.double().numpy() for layer in used], channels), atol=1e-5)


def test_features_of_a_backbone() -> None:
    """The same from the image on, with the backbone's own normalisation and no gradient."""
    torch.manual_seed(0)
    features = PatchFeatures("resnet18", ["layer1", "layer2"], weights=None, channels=24)
    images = torch.rand(1, 3, 32, 32)
    assert isinstance(features.backbone, FrozenBackbone)
    layers = [maps[0].double().numpy() for maps in features.backbone(images)]
    ours = features(images)
    assert not ours.requires_grad
    expected = patchcore(layers, 24)
    np.testing.assert_allclose(ours[0], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("backbone", "layers", "channels"),
    [
        ("wide_resnet101_2", ["layer2", "layer3"], [512, 1024]),
        ("resnext101_32x8d.tv_in1k", ["layer2", "layer3"], [512, 1024]),
        ("densenet201.tv_in1k", ["features.denseblock2", "features.denseblock3"], [512, 1792]),
    ],
)
def test_backbones_of_table_4(backbone: str, layers: list[str], channels: list[int]) -> None:
    """Each gives the teacher what it learns (Sec. 1.2): 3 x 512 x 512 to 384 x 64 x 64."""
    with torch.device("meta"):
        module = TeacherDistillation(backbone=backbone, layers=layers, weights=None)
    features = module.features
    assert features.backbone.channels == channels
    assert features.stride == 8
    assert timm.get_pretrained_cfg(features.backbone.name).tag == "tv_in1k"  # torchvision's
    target = features(torch.empty(1, 3, 512, 512, device="meta"))
    assert target.shape == (1, 384, 64, 64)
    assert module.teacher(torch.empty(1, 3, 256, 256, device="meta")).shape == target.shape


def test_layers_from_coarse_to_fine() -> None:
    with pytest.raises(ValueError, match="finest grid"):
        PatchFeatures("resnet18", ["layer2", "layer1"], weights=None)


def test_statistics() -> None:
    """Of batches of unequal size, with means far from 0, against all values at once."""
    batches = [1000 + 0.01 * random(3, 4, 5, 6), 1000 + 0.01 * random(1, 4, 5, 6, seed=1)]
    values = torch.cat(batches).double().numpy()
    mean, std = mean_and_std(sum(map(channel_sums, batches)))
    assert mean.shape == std.shape == (1, 4, 1, 1)
    np.testing.assert_allclose(mean.flatten(), values.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std.flatten(), values.std(axis=(0, 2, 3)), rtol=1e-4)


def test_statistics_of_a_channel_that_never_changes() -> None:
    mean, std = mean_and_std(channel_sums(torch.full((2, 1, 3, 3), 0.7)))
    assert (mean.item(), std.item()) == (pytest.approx(0.7), 1)


@pytest.mark.parametrize("size", ["small", "medium"])
def test_loss(size: str) -> None:
    """Alg. 3, lines 15 to 28, one image after the other."""
    torch.manual_seed(0)
    module = TeacherDistillation(size, "resnet18", ["layer1", "layer2"], weights=None, out_channels=6)
    module.feature_mean.normal_()
    module.feature_std.uniform_(0.5, 2)
    large, small = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32)
    total = 0.0
    with torch.no_grad():
        for image, resized_image in zip(large, small, strict=True):
            target = (module.features(image[None]) - module.feature_mean) / module.feature_std
            output = module.teacher(resized_image[None])
            total += np.mean((target - output).double().numpy() ** 2)
    module.log = lambda *_, **__: None
    loss = module.training_step((large, small), 0)
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.teacher.parameters())
    assert all(parameter.grad is None for parameter in module.features.parameters())


def test_two_sizes() -> None:
    """Alg. 3, lines 18 to 20: a tenth is gray, in both sizes; RGB in [0, 1] without normalisation."""
    torch.manual_seed(0)
    transform = TwoSizes(24, 8)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))
    gray = []
    for _ in range(1000):
        large, small = transform(image)
        gray.append(bool((small[0] == small[1]).all()))
        assert gray[-1] == bool((large[0] == large[1]).all())
    assert large.shape == (3, 24, 24)
    assert small.shape == (3, 8, 8)
    assert 0.07 < np.mean(gray) < 0.13
    coloured = TwoSizes(20, 8)
    coloured.gray.p = 0.0
    expected = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(coloured(image)[1], expected, atol=1e-6)
