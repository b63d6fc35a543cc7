"""Steps 1 to 9 against slow NumPy versions in float64, written from the paper's equations in their order."""

from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from anomalib_unislad.anomaly_map import class_similarity, fuse
from anomalib_unislad.components import (
    LocalAggregator,
    NominalDistribution,
    Whitening,
    image_vector,
    lower_upper_mean,
    power_mean,
)
from anomalib_unislad.torch_model import Features, UnisladModel

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "aggregator_a.npz"
SHRINKAGE = 1e-2
IMAGES, TESTED = 12, 3  # images to learn from, and to test
LOCAL_DIM, GLOBAL_DIM = 8, 64
LOCAL_GRID, GLOBAL_GRID = (8, 6), (4, 3)
SIZE = (64, 48)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


# Step 1


def neighborhood_means(block: np.ndarray, side: int) -> np.ndarray:
    """Means over side x side windows of (C, h, w), with the zeros beyond the border counted, as PatchCore has it."""
    _, height, width = block.shape
    half = side // 2
    padded = np.pad(block, ((0, 0), (half, half), (half, half)))
    result = np.empty_like(block)
    for row in range(height):
        for column in range(width):
            result[:, row, column] = padded[:, row : row + side, column : column + side].sum(axis=(1, 2)) / side**2
    return result


