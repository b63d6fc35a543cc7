"""Greedy k-centre coresets: the plain algorithm's choice, true radii, and choices that hold for points in parts."""

from decimal import Decimal

import numpy as np
import pytest
import torch

from anomalib_pack import coreset
from anomalib_pack.coreset import ChunkedCoreset, k_center_greedy
from anomalib_pack.packing import packs, unpacked


def points(count: int, dimension: int = 8, seed: int = 0) -> torch.Tensor:
    """Random points, among which no two distances are nearly the same."""
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


def plain_greedy(features: torch.Tensor, size: int) -> tuple[list[int], float]:
    """The algorithm as the books have it, one centre and all distances at a time, in float64."""
    array = features.double().numpy()
    chosen = [int(np.linalg.norm(array - array.mean(axis=0), axis=1).argmax())]
    nearest = np.linalg.norm(array - array[chosen[0]], axis=1)
    for _ in range(size - 1):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(array - array[chosen[-1]], axis=1))
    return chosen, nearest.max()


def covering_radius(features: torch.Tensor, centers: torch.Tensor) -> float:
    """Largest distance of a point from its nearest centre, from differences in float64."""
    return max(
        float(np.linalg.norm(centers.double().numpy() - point, axis=1).min()) for point in features.double().numpy()
    )


@pytest.fixture
def deep_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools in pools in pools, and distances in many parts, on a few hundred points."""
    monkeypatch.setattr(coreset, "POOL_SHARE", 3)
    monkeypatch.setattr(coreset, "POOL_END", 6)
    monkeypatch.setattr(coreset, "ROWS", 64)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 1), (2, 2), (50, 7), (700, 1), (700, 90), (700, 700)])
def test_choice_of_the_plain_algorithm(count: int, size: int) -> None:
    features = points(count)
    expected, expected_radius = plain_greedy(features, size)
    chosen, radius = k_center_greedy(features, size)
    assert chosen.tolist() == expected
    assert radius == pytest.approx(expected_radius, rel=1e-4, abs=1e-3)


@pytest.mark.usefixtures("deep_pools")
@pytest.mark.parametrize("size", [1, 2, 40, 199, 500])
def test_choice_with_pools_in_pools(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    depths = []
    choose = coreset._Selection.choose

    def counting(self: coreset._Selection, members: torch.Tensor, known: int, bound: float) -> None:
        depths.append(len(members))
        choose(self, members, known, bound)

    monkeypatch.setattr(coreset._Selection, "choose", counting)
    features = points(500)
    chosen, radius = k_center_greedy(features, size)
    assert chosen.tolist() == plain_greedy(features, size)[0]
    assert size == 1 or {500, 166, 55, 18, 6} <= set(depths)
    assert radius == pytest.approx(covering_radius(features, features[chosen]), rel=1e-4, abs=1e-3)


@pytest.mark.skipif(not packs(torch.rand(2, 3)), reason="needs oneDNN on an x86 processor")
def test_choice_with_packed_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as without them, and only centres are packed."""
    sizes = []
    pack = coreset.pack_matrix
    monkeypatch.setattr(coreset, "pack_matrix", lambda weight, rows: sizes.append(len(weight)) or pack(weight, rows))
    features = points(3000, 30)
    chosen, radius = k_center_greedy(features, 300)
    assert 32 <= min(sizes) <= max(sizes) < 300
    with unpacked():
        expected, expected_radius = k_center_greedy(features, 300)
    assert torch.equal(chosen, expected)
    assert chosen.tolist() == plain_greedy(features, 300)[0]
    assert radius == pytest.approx(expected_radius, rel=1e-5)


@pytest.mark.parametrize("clusters", [1, 3])
@pytest.mark.parametrize("pools", [False, True])
def test_more_centers_than_distinct_points(clusters: int, pools: bool, request: pytest.FixtureRequest) -> None:
    """All distances are zero then, and still no point is chosen twice."""
    if pools:
        request.getfixturevalue("deep_pools")
    features = points(clusters).repeat(40, 1)
    for size in (clusters + 1, 20, len(features)):
        chosen, radius = k_center_greedy(features, size)
        assert len(set(chosen.tolist())) == size
        assert len(features[chosen[:clusters]].unique(dim=0)) == clusters  # the distinct ones first
        assert radius == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("size", [3, 30, 299])
def test_radius_is_the_covering_radius(size: int) -> None:
    """Also far from the origin, where distances are small differences of large squares."""
    features = points(300) + 10
    chosen, radius = k_center_greedy(features, size)
    assert radius == pytest.approx(covering_radius(features, features[chosen]), rel=1e-3, abs=1e-2)


