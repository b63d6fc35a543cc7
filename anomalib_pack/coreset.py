"""Greedy k-centre coresets, in bounded memory for any training set.

The greedy algorithm (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance"; PatchCore, Alg. 1)
adds the point farthest from all centres so far. Its covering radius is at most twice the smallest possible one.
"""

from __future__ import annotations

import torch
from tqdm import tqdm

from .checks import require
from .packing import linear, pack_matrix, pays
from .progress import progress_bar
from .shares import whole_share

POOL_SHARE = 3  # ours: a pool is one part in so many of its points
POOL_END = 512  # ours: points of the smallest pool, few enough that a centre's step stays in the processor's cache
ROWS = 1024  # ours: points updated at a time, for the same reason
CHUNK = 2**15  # ours: points chosen from at a time, or up to twice as many; 128 MiB with 1024 channels
CHOSEN = -1.0  # in place of a centre's squared distance from itself, so that it is never chosen again


def k_center_greedy(features: torch.Tensor, size: int, description: str | None = None) -> tuple[torch.Tensor, float]:
    """Choose points by the greedy k-centre algorithm.

    The choice is that of the plain algorithm, which updates every point's distance after each centre. Distances only
    shrink, so as long as the farthest point of a pool of far points is farther than all others were when last updated,
    it is the next centre. The others are updated for many centres at once, which is a matrix product instead of a
    matrix-vector product for each, and those that the coreset has covered by then are never updated again. Pools have
    pools of their own.

    The first centre is the point farthest from the mean, so no random number is needed.

    Args:
        features: Floats, (N, D).
        size: Number of points to choose, from 1 to N.
        description: Label of a progress bar; none without.

    Returns:
        Indices of the points in the order of their choice (size,), and the covering radius: the largest Euclidean
        distance of a point from its nearest centre.

    Raises:
        ValueError: If ``size`` is out of range, or a feature is NaN or infinite.

    Example:
        >>> chosen, radius = k_center_greedy(torch.tensor([[0.0], [1.0], [8.0], [10.0]]), 2)
        >>> chosen.tolist(), radius
        ([3, 0], 2.0)
    """
    require("size", size, 1 <= size <= len(features), f"from 1 to {len(features)}, the number of points")
    with progress_bar(total=size, desc=description, disable=description is None) as progress:
        selection = _Selection(features, size, progress)
        selection.run()
    if selection.count < size:  # distances that are not numbers are no farther than anything
        msg = "A coreset needs finite features. Check the network's weights, or use 32-bit precision."
        raise ValueError(msg)
    return selection.chosen, selection.distances.max().clamp_min(0).sqrt().item()


