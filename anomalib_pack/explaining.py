"""Which branch of a model fired, in words."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def explain(scores: Mapping[str, Tensor]) -> list[str]:
    """Say for each image what the branches' scores are.

    Args:
        scores: Of each branch by its name, (B,).

    Example:
        >>> from torch import tensor
        >>> explain({"logical": tensor([0.834, 0.1]), "structural": tensor([0.12, 0.2])})
        ['logical 0.83, structural 0.12', 'logical 0.10, structural 0.20']
    """
    columns = [[f"{name} {score:.2f}" for score in values.tolist()] for name, values in scores.items()]
    return [", ".join(row) for row in zip(*columns, strict=True)]
