"""Each formula against a slow NumPy version in float64, written from the paper."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_minimaxad.anomaly_map import blur, cosine_distance, full_size_map, image_score
from anomalib_minimaxad.components import Block, GlobalResponseNorm
from anomalib_minimaxad.components.blocks import dense_kernel, depthwise
from anomalib_minimaxad.loss import (
    MiniMaxAdLoss,
    adaptive_contraction_loss,
    contraction_threshold,
    pixel_quantile,
    training_map,
)
from anomalib_minimaxad.torch_model import Pyramids


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def test_grn() -> None:
    """Eqs. 4 and 5, one channel after the other."""
    norm = GlobalResponseNorm(3)
    with torch.no_grad():
        norm.gamma.copy_(random(1, 1, 1, 3))
        norm.beta.copy_(random(1, 1, 1, 3, seed=1))
    maps = random(2, 4, 5, 3, seed=2)
    gamma, beta = array(norm.gamma).ravel(), array(norm.beta).ravel()
    expected = np.zeros(maps.shape)
    for image, values in enumerate(array(maps)):
        strength = [math.sqrt((values[..., channel] ** 2).sum()) for channel in range(3)]
        for channel in range(3):
            relative = strength[channel] / (sum(strength) / 3 + 1e-6)
            x = values[..., channel]
            expected[image, ..., channel] = gamma[channel] * x * relative + beta[channel] + x
    np.testing.assert_allclose(array(norm(maps)), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "dilation"), [(5, 1), (7, 2), (3, 3), (3, 4), (3, 5), (13, 1)])
def test_dense_kernel(size: int, dilation: int) -> None:
    """Zeros between the values do what dilation does, also at the border."""
    convolution = depthwise(4, size, dilation)
    maps = random(2, 4, 16, 15)
    dense = nn.functional.conv2d(maps, dense_kernel(convolution, 13), padding=6, groups=4)
    torch.testing.assert_close(dense, convolution(maps), atol=1e-5, rtol=0)


def batch_norm(values: np.ndarray, norm: nn.BatchNorm2d) -> np.ndarray:
    shape = (-1, 1, 1)
    mean, variance = array(norm.running_mean).reshape(shape), array(norm.running_var).reshape(shape)
    normalised = (values - mean) / np.sqrt(variance + norm.eps)
    return normalised * array(norm.weight).reshape(shape) + array(norm.bias).reshape(shape)


def convolve(values: np.ndarray, convolution: nn.Conv2d) -> np.ndarray:
    """Depthwise, pixel by pixel."""
    kernel, step = array(convolution.weight)[:, 0], convolution.dilation[0]
    reach = step * (kernel.shape[1] - 1) // 2
    padded = np.pad(values, ((0, 0), (reach, reach), (reach, reach)))
    result = np.zeros_like(values)
    for row in range(values.shape[1]):
        for column in range(values.shape[2]):
            window = padded[:, row : row + 2 * reach + 1 : step, column : column + 2 * reach + 1 : step]
            result[:, row, column] = (window * kernel).sum(axis=(1, 2))
    return result


def squeeze_excite(values: np.ndarray, block: Block) -> np.ndarray:
    down, up = block.se.down, block.se.up
    hidden = np.maximum(array(down.weight)[:, :, 0, 0] @ values.mean(axis=(1, 2)) + array(down.bias), 0)
    weights = 1 / (1 + np.exp(-(array(up.weight)[:, :, 0, 0] @ hidden + array(up.bias))))
    return values * weights[:, None, None]


def gelu(value: np.ndarray) -> np.ndarray:
    return value * (1 + np.vectorize(math.erf)(value / math.sqrt(2))) / 2


def reference_block(block: Block, values: np.ndarray, large: bool, grn: bool) -> np.ndarray:
    """UniRepLKNet's block in eval mode for one image, (C, h, w)."""
    if large:
        convolved = batch_norm(convolve(values, block.dwconv.lk_origin), block.dwconv.origin_bn)
        for size, dilation in ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)):
            branch = convolve(values, getattr(block.dwconv, f"dil_conv_k{size}_{dilation}"))
            convolved = convolved + batch_norm(branch, getattr(block.dwconv, f"dil_bn_k{size}_{dilation}"))
    else:
        convolved = convolve(values, block.dwconv)
    hidden = squeeze_excite(batch_norm(convolved, block.norm), block)
    linear = block.pwconv1[1]
    hidden = gelu(np.einsum("oc,chw->ohw", array(linear.weight), hidden) + array(linear.bias)[:, None, None])
    if grn:
        gamma, beta = (array(parameter).reshape(-1, 1, 1) for parameter in (block.act[1].gamma, block.act[1].beta))
        strength = np.sqrt((hidden**2).sum(axis=(1, 2), keepdims=True))
        hidden = gamma * hidden * strength / (strength.mean() + 1e-6) + beta + hidden
    out = batch_norm(np.einsum("oc,chw->ohw", array(block.pwconv2[0].weight), hidden), block.pwconv2[2])
    return values + array(block.gamma)[:, None, None] * out


