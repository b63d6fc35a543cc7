"""Which images matter most: mistakes that are far from the threshold, then whatever is near to it."""

from __future__ import annotations

from anomalib_pack.report.runs import Image, Run


def by_interest(run: Run) -> list[tuple[tuple[int, float], int]]:
    """Rank of each image of a run, the lowest first, and its position.

    The page sorts by the same rule when the threshold is moved; distances are shares of the run's range of scores, so
    that runs of different models can be compared.
    """
    scores = [image.raw_score for image in run.images if image.raw_score is not None]
    extent = max(scores) - min(scores) if scores else 0.0
    ranks = [(_rank(image, run.raw_threshold, extent or 1.0), index) for index, image in enumerate(run.images)]
    return sorted(ranks)


def is_mistake(rank: tuple[int, float]) -> bool:
    """Whether a rank is one of a miss or a false alarm."""
    return rank[0] == 0


def _rank(image: Image, threshold: float | None, extent: float) -> tuple[int, float]:
    if image.raw_score is None:
        return 2, 0.0
    if threshold is None:
        return 1, -image.raw_score / extent
    distance = abs(image.raw_score - threshold) / extent
    if image.label is not None and image.predicted is not None and image.label != image.predicted:
        return 0, -distance
    return 1, distance