def test_radius_shrinks_with_every_centre() -> None:
    features = points(200)
    radii = [k_center_greedy(features, size)[1] for size in range(1, 200, 20)]
    assert radii == sorted(radii, reverse=True)


def test_nothing_is_random() -> None:
    features = points(600)
    torch.manual_seed(0)
    first, _ = k_center_greedy(features, 60)
    torch.manual_seed(1)
    assert torch.equal(k_center_greedy(features, 60)[0], first)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    k_center_greedy(points(20), 5)
    assert capsys.readouterr().err == ""
    k_center_greedy(points(20), 5, "Coreset")
    assert "Coreset: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_no_numbers(value: float) -> None:
    features = points(50)
    features[7, 3] = value
    with pytest.raises(ValueError, match="finite"):
        k_center_greedy(features, 5)


@pytest.mark.parametrize("size", [0, 51])
def test_size_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be from 1 to 50, the number of points, got {size}"):
        k_center_greedy(points(50), size)


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"ratio must be above 0 and at most 1, got {ratio}"):
        ChunkedCoreset(ratio)


def select(ratio: float, parts: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    chunked = ChunkedCoreset(ratio)
    for part in parts:
        chunked.add(part)
    return chunked.select()


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.7])
def test_parts_make_no_difference(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreset, "CHUNK", 150)
    features = points(640)  # three chunks and a longer one
    whole, bound = select(ratio, [features])
    for sizes in ([1] * 640, [149, 1, 150, 340], [7] * 91 + [3]):
        chosen, other_bound = select(ratio, list(features.split(sizes)))
        assert torch.equal(chosen, whole)
        assert other_bound == bound


@pytest.mark.parametrize("ratio", [0.013, 0.1, 0.29, 0.4, 0.9])
def test_shares_of_chunks(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk gives what the plain algorithm chooses; rounding never adds up, and the radius is at most theirs."""
    monkeypatch.setattr(coreset, "CHUNK", 200)
    features = points(790)
    chosen, bound = select(ratio, [features])
    assert len(chosen) == int(Decimal(str(ratio)) * 790)
    assert covering_radius(features, chosen) <= bound + 1e-3

    radii = []
    shares = torch.tensor([0, *(int(Decimal(str(ratio)) * seen) for seen in (200, 400, 790))]).diff().tolist()
    for chunk, share in zip(features.split([200, 200, 390]), chosen.split(shares), strict=True):
        indices, radius = plain_greedy(chunk, len(share))
        assert torch.equal(share, chunk[indices])
        radii.append(radius)
    assert bound == pytest.approx(max(radii), rel=1e-4, abs=1e-3)


def test_memory_is_that_of_two_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what waits nor what is kept grows with the training set beyond the coreset."""
    monkeypatch.setattr(coreset, "CHUNK", 100)
    chunked = ChunkedCoreset(0.02)
    for part in points(2000).split(30):
        chunked.add(part.clone())  # by itself in memory
        assert sum(map(len, chunked.waiting)) < 200
        assert sum(map(len, chunked.kept)) <= 0.02 * chunked.seen
        storages = [rows.untyped_storage().nbytes() for rows in (*chunked.waiting, *chunked.kept)]
        assert sum(storages) <= 8 * 4 * (200 + 0.02 * chunked.seen)


def test_a_single_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than two chunks are chosen from at once."""
    monkeypatch.setattr(coreset, "CHUNK", 200)
    features = points(399)
    expected, radius = k_center_greedy(features, 39)
    chosen, bound = select(0.1, list(features.split(64)))
    assert torch.equal(chosen, features[expected])
    assert bound == radius


@pytest.mark.parametrize("chunk", [100, 1000])
def test_ratio_one_keeps_all(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreset, "CHUNK", chunk)
    features = points(450)
    chosen, bound = select(1.0, list(features.split(40)))
    assert torch.equal(chosen, features)
    assert bound == 0


@pytest.mark.parametrize(("count", "kept"), [(30, 1), (95, 3)])
def test_at_least_one_point_of_each_chunk(count: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the radius is known."""
    monkeypatch.setattr(coreset, "CHUNK", 30)
    chosen, _ = select(0.001, [points(count)])
    assert chosen.shape == (kept, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    features = points(5000)
    on_cpu, cpu_radius = k_center_greedy(features, 400)
    on_gpu, gpu_radius = k_center_greedy(features.cuda(), 400)
    assert on_gpu.is_cuda
    assert on_gpu.tolist() == on_cpu.tolist()
    assert gpu_radius == pytest.approx(cpu_radius, rel=1e-4)
