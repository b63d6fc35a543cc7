"""Quantiles of any number of scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

# torch.quantile of the oldest torch supported refuses more values than this, and sorting more takes seconds.
MAX_VALUES = 2**24


def quantiles(values: Tensor, q: Sequence[float]) -> Tensor:
    """Quantiles of all values, with the linear interpolation of ``torch.quantile``.

    Of more than 2^24 values a random sample of 2^24 (uniform, with replacement) stands in: without replacement it
    would need an index for every value, and the standard error of a quantile's rank is below 1.3e-4 either way. The
    sample is the same in every run and leaves the global random state alone.

    Args:
        values: Scores of any shape and floating dtype.
        q: Probabilities in [0, 1].

    Returns:
        Tensor of shape (len(q),) in float32 on the device of ``values``.

    Raises:
        ValueError: If ``values`` is empty or contains NaN.

    Example:
        >>> quantiles(torch.arange(5.0), [0.5, 0.9])
        tensor([2.0000, 3.6000])
    """
    if values.numel() == 0:
        msg = "Quantiles of no values do not exist: values is empty."
        raise ValueError(msg)
    values = values.detach().flatten()
    if (nan_count := int(values.isnan().sum())) > 0:
        msg = f"Quantiles need numbers: {nan_count} of {values.numel()} values are NaN."
        raise ValueError(msg)
    values = drawn(values, MAX_VALUES).float()
    return torch.quantile(values, torch.tensor(q, dtype=torch.float32, device=values.device))


def drawn(values: Tensor, count: int, seed: int = 0) -> Tensor:
    """Values (N,) themselves, or a random sample of ``count`` if they are more: uniform, with replacement.

    The sample is the same in every run, and the global random state is left alone.
    """
    if values.numel() <= count:
        return values
    # Drawn on the CPU, because each kind of device has a random sequence of its own.
    index = torch.randint(values.numel(), (count,), generator=torch.Generator().manual_seed(seed))
    return values[index.to(values.device)]
