"""Weights of a model's scores, chosen on normal and anomalous images, and whether that is worth it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from anomalib.models import AnomalibModule
from torch import Tensor

LEAST = 8  # images of each kind: then a half has four
STEPS = 11  # ours: 0, 0.1, ... 1, as in UniSLAD's authors' table
SPLITS = 10  # ours: random splits into halves, each half once to choose on and once to compare on
ROUNDING = 1e-9  # of a mean of equal numbers

Weights = tuple[float, ...]


class WeighsScores(Protocol):
    """A model whose image score weighs several scores, with weights that nobody can know beforehand."""

    score_weights: dict[str, float]  # by the name of the constructor's argument, each from 0 to 1

    def scores_to_weigh(self, images: Tensor) -> Tensor:
        """Scores before they are weighed, (n, ...), of images (n, 3, H, W)."""

    def weighed(self, scores: Tensor, weights: dict[str, float]) -> Tensor:
        """Image scores (n,) by these weights."""


@dataclass(frozen=True)
class Choice:
    """Weights, and what they are worth.

    Attributes:
        weights: Those that are chosen on all images.
        before: Mean image AUROC, on halves, of the weights so far.
        after: Mean image AUROC, on halves, of the weights that are chosen on the other halves.
        spread: Standard deviation of the difference over the halves.
    """

    weights: Weights
    before: float
    after: float
    spread: float

    @property
    def pays(self) -> bool:
        """Whether the gain is above the spread."""
        return self.after - self.before > self.spread


def check_weights(model: AnomalibModule, normal: int, anomalous: int) -> None:
    """Check that weights can be chosen.

    Raises:
        ValueError: If the model has none, or there are fewer than 8 images of a kind.
    """
    if not hasattr(model, "score_weights"):
        msg = f"--weights is for models that weigh several scores, such as Unislad; {model.name} does not."
        raise ValueError(msg)
    if min(normal, anomalous) < LEAST:
        msg = f"--weights needs at least {LEAST} normal and {LEAST} anomalous images, got {normal} and {anomalous}."
        raise ValueError(msg)


def grid(count: int) -> list[Weights]:
    """All weights that are tried: each from 0 to 1 in steps of 0.1."""
    return list(product([step / (STEPS - 1) for step in range(STEPS)], repeat=count))


def choose(score: Callable[[Weights, Tensor], Tensor], now: Weights, normal: Tensor, anomalous: Tensor) -> Choice:
    """Choose weights by the image AUROC, and compare them with those so far on images that did not choose them.

    Normal and anomalous images are split into halves. On one half the weights with the best AUROC are chosen, on the
    other one their AUROC is compared with that of the weights so far; then the halves change places. Of several best
    ones those nearest to the weights so far are taken.

    Args:
        score: Image scores (n,) by weights, of scores before they are weighed.
        now: Weights so far.
        normal: Scores of the normal images before they are weighed, (n, ...).
        anomalous: Those of the anomalous images.

    Returns:
        The weights that are the best on all images, and what the comparison says.
    """
    tried = [now, *grid(len(now))]
    tried.sort(key=lambda weights: sum((one - other) ** 2 for one, other in zip(weights, now, strict=True)))
    table = [torch.stack([score(weights, parts) for weights in tried]) for parts in (normal, anomalous)]  # (tried, n)
    pairs = []  # AUROC on a half of the weights so far, which come first, and of those chosen on the other half
    generator = torch.Generator().manual_seed(0)
    for _ in range(SPLITS):
        halves = list(zip(*(_halves(scores.shape[1], generator) for scores in table), strict=True))
        for chosen_on, compared_on in (halves, halves[::-1]):
            best = int(_aurocs(table, chosen_on).argmax())
            pairs.append(_aurocs([scores[[0, best]] for scores in table], compared_on))
    before, after = torch.stack(pairs).double().unbind(dim=1)
    best = int(auroc(*table).argmax())
    return Choice(tried[best], float(before.mean()), float(after.mean()), float((after - before).std()) + ROUNDING)


def auroc(normal: Tensor, anomalous: Tensor) -> Tensor:
    """Area under the ROC curve of each row: the share of pairs in which the anomaly has the higher score.

    Args:
        normal: (rows, n).
        anomalous: (rows, m).

    Example:
        >>> auroc(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 3.0]]))
        tensor([0.8750])
    """
    ordered = normal.sort(dim=1).values
    below = torch.searchsorted(ordered, anomalous.contiguous())
    up_to = torch.searchsorted(ordered, anomalous.contiguous(), right=True)
    return (below + up_to).float().mean(dim=1) / (2 * normal.shape[1])


def _halves(count: int, generator: torch.Generator) -> Sequence[Tensor]:
    return torch.randperm(count, generator=generator).tensor_split(2)


def _aurocs(table: Sequence[Tensor], which: Sequence[Tensor]) -> Tensor:
    return auroc(*(scores[:, index] for scores, index in zip(table, which, strict=True)))
