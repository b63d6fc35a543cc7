"""Each formula of ULSAD against a slow, plain reference in NumPy and float64."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from anomalib_ulsad.anomaly_map import feature_distance, normalise_map, smooth_map
from anomalib_ulsad.loss import UlsadLoss, attention, attention_weights
from anomalib_ulsad.torch_model import Branches, BranchMaps, aggregate_features, combine

TOLERANCE = 1e-5


def random_features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance_reference(prediction: torch.Tensor, target: torch.Tensor, weight: float) -> np.ndarray:
    """Eq. 2 location by location: mean squared difference plus weight times one minus the cosine."""
    prediction, target = prediction.double().numpy(), target.double().numpy()
    batch, _, height, width = prediction.shape
    distance = np.empty((batch, height, width))
    for b in range(batch):
        for h in range(height):
            for w in range(width):
                p, t = prediction[b, :, h, w], target[b, :, h, w]
                cosine = p @ t / (np.sqrt(p @ p) * np.sqrt(t @ t))
                distance[b, h, w] = np.mean((p - t) ** 2) + weight * (1 - cosine)
    return distance


def attention_reference(query: torch.Tensor, features: torch.Tensor) -> np.ndarray:
    """Eqs. 3 and 4 with the full weight matrix, one column for each query location."""
    query, features = query.double().numpy(), features.double().numpy()
    batch, channels, height, width = features.shape
    result = np.empty_like(features)
    for b in range(batch):
        z, q = features[b].reshape(channels, -1), query[b].reshape(channels, -1)
        scores = np.exp(z.T @ q / np.sqrt(channels))
        result[b] = (z @ (scores / scores.sum(axis=0, keepdims=True))).reshape(channels, height, width)
    return result


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_feature_distance(weight: float) -> None:
    prediction, target = random_features(2, 5, 3, 4), random_features(2, 5, 3, 4, seed=1)
    expected = distance_reference(prediction, target, weight)
    np.testing.assert_allclose(feature_distance(prediction, target, weight), expected, atol=TOLERANCE)


def test_feature_distance_by_hand() -> None:
    prediction = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    target = torch.tensor([4.0, -3.0]).view(1, 2, 1, 1)  # perpendicular: cosine 0
    assert feature_distance(prediction, target, 0.5).item() == pytest.approx((1 + 49) / 2 + 0.5)


def test_attention_is_the_full_matrix() -> None:
    query, features = random_features(2, 6, 3, 5), random_features(2, 6, 3, 5, seed=1)
    np.testing.assert_allclose(attention(query, features), attention_reference(query, features), atol=TOLERANCE)
    np.testing.assert_allclose(attention(features, features), attention_reference(features, features), atol=TOLERANCE)


def test_attention_weights_are_columns_of_the_full_matrix() -> None:
    query, features = random_features(2, 6, 3, 5), random_features(2, 6, 3, 5, seed=1)
    locations = [(0, 0), (2, 1), (1, 4)]
    weights = attention_weights(query, features, locations)
    assert weights.shape == (2, 3, 3, 5)
    attended = attention(query, features)
    for b in range(2):
        z, q = (maps[b].double().numpy().reshape(6, -1) for maps in (features, query))
        scores = np.exp(z.T @ q / np.sqrt(6))
        columns = scores / scores.sum(axis=0)
        for index, (row, column) in enumerate(locations):
            weight = weights[b, index].numpy().ravel()
            np.testing.assert_allclose(weight, columns[:, row * 5 + column], atol=TOLERANCE)
            np.testing.assert_allclose(z @ weight, attended[b, :, row, column], atol=TOLERANCE)  # A = Z W


@pytest.mark.parametrize("global_loss", ["attention", "feature"])
def test_losses(global_loss: str) -> None:
    u, u1, u2, ae = (random_features(2, 6, 4, 4, seed=seed) for seed in range(4))
    losses = UlsadLoss(lambda_l=0.3, lambda_g=0.7, global_loss=global_loss)(Branches(u, u1, u2, ae))
    assert losses["local"].item() == pytest.approx(distance_reference(u1, u, 0.3).mean(), abs=TOLERANCE)  # Eq. 1
    assert losses["local_global"].item() == pytest.approx(
        distance_reference(u2, ae, 0.7).mean(), abs=TOLERANCE
    )  # Eq. 6
    if global_loss == "attention":  # Eq. 5
        ours = torch.from_numpy(attention_reference(ae, u)), torch.from_numpy(attention_reference(u, u))
    else:  # L_pg^d of Table 3
        ours = ae, u
    assert losses["global"].item() == pytest.approx(distance_reference(*ours, 0.7).mean(), abs=TOLERANCE)


def test_losses_follow_the_branches() -> None:
    u, u1, ae = (random_features(1, 6, 4, 4, seed=seed) for seed in range(3))
    assert UlsadLoss(global_loss=None)(Branches(u, u1, None, None)).keys() == {"local"}
    assert UlsadLoss()(Branches(u, u1, None, ae)).keys() == {"local", "global"}


@pytest.mark.parametrize("channels", [4, 7, 10])
def test_aggregation(channels: int) -> None:
    fine, coarse = random_features(2, 6, 8, 8), random_features(2, 10, 4, 4, seed=1)
    stacked = np.concatenate([fine.numpy(), np.stack([[double(c) for c in image] for image in coarse.numpy()])], axis=1)
    total = stacked.shape[1]
    expected = [
        stacked[:, c * total // channels : -(-(c + 1) * total // channels)].mean(axis=1) for c in range(channels)
    ]
    np.testing.assert_allclose(aggregate_features([fine, coarse], channels), np.stack(expected, 1), atol=TOLERANCE)


def double(grid: np.ndarray) -> np.ndarray:
    """Bilinear doubling with pixel centres at half integers, sample by sample."""
    size = grid.shape[0]
    result = np.empty((2 * size, 2 * size))
    for row in range(2 * size):
        for column in range(2 * size):
            y, x = (max((i + 0.5) / 2 - 0.5, 0) for i in (row, column))
            top, left = int(y), int(x)
            bottom, right = min(top + 1, size - 1), min(left + 1, size - 1)
            upper = grid[top, left] * (1 - x + left) + grid[top, right] * (x - left)
            lower = grid[bottom, left] * (1 - x + left) + grid[bottom, right] * (x - left)
            result[row, column] = upper * (1 - y + top) + lower * (y - top)
    return result


def test_smoothing() -> None:
    distance = random_features(2, 32, 32)
    full = np.stack([double(image) for image in distance.numpy()])
    expected = np.stack([gaussian_filter(image, sigma=4, truncate=4, mode="mirror") for image in full])
    np.testing.assert_allclose(smooth_map(distance, (64, 64))[:, 0], expected, atol=TOLERANCE)


def test_normalisation_and_blur_commute() -> None:
    """The published code normalises before the blur, we after it."""
    distance, quantiles = random_features(1, 16, 16), torch.tensor([0.3, 1.7])
    before = smooth_map(normalise_map(distance, quantiles), (64, 64))
    after = normalise_map(smooth_map(distance, (64, 64)), quantiles)
    np.testing.assert_allclose(before, after, atol=TOLERANCE)


def test_combination_is_the_mean_and_the_score_its_maximum() -> None:
    structural, logical = random_features(3, 1, 8, 8), random_features(3, 1, 8, 8, seed=1)
    result = combine(BranchMaps(structural, logical))
    np.testing.assert_allclose(result.anomaly_map, (structural + logical) / 2)
    np.testing.assert_allclose(result.pred_score, result.anomaly_map.numpy().reshape(3, -1).max(axis=1))
    np.testing.assert_array_equal(combine(BranchMaps(structural, None)).anomaly_map, structural)