def bilinear(block: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Resize (C, h, w); positions are those of the pixels' centres."""

    def along(values: np.ndarray, length: int) -> np.ndarray:
        """Resize the last axis."""
        result = np.empty((*values.shape[:-1], length))
        for index in range(length):
            place = max((index + 0.5) * values.shape[-1] / length - 0.5, 0)
            left = int(place)
            right = min(left + 1, values.shape[-1] - 1)
            result[..., index] = (1 - place + left) * values[..., left] + (place - left) * values[..., right]
        return result

    return along(along(block.swapaxes(1, 2), grid[0]).swapaxes(1, 2), grid[1])


def unfold(block: np.ndarray, side: int) -> np.ndarray:
    """(C, h, w) -> (C side^2, h, w): the neighbourhoods, with zeros beyond the border; channel, then row and column."""
    channels, height, width = block.shape
    half = side // 2
    padded = np.pad(block, ((0, 0), (half, half), (half, half)))
    result = np.empty((channels * side**2, height, width))
    for row in range(height):
        for column in range(width):
            result[:, row, column] = padded[:, row : row + side, column : column + side].reshape(-1)
    return result


def pool_channels(channels: np.ndarray, dimension: int) -> np.ndarray:
    """Adaptive average pooling of (C, h, w) to (D, h, w)."""
    total = len(channels)
    bounds = [(number * total // dimension, -(-(number + 1) * total // dimension)) for number in range(dimension)]
    return np.stack([channels[start:end].mean(axis=0) for start, end in bounds])


BLOCKS = [  # channels, grids, dimension, side
    ((5,), ((6, 7),), 5, 3),
    ((5,), ((6, 7),), 2, 1),
    ((4, 6, 7), ((8, 8), (4, 4), (2, 2)), 5, 3),
    ((4, 6, 7), ((8, 8), (4, 4), (2, 2)), 17, 5),
    ((3, 3, 9, 1), ((9, 7), (9, 7), (5, 4), (1, 1)), 4, 3),
    ((4, 6), ((4, 4), (8, 8)), 7, 3),  # a finer grid than the first one
    ((64, 3, 50), ((6, 6), (3, 3), (2, 2)), 1, 3),
    ((64, 3, 50), ((6, 6), (3, 3), (2, 2)), 100, 3),
]


def check_local_features(channels: tuple, grids: tuple, dimension: int, side: int, aggregation: str) -> None:
    blocks = [random(2, count, *grid, seed=count) for count, grid in zip(channels, grids, strict=True)]
    aggregator = LocalAggregator(channels, dimension, side, aggregation).eval()
    ours = aggregator(blocks)
    assert ours.shape == (2, dimension, *grids[0])
    with torch.no_grad():  # packed
        torch.testing.assert_close(aggregator(blocks), ours, atol=2e-6, rtol=1e-5)
    assert not aggregator.state_dict()
    for image in range(2):
        if aggregation == "patchcore":
            values = [bilinear(unfold(array(block[image]), side), grids[0]) for block in blocks]
            joined = np.concatenate([pool_channels(one, dimension) for one in values])
        else:
            joined = np.concatenate([bilinear(neighborhood_means(array(one[image]), side), grids[0]) for one in blocks])
        np.testing.assert_allclose(array(ours[image]), pool_channels(joined, dimension), atol=2e-6)


@pytest.mark.parametrize(("channels", "grids", "dimension", "side"), BLOCKS)
def test_local_features_of_patchcore(channels: tuple, grids: tuple, dimension: int, side: int) -> None:
    """Eq. 2 in the paper's order: neighbourhoods, one grid, each block's values pooled, then those of all blocks."""
    check_local_features(channels, grids, dimension, side, "patchcore")


@pytest.mark.parametrize(("channels", "grids", "dimension", "side"), BLOCKS)
def test_local_features_by_channels(channels: tuple, grids: tuple, dimension: int, side: int) -> None:
    """The other reading: averages of neighbourhoods, one grid, all channels side by side, pooled at the end."""
    check_local_features(channels, grids, dimension, side, "channels")


@pytest.mark.parametrize(
    ("aggregation", "expected"), [("patchcore", [4, 4, 4]), ("channels", [1, 3, 8])], ids=["patchcore", "channels"]
)
def test_shares_of_blocks(aggregation: str, expected: list[int]) -> None:
    """How much of 12 values is each block's: an equal share, or one by its channels."""
    channels = (8, 24, 64)
    aggregator = LocalAggregator(channels, 12, 3, aggregation)
    weights = [convolution.weight.sum().item() for convolution in aggregator.convolutions]
    assert weights == pytest.approx(expected, rel=1e-5)


@pytest.mark.golden
@pytest.mark.skipif(not GOLDEN.is_file(), reason="the reference numbers of the published code are not here")
def test_patchcores_published_aggregator() -> None:
    with np.load(GOLDEN, allow_pickle=False) as file:
        blocks = [torch.from_numpy(file[f"in/layer{number}"]) for number in (1, 2, 3)]
        expected = file["out/patches"]
    ours = LocalAggregator([block.shape[1] for block in blocks], 16, 3, "patchcore")(blocks)
    np.testing.assert_allclose(array(ours.permute(0, 2, 3, 1)), expected, atol=1e-5)


# Step 4


def ridge_of(covariance: np.ndarray) -> float:
    return SHRINKAGE * np.trace(covariance) / len(covariance)


def transform(features: np.ndarray, selected: np.ndarray, whitening: bool, unit_length: bool) -> np.ndarray:
    """Eqs. 6 to 9 and Eq. 10 as they stand, with the inverse itself decomposed."""
    if whitening:
        mean = selected.mean(axis=0)
        covariance = sum(np.outer(row - mean, row - mean) for row in selected) / (len(selected) - 1)  # Eq. 6
        inverse = np.linalg.inv(covariance + ridge_of(covariance) * np.eye(len(mean)))
        eigenvalues, vectors = np.linalg.eigh(inverse)  # Eq. 7
        root = vectors @ np.diag(np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T  # Eq. 8
        features = (features - mean) @ root  # Eq. 9
    return features / np.linalg.norm(features, axis=-1, keepdims=True) if unit_length else features  # Eq. 10


def correlated(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    """Features far from white, around a mean far from 0."""
    mixing = random(dimension, dimension, seed=99) * torch.linspace(0.2, 3, dimension)
    return random(count, dimension, seed=seed) @ mixing + 5 * random(dimension, seed=98)


@pytest.mark.parametrize("unit_length", [False, True])
@pytest.mark.parametrize(("count", "dimension"), [(200, 6), (5, 12), (13, 12), (2, 3)])
def test_transform(count: int, dimension: int, unit_length: bool) -> None:
    """Of the bank's own features and of others; also with fewer features than dimensions."""
    selected, others = correlated(count, dimension), correlated(7, dimension, seed=1)
    whitening = Whitening(dimension, SHRINKAGE, enabled=True, unit_length=unit_length)
    whitening.fit(selected)
    for features in (selected, others):
        expected = transform(array(features), array(selected), True, unit_length)
        np.testing.assert_allclose(array(whitening(features)), expected, atol=1e-4, rtol=1e-4)
        if unit_length:
            np.testing.assert_allclose(array(whitening(features).norm(dim=1)), 1, rtol=1e-6)


@pytest.mark.parametrize("shrinkage", [1e-9, 1e-2, 0.5])
def test_transformed_features_are_white(shrinkage: float) -> None:
    """Without Eq. 10: with eigenvalues s, their covariance has s / (s + ridge) on its diagonal."""
    selected = correlated(500, 6)
    whitening = Whitening(6, shrinkage, enabled=True, unit_length=False)
    whitening.fit(selected)
    whitened = array(whitening(selected))
    eigenvalues, vectors = np.linalg.eigh(np.cov(array(selected).T))
    expected = vectors @ np.diag(eigenvalues / (eigenvalues + shrinkage * eigenvalues.mean())) @ vectors.T
    np.testing.assert_allclose(np.cov(whitened.T), expected, atol=1e-4)
    np.testing.assert_allclose(whitened.mean(axis=0), 0, atol=1e-4)
    if shrinkage == 1e-9:
        np.testing.assert_allclose(expected, np.eye(6), atol=1e-5)


@pytest.mark.parametrize("unit_length", [False, True])
def test_transform_switched_off(unit_length: bool) -> None:
    """Table III without MT: the raw features, or these with length 1."""
    selected = correlated(20, 6)
    whitening = Whitening(6, SHRINKAGE, enabled=False, unit_length=unit_length)
    whitening.fit(selected)
    expected = transform(array(selected), None, False, unit_length)
    np.testing.assert_allclose(array(whitening(selected)), expected, atol=1e-6)
    assert not whitening.state_dict()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("value", [0.0, 0.1, 123.456])
def test_features_without_variation(count: int, value: float) -> None:
    """Whatever rounding makes of their covariance, the transform is finite."""
    selected = torch.full((count, 5), value)
    whitening = Whitening(5, SHRINKAGE, enabled=True, unit_length=True)
    whitening.fit(selected)
    others = whitening(correlated(9, 5))
    assert whitening(selected).isfinite().all()
    np.testing.assert_allclose(array(others.norm(dim=1)), 1, rtol=1e-6)


# Step 5


def root_of_powers(patches: np.ndarray, power: int) -> np.ndarray:
    """Eq. 12 of (N, D), channel by channel."""
    result = np.empty(patches.shape[1])
    for channel, values in enumerate(patches.T):
        mean = sum(float(value) ** power for value in values) / len(values)
        result[channel] = np.sign(mean) * abs(mean) ** (1 / power)
    return result


def trimmed(patches: np.ndarray, alpha: float) -> np.ndarray:
    """Eq. 13 of (N, D), channel by channel."""
    cut = int(np.floor(Decimal(str(alpha)) * len(patches)))
    return np.array([np.mean(sorted(values)[cut : len(values) - cut]) for values in patches.T])


@pytest.mark.parametrize("power", [1, 2, 3, 5])
def test_power_mean(power: int) -> None:
    """Also where most values are negative, whose odd powers are."""
    features = random(2, 30, 7) - torch.linspace(-2, 2, 7)
    ours = power_mean(features, power)
    for image in range(2):
        np.testing.assert_allclose(array(ours[image]), root_of_powers(array(features[image]), power), atol=1e-5)


def test_power_mean_by_hand() -> None:
    features = torch.tensor([[[1.0, -1.0], [2.0, -2.0], [-3.0, 3.0], [-2.0, 0.0]]])  # cubes: 1 + 8 - 27 - 8
    torch.testing.assert_close(power_mean(features, 3), torch.tensor([[-(6.5 ** (1 / 3)), 4.5 ** (1 / 3)]]))


@pytest.mark.parametrize(
    ("patches", "alpha"), [(30, 0.05), (30, 0.1), (49, 0.3), (5, 0.49), (4, 0.49), (7, 0.0), (1, 0.4), (100, 0.29)]
)
def test_lower_upper_mean(patches: int, alpha: float) -> None:
    features = random(2, patches, 7)
    ours = lower_upper_mean(features, alpha)
    for image in range(2):
        np.testing.assert_allclose(array(ours[image]), trimmed(array(features[image]), alpha), atol=1e-6)


def test_lower_upper_mean_by_hand() -> None:
    values = torch.tensor([100.0, 1, 2, 3, 4, 5, 6, 7, 8, -50]).view(1, 10, 1)
    torch.testing.assert_close(lower_upper_mean(values, 0.1), torch.tensor([[4.5]]))
    torch.testing.assert_close(lower_upper_mean(values, 0.19), torch.tensor([[4.5]]))  # floor
    torch.testing.assert_close(lower_upper_mean(values, 0.09), torch.tensor([[8.6]]))
    outliers = torch.cat([torch.full((29,), 900.0), torch.ones(42), torch.zeros(29)]).view(1, 100, 1)
    assert lower_upper_mean(outliers, 0.29).item() == 1  # 0.29 * 100 is 28.999... in floats


def vector_of(patches: np.ndarray, pooling: str) -> np.ndarray:
    """Eq. 14 and the lines of Table IV."""
    return {
        "mean": lambda: patches.mean(axis=0),
        "lum": lambda: trimmed(patches, 0.05),
        "pmp": lambda: root_of_powers(patches, 3),
        "lum+pmp": lambda: np.concatenate([root_of_powers(patches, 3), trimmed(patches, 0.05)]),
    }[pooling]()


@pytest.mark.parametrize("pooling", ["lum+pmp", "mean", "lum", "pmp"])
def test_image_vector(pooling: str) -> None:
    features = random(2, 48, 5)
    ours = image_vector(features, pooling, 3, 0.05)
    for image in range(2):
        np.testing.assert_allclose(array(ours[image]), vector_of(array(features[image]), pooling), atol=1e-5)


# Steps 6 and 8


def mahalanobis(vector: np.ndarray, nominal: np.ndarray) -> float:
    """Eqs. 15 and 19 with the regularised covariance inverted as a whole."""
    covariance = np.cov(nominal.T)
    inverse = np.linalg.inv(covariance + ridge_of(covariance) * np.eye(len(covariance)))
    difference = vector - nominal.mean(axis=0)
    return float(np.sqrt(difference @ inverse @ difference))


@pytest.mark.parametrize(("count", "dimension"), [(40, 6), (7, 6), (6, 6), (6, 40), (2, 40), (12, 128)])
def test_mahalanobis_distance(count: int, dimension: int) -> None:
    """With more images than dimensions and with fewer, for the nominal images and for others."""
    nominal, others = correlated(count, dimension), correlated(5, dimension, seed=1)
    distribution = NominalDistribution(dimension, SHRINKAGE)
    distribution.fit(nominal)
    assert len(distribution.directions) == min(count - 1, dimension)  # never D x D for fewer images
    for vectors in (nominal, others):
        expected = [mahalanobis(vector, array(nominal)) for vector in array(vectors)]
        np.testing.assert_allclose(array(distribution(vectors)), expected, rtol=1e-4)
    np.testing.assert_allclose(array(distribution(nominal.mean(dim=0, keepdim=True))), 0, atol=1e-3)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("value", [0.0, 0.1, 123.456])
def test_distance_from_images_without_variation(count: int, value: float) -> None:
    """Whatever rounding makes of their covariance, distances are finite, and larger for what is farther."""
    nominal = torch.full((count, 5), value)
    distribution = NominalDistribution(5, SHRINKAGE)
    distribution.fit(nominal)
    assert len(distribution.directions) >= 1  # OpenVINO takes no empty matrices
    same, near, far = distribution(torch.stack([nominal[0], nominal[0] + 1, nominal[0] - 3]))
    assert 0 <= same < near < far < torch.inf


# Steps 7 to 9


def nearest_distance(feature: np.ndarray, bank: np.ndarray) -> float:
    return min(float(np.linalg.norm(feature - entry)) for entry in bank)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_fusion(weight: float) -> None:
    first, second = random(4), random(4, seed=1)
    torch.testing.assert_close(fuse(first, second, weight), (1 - weight) * first + weight * second)
    assert fuse(first, None, weight) is first
    assert fuse(None, second, weight) is second
    assert fuse(None, None, weight) is None


def test_class_similarity() -> None:
    """Eq. 17 by hand: the most similar token counts whatever its length, and no rounding exceeds 1."""
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    tokens = torch.tensor([[0.8, 0.6], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(class_similarity(tokens, bank), torch.tensor([0.96, 0.0, 1.0, 0.8]))
    torch.testing.assert_close(class_similarity(7 * tokens, 3 * bank), torch.tensor([0.96, 0.0, 1.0, 0.8]))
    many = random(500, 7)
    assert class_similarity(many, many).max() <= 1
    assert not class_similarity(tokens, torch.zeros(1, 2)).any()  # a single image: its token is the mean


def features_of(count: int, seed: int) -> Features:
    """What the extractors might see: correlated channels, negative values, tokens that resemble each other."""
    local = correlated(count * LOCAL_GRID[0] * LOCAL_GRID[1], LOCAL_DIM, seed).view(count, *LOCAL_GRID, LOCAL_DIM)
    global_ = random(count, GLOBAL_DIM, *GLOBAL_GRID, seed=seed) + random(GLOBAL_DIM, 1, 1, seed=97)
    return Features(local.permute(0, 3, 1, 2), global_, random(count, GLOBAL_DIM, seed=seed + 1))


def without(features: Features, use_cnn: bool, use_vit: bool) -> Features:
    return Features(
        features.local_patches if use_cnn else None,
        features.global_patches if use_vit else None,
        features.class_token if use_vit else None,
    )


def build(**arguments) -> UnisladModel:
    torch.manual_seed(0)
    small = {"backbone": "test_resnet", "blocks": ["layer1"], "local_dim": LOCAL_DIM, "weights": None, "index": "flat"}
    vit = {"vit": "test_vit", "vit_layer": 1, "vit_weights": None}
    return UnisladModel(**(small | vit | arguments)).eval()


def rows(patches: torch.Tensor) -> torch.Tensor:
    """(B, D, h, w) -> (B h w, D)."""
    return patches.permute(0, 2, 3, 1).flatten(0, 2)


class Reference:
    """Steps 4 to 8 for one image after the other, every second patch being in the memory banks."""

    def __init__(self, nominal: Features, **switches) -> None:
        self.nominal, self.switches = nominal, switches

    def on(self, switch: str) -> bool:
        return self.switches.get(switch, switch != "unit_length")

    def distances(self, patches: torch.Tensor, kind: str) -> np.ndarray:
        """Eq. 16: (h, w) for (D, h, w)."""
        selected = array(rows(getattr(self.nominal, kind))[::2])
        reading = self.on("whitening"), self.on("unit_length")
        bank = transform(selected, selected, *reading)
        tested = transform(array(rows(patches[None])), selected, *reading)
        return np.reshape([nearest_distance(patch, bank) for patch in tested], patches.shape[1:])

    def patch_map(self, tested: Features, image: int) -> np.ndarray:
        local = global_ = None
        if self.on("use_cnn"):
            local = self.distances(tested.local_patches[image], "local_patches")
        if self.on("use_vit"):
            global_ = self.distances(tested.global_patches[image], "global_patches")
        if local is None or global_ is None:
            return global_ if local is None else local
        tokens = array(self.nominal.class_token)
        literal = self.on("whitening") and self.on("unit_length")
        bank = transform(tokens, tokens, literal, True)
        token = transform(array(tested.class_token[image : image + 1]), tokens, literal, True)[0]
        weight = np.clip(max(entry @ token for entry in bank), 0, 1)  # Eq. 17
        return (1 - weight) * bilinear(global_[None], LOCAL_GRID)[0] + weight * local  # Eq. 18

    def image_distance(self, tested: Features, image: int, kind: str) -> float:
        if kind == "class_token":
            return mahalanobis(array(tested.class_token[image]), array(self.nominal.class_token))
        pooling = self.switches.get("pooling", "lum+pmp")
        vectors = [vector_of(array(one.flatten(1).T), pooling) for one in getattr(self.nominal, kind)]
        return mahalanobis(vector_of(array(getattr(tested, kind)[image].flatten(1).T), pooling), np.stack(vectors))

    def raw_scores(self, tested: Features, image: int) -> dict[str, float]:
        """The scores that there are, in the paper's words: S_i^l, global, class token, S_p."""
        scores = {}
        if self.on("image_distribution"):
            if self.on("use_cnn"):
                scores["local"] = self.image_distance(tested, image, "local_patches")
            if self.on("use_vit"):
                scores["global"] = self.image_distance(tested, image, "global_patches")
                scores["class"] = self.image_distance(tested, image, "class_token")
        if self.on("patch_bank"):
            scores["patch"] = self.patch_map(tested, image).max()
        return scores


def fused(scores: dict[str, float], w_i: float, w_ig: float, w: float) -> float:
    """Eqs. 20 and 21; where one side is missing, the other is the score."""
    if "global" in scores:
        of_vit = (1 - w_ig) * scores["global"] + w_ig * scores["class"]
        of_image = (1 - w_i) * scores["local"] + w_i * of_vit if "local" in scores else of_vit
    else:
        of_image = scores.get("local")
    if of_image is None:
        return scores["patch"]
    return (1 - w) * of_image + w * scores["patch"] if "patch" in scores else of_image


ABLATIONS = [
    {"use_vit": False, "whitening": False, "image_distribution": False},  # Table III, as in configs/papers/unislad
    {"use_cnn": False, "whitening": False, "image_distribution": False},
    {"whitening": False, "image_distribution": False},
    {"use_vit": False, "image_distribution": False},
    {"use_vit": False, "whitening": False, "patch_bank": False},
    {"use_vit": False, "whitening": False},
    {"use_cnn": False, "image_distribution": False},
    {"use_cnn": False},
    {},
    {"patch_bank": False},
    {"use_cnn": False, "patch_bank": False},
    {"use_vit": False},
    {"unit_length": True},  # the paper read literally
    {"whitening": False},
    {"whitening": False, "unit_length": True},
    {"pooling": "mean"},  # Table IV
    {"pooling": "lum"},
    {"pooling": "pmp"},
]


def fitted(nominal: Features, **arguments) -> UnisladModel:
    model = build(**arguments)
    selected = [patches if patches is None else rows(patches)[::2] for patches in nominal[:2]]
    model.fit(*selected, model.vectors(nominal))
    return model


@torch.no_grad()
@pytest.mark.parametrize("switches", ABLATIONS, ids=str)
def test_detector(switches: dict) -> None:
    """The whole of steps 4 to 8, with every part that the paper ablates on and off."""
    parts = {name: switches.get(name, True) for name in ("use_cnn", "use_vit")}
    nominal, tested = without(features_of(IMAGES, 0), **parts), without(features_of(TESTED, 10), **parts)
    model = fitted(nominal, w_i=0.3, w_ig=0.9, w=0.6, **switches)
    reference = Reference(nominal, **switches)
    patch_map = model.patch_map(tested)
    raw = model.raw_scores(tested, patch_map)
    score = model.image_score(raw)
    for image in range(TESTED):
        expected = reference.raw_scores(tested, image)
        for kind, ours in zip(("local", "global", "class", "patch"), raw, strict=True):
            assert (ours is not None) == (kind in expected), kind
            if ours is not None:
                assert ours[image].item() == pytest.approx(expected[kind], rel=1e-3), kind
        assert score[image].item() == pytest.approx(fused(expected, 0.3, 0.9, 0.6), rel=1e-3)
        if "patch" in expected:
            np.testing.assert_allclose(array(patch_map[image, 0]), reference.patch_map(tested, image), atol=1e-3)
    if switches.get("patch_bank", True):
        assert patch_map.shape[2:] == (LOCAL_GRID if parts["use_cnn"] else GLOBAL_GRID)
    else:
        assert patch_map is None


@torch.no_grad()
def test_weight_of_the_patches_follows_the_class_token() -> None:
    """Eq. 18 at its ends: local distances alone for a known token, global ones alone for one unlike all others."""
    nominal, tested = features_of(IMAGES, 0), features_of(1, 10)
    model, reference = fitted(nominal), Reference(nominal)
    known = tested._replace(class_token=nominal.class_token[:1])
    local = reference.distances(tested.local_patches[0], "local_patches")
    np.testing.assert_allclose(array(model.patch_map(known)[0, 0]), local, atol=1e-3)
    model.class_bank.neighbors.bank = -known.class_token
    global_ = bilinear(reference.distances(tested.global_patches[0], "global_patches")[None], LOCAL_GRID)[0]
    np.testing.assert_allclose(array(model.patch_map(known)[0, 0]), global_, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("w_i", "w_ig", "w", "kind"),
    [(0, 0.5, 0, "local"), (1, 0, 0, "global"), (1, 1, 0, "class"), (0.5, 0.5, 1, "patch")],
)
def test_weights_at_their_ends(w_i: float, w_ig: float, w: float, kind: str) -> None:
    """Eqs. 20 and 21: each weight of 0 or 1 leaves one score alone, on the scale of normal images."""
    nominal, tested = features_of(IMAGES, 0), features_of(TESTED, 10)
    model = fitted(nominal, w_i=w_i, w_ig=w_ig, w=w)
    model.score_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 0.5]))
    model.score_std.copy_(torch.tensor([2.0, 4.0, 5.0, 0.1]))
    position = ("local", "global", "class", "patch").index(kind)
    raw = model.raw_scores(tested, model.patch_map(tested))
    expected = (raw[position] - model.score_mean[position]) / model.score_std[position]
    torch.testing.assert_close(model.image_score(raw), expected)


@torch.no_grad()
def test_scores_are_fused_on_one_scale() -> None:
    """Each is standardised before Eqs. 20 and 21."""
    model = fitted(features_of(IMAGES, 0), w_i=0.2, w_ig=0.6, w=0.5)
    model.score_mean.copy_(torch.tensor([30.0, 20.0, 10.0, 0.5]))
    model.score_std.copy_(torch.tensor([3.0, 2.0, 4.0, 0.1]))
    raw = [torch.tensor([36.0]), torch.tensor([18.0]), torch.tensor([14.0]), torch.tensor([0.8])]  # 2, -1, 1, 3
    expected = 0.5 * (0.8 * 2 + 0.2 * (0.4 * -1 + 0.6 * 1)) + 0.5 * 3
    assert model.image_score(raw).item() == pytest.approx(expected, rel=1e-5)


def gaussian(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur (H, W), mirrored at the border, to four standard deviations."""
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-np.square(np.arange(-reach, reach + 1) / sigma) / 2)
    kernel /= kernel.sum()
    padded = np.pad(image, reach, mode="reflect")
    lines = np.stack([np.convolve(line, kernel, mode="valid") for line in padded])
    return np.stack([np.convolve(line, kernel, mode="valid") for line in lines.T]).T


@torch.no_grad()
@pytest.mark.parametrize("switches", [{}, {"use_cnn": False}, {"use_vit": False}], ids=str)
def test_map_and_score_of_images(switches: dict) -> None:
    """Step 9, and the score, which is of the map before it is resized and blurred."""
    parts = {name: switches.get(name, True) for name in ("use_cnn", "use_vit")}
    nominal, tested = without(features_of(IMAGES, 0), **parts), without(features_of(TESTED, 10), **parts)
    model = fitted(nominal, w=1, **switches)
    model.extract = lambda _images: tested
    result = model(torch.zeros(TESTED, 3, *SIZE))
    patch_map = array(model.patch_map(tested))
    assert result.anomaly_map.shape == (TESTED, 1, *SIZE)
    for image in range(TESTED):
        expected = gaussian(bilinear(patch_map[image], SIZE)[0], 4)
        np.testing.assert_allclose(array(result.anomaly_map[image, 0]), expected, atol=1e-4)
        assert result.pred_score[image].item() == pytest.approx(patch_map[image].max(), rel=1e-5)