@torch.no_grad()
@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("grn", [True, False])
def test_block(large: bool, grn: bool) -> None:
    """Merged, and with branches."""
    torch.manual_seed(0)
    block = Block(8, large, grn)
    for tensor in block.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand_like(tensor))  # also a valid variance
    block.eval()
    maps = random(2, 8, 9, 7)
    expected = [reference_block(block, array(image), large, grn) for image in maps]
    branched = maps + block._branched(maps)
    for ours in (block(maps), branched):
        np.testing.assert_allclose(array(ours), np.stack(expected), rtol=1e-4, atol=1e-4)


def pyramids(seed: int, closeness: float = 1.0, size: int = 16) -> Pyramids:
    """Random features at three scales, and noisy copies of them."""
    encoded = [random(2, 5, size // 2**scale, size // 2**scale, seed=seed + scale) for scale in range(3)]
    decoded = [maps + closeness * random(*maps.shape, seed=seed + 9) for maps in encoded]
    return Pyramids(encoded, decoded)


def distance(theirs: np.ndarray, ours: np.ndarray) -> float:
    return 1 - theirs @ ours / (np.linalg.norm(theirs) * np.linalg.norm(ours))


def full_map(outputs: Pyramids, stride: int = 4) -> np.ndarray:
    """S of Eq. 3 at the size of the image, pixel by pixel, (B, H, W)."""
    images, height = len(outputs.encoded[0]), stride * outputs.encoded[0].shape[2]
    result = np.zeros((images, height, height))
    for encoded, decoded in zip(*outputs, strict=True):
        step = height // encoded.shape[2]
        for image in range(images):
            for row in range(height):
                for column in range(height):
                    pixel = (image, slice(None), row // step, column // step)
                    result[image, row, column] += distance(array(encoded)[pixel], array(decoded)[pixel])
    return result


def reference_losses(outputs: Pyramids, p_hard: float, p_lim: float) -> dict[str, float]:
    """Eqs. 1 and 6 to 8 on all pixels."""
    maps = full_map(outputs)
    squared = maps**2
    alpha, beta = np.quantile(maps, p_hard), np.quantile(squared, p_lim)
    variance = maps.std(ddof=1) ** 2
    enough = (squared >= alpha - variance).sum() >= maps.size * (1 - p_lim)
    threshold = (alpha if enough else beta) - variance
    flat = [
        [distance(array(encoded[image]).ravel(), array(decoded[image]).ravel()) for image in range(len(encoded))]
        for encoded, decoded in zip(*outputs, strict=True)
    ]
    return {
        "enough": enough,
        "threshold": threshold,
        "adc": squared[squared >= threshold].mean(),
        "global": np.array(flat).sum(axis=0).mean(),
        "local": squared.mean(),
        "local_hm": squared[squared >= beta].mean(),
    }


@pytest.mark.parametrize("closeness", [2.0, 0.1])
@pytest.mark.parametrize(("p_hard", "p_lim"), [(0.9999, 0.9995), (1.0, 0.999), (0.9, 0.99), (0.5, 0.0)])
def test_losses(closeness: float, p_hard: float, p_lim: float) -> None:
    """Far and close reconstructions: both thresholds of Eq. 7; the values of Tables 10 and 11 and others."""
    outputs = pyramids(0, closeness, size=8)
    expected = reference_losses(outputs, p_hard, p_lim)
    for kind in ("adc", "global", "local", "local_hm"):
        ours = MiniMaxAdLoss(kind, p_hard, p_lim)(outputs).item()
        assert ours == pytest.approx(expected[kind], rel=1e-5), kind
    ours = contraction_threshold(training_map(*outputs), p_hard, p_lim).item()
    assert ours == pytest.approx(expected["threshold"], rel=1e-5, abs=1e-7)


def test_losses_meet_both_thresholds() -> None:
    """The cases above are on both sides of Eq. 7."""
    both = {reference_losses(pyramids(0, closeness, size=8), 0.9999, 0.9995)["enough"] for closeness in (2.0, 0.1)}
    assert both == {True, False}


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.97, 0.9999, 1.0])
def test_pixel_quantile(probability: float) -> None:
    values = random(7, 11)
    expected = torch.quantile(values.flatten().repeat(16).double(), probability)
    assert pixel_quantile(values, probability).item() == pytest.approx(expected.item(), abs=1e-6)


def test_sixteen_large_images() -> None:
    """A batch of 16 at 1024 x 1024 pixels, at which torch.quantile gives up; the threshold keeps what it should."""
    maps = random(16, 256, 256).abs() / 10
    assert 16 * maps.numel() >= 2**24
    threshold = contraction_threshold(maps, 0.9999, 0.9995)
    beta = np.quantile(np.repeat(array(maps).ravel() ** 2, 16), 0.9995)
    assert threshold.item() == pytest.approx(beta - array(maps).var(), rel=1e-4)
    assert adaptive_contraction_loss(maps, 0.9999, 0.9995) > threshold


def test_gradient_is_that_of_the_kept_values_alone() -> None:
    """The threshold has none."""
    maps = random(2, 8, 8).abs().requires_grad_()
    adaptive_contraction_loss(maps, 0.9, 0.9).backward()
    kept = maps.detach().square() >= contraction_threshold(maps, 0.9, 0.9)
    torch.testing.assert_close(maps.grad, torch.where(kept, 2 * maps.detach() / kept.sum(), 0.0))


def test_training_map_has_a_gradient_where_features_agree() -> None:
    encoded = [random(1, 5, 8 // 2**scale, 8 // 2**scale) for scale in range(3)]
    decoded = [maps.clone().requires_grad_() for maps in encoded]
    for kind in ("adc", "global", "local", "local_hm"):
        MiniMaxAdLoss(kind)(Pyramids(encoded, decoded)).backward()
    assert all(maps.grad.isfinite().all() for maps in decoded)


def test_anomaly_map() -> None:
    """Eqs. 2 and 3, averaged; align_corners: rows of an image lie between rows of a grid."""
    outputs = pyramids(3, size=4)
    distances = [cosine_distance(*pair) for pair in zip(*outputs, strict=True)]
    height, width = 10, 7
    expected = np.zeros((2, 1, height, width))
    for maps in distances:
        h, w = maps.shape[1:]
        rows, columns = np.linspace(0, h - 1, height), np.linspace(0, w - 1, width)
        for image in range(2):
            across = np.stack([np.interp(columns, np.arange(w), line) for line in array(maps)[image]])
            both = np.stack([np.interp(rows, np.arange(h), line) for line in across.T]).T
            expected[image, 0] += both / 3
    np.testing.assert_allclose(array(full_size_map(distances, (height, width))), expected, atol=1e-6)
    assert distances[0][1, 2, 3].item() == pytest.approx(
        distance(array(outputs.encoded[0])[1, :, 2, 3], array(outputs.decoded[0])[1, :, 2, 3]), abs=1e-6
    )


@pytest.mark.parametrize("width", [1, 5, 33])
def test_blur(width: int) -> None:
    maps = random(2, 1, 9, 8)
    reach = width // 2
    kernel = np.array(
        [[math.exp(-(y**2 + x**2) / 32) for x in range(-reach, reach + 1)] for y in range(-reach, reach + 1)]
    )
    padded = np.pad(array(maps), ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    expected = np.zeros(maps.shape)
    for row in range(9):
        for column in range(8):
            window = padded[:, 0, row : row + width, column : column + width]
            expected[:, 0, row, column] = (window * kernel / kernel.sum()).sum(axis=(1, 2))
    np.testing.assert_allclose(array(blur(maps, width)), expected, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 1.0])
def test_image_score(ratio: float) -> None:
    maps = random(3, 1, 20, 18)
    number = max(1, int(360 * ratio))
    expected = [np.sort(array(image).ravel())[-number:].mean() for image in maps]
    np.testing.assert_allclose(array(image_score(maps, ratio)), expected, atol=1e-6)


def test_image_score_counts_exactly() -> None:
    """0.29 of 100 pixels are 29; 0.29 * 100 is 28.999... in floats."""
    assert image_score(torch.arange(100.0).view(1, 1, 10, 10), 0.29).item() == 85
