"""Greedy k-centre coresets, in bounded memory for any training set.

The greedy algorithm (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance"; PatchCore, Alg. 1)
adds the point farthest from all centres so far. Its covering radius is at most twice the smallest possible one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

POOL_SHARE = 16  # ours: a pool is this part of its level; each pool then lasts for tens of centres
POOL_END = 512  # ours: rows of the smallest pool, small enough that a centre's step stays in the processor's cache
ROWS = 8192  # rows of a distance matrix made at a time
CHUNK = 2**16  # ours: points chosen from at a time; 256 MiB with 1024 channels
CHOSEN = -1.0  # in place of a centre's squared distance from itself, so that it is never chosen again
OVERSAMPLING = 2  # ours: benchmarks/memory_bank.py chunks


def k_center_greedy(features: torch.Tensor, size: int, description: str | None = None) -> tuple[torch.Tensor, float]:
    """Choose points by the greedy k-centre algorithm.

    The choice is that of the plain algorithm, which updates every point's distance after each centre. Distances only
    shrink, so as long as the farthest point of a pool of far points is farther than all others were when last updated,
    it is the next centre. The others are updated for many centres at once, which is a matrix product instead of a
    matrix-vector product for each. Pools have pools of their own.

    The first centre is the point farthest from the mean, so no random number is needed.

    Args:
        features: Floats, (N, D).
        size: Number of points to choose, from 1 to N.
        description: Label of a progress bar; none without.

    Returns:
        Indices of the points in the order of their choice (size,), and the covering radius: the largest Euclidean
        distance of a point from its nearest centre.

    Raises:
        ValueError: If a feature is NaN or infinite.

    Example:
        >>> chosen, radius = k_center_greedy(torch.tensor([[0.0], [1.0], [8.0], [10.0]]), 2)
        >>> chosen.tolist(), radius
        ([3, 0], 2.0)
    """
    with tqdm(total=size, desc=description, disable=description is None) as progress:
        centers = _Centers(features, size, progress)
        points = _Points(
            features=features,
            squares=torch.linalg.vector_norm(features, dim=1).square(),
            indices=torch.arange(len(features), device=features.device),
            distances=features.new_full((len(features),), torch.inf),
        )
        points.distances[centers.chosen[0]] = CHOSEN
        points.update(centers)
        points.choose(centers, bound=0.0)
    if centers.count < size:  # distances that are not numbers are no farther than anything
        msg = "A coreset needs finite features. Check the network's weights, or use 32-bit precision."
        raise ValueError(msg)
    return centers.chosen, points.distances.max().clamp_min(0).sqrt().item()


class _Centers:
    """The centres chosen so far, with a copy of their features in the order of choice."""

    def __init__(self, features: torch.Tensor, size: int, progress: tqdm) -> None:
        self.features = features.new_empty(size, features.shape[1])
        self.squares = features.new_empty(size)
        self.chosen = torch.empty(size, dtype=torch.long, device=features.device)
        self.size, self.count, self.progress = size, 0, progress
        first = (features - features.mean(dim=0)).square().sum(dim=1).argmax()
        self.add(first, features[first])

    def add(self, index: torch.Tensor, feature: torch.Tensor) -> None:
        self.chosen[self.count] = index
        self.features[self.count] = feature
        self.squares[self.count] = feature.square().sum()
        self.count += 1
        self.progress.update()


@dataclass
class _Points:
    """Points with their squared distances from the nearest of the first ``known`` centres."""

    features: torch.Tensor  # (n, D)
    squares: torch.Tensor  # (n,)
    indices: torch.Tensor  # (n,), among all points
    distances: torch.Tensor  # (n,)
    known: int = 0

    def choose(self, centers: _Centers, bound: float) -> None:
        """Choose centres among these points as long as the farthest has at least the squared distance ``bound``."""
        while centers.count < centers.size and self.distances.max() >= bound:
            if len(self.features) > POOL_END:
                self.choose_from_pool(centers, bound)
            else:
                farthest = self.distances.argmax()
                centers.add(self.indices[farthest], self.features[farthest])
                self.distances[farthest] = CHOSEN
            self.update(centers)

    def choose_from_pool(self, centers: _Centers, bound: float) -> None:
        """The same among the farthest of the points, as long as no other one can be farther."""
        distances, farthest = self.distances.topk(len(self.features) // POOL_SHARE + 1)
        members = farthest[:-1]
        pool = _Points(self.features[members], self.squares[members], self.indices[members], distances[:-1], self.known)
        pool.choose(centers, max(bound, distances[-1].item()))
        self.distances[members] = pool.distances

    def update(self, centers: _Centers) -> None:
        """Take the centres into account that were chosen since the last update."""
        new = slice(self.known, centers.count)
        for start in range(0, len(self.features), ROWS):
            rows = slice(start, start + ROWS)
            products = torch.addmm(centers.squares[new], self.features[rows], centers.features[new].T, alpha=-2)
            nearest = (products.amin(dim=1) + self.squares[rows]).clamp_min_(0)
            self.distances[rows] = torch.minimum(self.distances[rows], nearest)
        self.known = centers.count


class ChunkedCoreset:
    """Coreset of points that come in parts and need not fit into memory together.

    Points are collected to chunks of ``CHUNK``. From each chunk ``OVERSAMPLING`` times as many are kept as the coreset
    will have of it; the coreset is chosen among these. Memory is that of a chunk and of ``OVERSAMPLING`` + 1 coresets.
    A single chunk needs no first choice.

    With r_1 the largest covering radius of the chunks' choices and r_2 that of the second choice among the points kept,
    every point lies within r_1 + r_2 of the coreset. As r_2 is at most twice the smallest possible radius (Gonzalez),
    the radius is at most r_1 plus twice that of a coreset chosen from all points at once.

    Args:
        ratio: Share of the points to keep, above 0 and up to 1.

    Example:
        >>> coreset = ChunkedCoreset(0.1)
        >>> for points in torch.rand(1000, 3).split(250):
        ...     coreset.add(points)
        >>> chosen, bound = coreset.select()
        >>> chosen.shape
        torch.Size([100, 3])
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.waiting: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []
        self.seen = 0
        self.radius = 0.0

    def add(self, points: torch.Tensor) -> None:
        """Take points (n, D). Where the parts begin and end makes no difference."""
        self.seen += len(points)
        self.waiting.append(points)
        while (count := sum(map(len, self.waiting))) > CHUNK:
            chunk, rest = torch.cat(self.waiting).split([CHUNK, count - CHUNK])
            self._keep(chunk)
            self.waiting = [rest.clone()]

    def _keep(self, chunk: torch.Tensor) -> None:
        size = math.ceil(OVERSAMPLING * self.ratio * len(chunk))
        if size < len(chunk):
            chosen, radius = k_center_greedy(chunk, size)
            self.radius = max(self.radius, radius)
            chunk = chunk[chosen]
        self.kept.append(chunk)

    def select(self, description: str | None = None) -> tuple[torch.Tensor, float]:
        """Choose the coreset.

        Args:
            description: Label of a progress bar; none without.

        Returns:
            The coreset (K, D) with K = floor(ratio * number of points), at least 1, and the upper bound r_1 + r_2 of
            its covering radius.
        """
        if self.kept:
            self._keep(torch.cat(self.waiting))
            self.waiting = self.kept
        points = torch.cat(self.waiting)
        self.waiting, self.kept = [], []
        size = max(1, int(self.ratio * self.seen))
        if size >= len(points):
            return points, self.radius
        chosen, radius = k_center_greedy(points, size, description)
        return points[chosen], self.radius + radius