class _Selection:
    """The centres chosen so far, and every point's squared distance from the nearest of those it was compared with."""

    def __init__(self, features: torch.Tensor, size: int, progress: tqdm) -> None:
        self.features = features
        self.squares = torch.linalg.vector_norm(features, dim=1).square()
        self.distances = torch.full_like(self.squares, torch.inf)
        self.chosen = torch.empty(size, dtype=torch.long, device=features.device)
        self.size, self.count, self.progress = size, 0, progress

    def run(self) -> None:
        """Choose all centres."""
        points = torch.arange(len(self.features), device=self.features.device)
        first = torch.addmv(self.squares, self.features, self.features.mean(dim=0), alpha=-2).argmax()
        self.add(first)
        self.distances[first] = CHOSEN
        self.update(points, known=0)
        self.choose(points, known=1, bound=0.0)

    def add(self, point: torch.Tensor) -> None:
        self.chosen[self.count] = point
        self.count += 1
        self.progress.update()

    def choose(self, points: torch.Tensor, known: int, bound: float) -> None:
        """Choose centres among points as long as the farthest has at least the squared distance ``bound``.

        On return the largest of their distances is exact or below ``bound``; the others are upper limits.

        Args:
            points: Indices, (n,).
            known: Number of the centres these points were compared with.
            bound: What the squared distances of all other points are at most.
        """
        if len(points) <= POOL_END:
            self.choose_one_by_one(points, bound)
            return
        while self.count < self.size and self.distances[points].max() >= bound:
            distances, order = self.distances[points].sort(descending=True)
            pool, others = points[order].tensor_split([len(points) // POOL_SHARE])
            pool_bound = max(bound, distances[len(pool)].item())
            self.choose(pool, known, pool_bound)
            if self.count == self.size and self.distances[pool].max() >= pool_bound:
                return
            self.update(others, known)
            known = self.count

    def choose_one_by_one(self, points: torch.Tensor, bound: float) -> None:
        """The same with distances updated after each centre."""
        features, squares, distances = self.features[points], self.squares[points], self.distances[points]
        largest, farthest = distances.max(dim=0)
        while self.count < self.size and largest >= bound:
            self.add(points[farthest])
            new = torch.addmv(squares + squares[farthest], features, features[farthest], alpha=-2)
            distances = torch.minimum(distances, new.clamp_min_(0))
            distances[farthest] = CHOSEN
            largest, farthest = distances.max(dim=0)
        self.distances[points] = distances

    def update(self, points: torch.Tensor, known: int) -> None:
        """Compare points with the centres chosen since there were ``known`` of them."""
        centers = self.chosen[known : self.count]
        features, squares = -2 * self.features[centers], self.squares[centers]
        if pays(self.features, features):
            features = pack_matrix(features, min(ROWS, len(points)))
        for rows in points.split(ROWS):
            sums = linear(self.features.index_select(0, rows), features, squares)
            nearest = (sums.amin(dim=1) + self.squares[rows]).clamp_min_(0)
            self.distances[rows] = torch.minimum(self.distances[rows], nearest)


class ChunkedCoreset:
    """Coreset of points that come in parts and need not fit into memory together.

    Points are collected to chunks of ``CHUNK``, of which each gives its share to the coreset by the greedy algorithm.
    The last chunk may have up to twice as many. Memory is that of two chunks and of the coreset.

    The coreset's covering radius is at most the largest of the chunks', which is known. A chunk's is at most twice the
    smallest possible one for its share (Gonzalez); beside a coreset chosen from all points at once,
    ``benchmarks/memory_bank.py chunks`` has figures, also for choosing once more among what the chunks gave.

    Args:
        ratio: Share of the points to keep, above 0 and up to 1.

    Raises:
        ValueError: If ``ratio`` is out of range.

    Example:
        >>> coreset = ChunkedCoreset(0.1)
        >>> for points in torch.rand(1000, 3).split(250):
        ...     coreset.add(points)
        >>> chosen, bound = coreset.select()
        >>> chosen.shape
        torch.Size([100, 3])
    """

    def __init__(self, ratio: float) -> None:
        require("ratio", ratio, 0 < ratio <= 1, "above 0 and at most 1")
        self.ratio = ratio
        self.waiting: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []
        self.seen = 0
        self.radius = 0.0

    def add(self, points: torch.Tensor) -> None:
        """Take points (n, D). Where the parts begin and end makes no difference."""
        self.seen += len(points)
        self.waiting.append(points)
        while (count := sum(map(len, self.waiting))) >= 2 * CHUNK:
            chunk, rest = torch.cat(self.waiting).split([CHUNK, count - CHUNK])
            self.waiting = [rest.clone()]
            self._keep(chunk, seen=self.seen - len(rest))

    def _keep(self, chunk: torch.Tensor, seen: int, description: str | None = None) -> None:
        """Choose as many of a chunk as are missing after so many points were seen."""
        size = max(1, whole_share(self.ratio, seen) - sum(map(len, self.kept)))
        if size < len(chunk):
            chosen, radius = k_center_greedy(chunk, size, description)
            self.radius = max(self.radius, radius)
            chunk = chunk[chosen]
        self.kept.append(chunk)

    def select(self, description: str | None = None) -> tuple[torch.Tensor, float]:
        """Choose from the last points, and put the coreset together.

        Points must have been added.

        Args:
            description: Label of a progress bar; none without.

        Returns:
            The coreset (K, D), where K = floor(ratio * number of points), but at least 1 of each chunk, and an upper
            bound of its covering radius.
        """
        last, self.waiting = torch.cat(self.waiting), []
        self._keep(last, self.seen, description)
        return torch.cat(self.kept), self.radius
