"""State that stays in float32 in a network of half precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Float32State:
    """Mixin for modules of measured numbers; stands before ``nn.Module``.

    Their parameters and buffers, and those of the modules in them, stay in float32 when ``half()``, ``bfloat16()`` or
    ``to(dtype)`` changes the networks around. In half precision a small variance may be 0, and two quantiles one.

    Example:
        >>> class Mean(Float32State, nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("mean", torch.zeros(2))
        >>> nn.Sequential(Mean()).half()[0].mean.dtype
        torch.float32
    """

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def as_whole_numbers(tensor: torch.Tensor) -> torch.Tensor:
            """A change of precision leaves these alone, other devices take them."""
            if tensor.dtype != torch.float32:
                return function(tensor)
            return function(tensor.view(torch.int32)).view(torch.float32)

        return super()._apply(as_whole_numbers, recurse)
