"""Weights in the layout in which oneDNN computes, so that a CPU does not rearrange them in each pass.

oneDNN computes PyTorch's convolutions on a CPU, from a copy of the kernel in a layout of its own, which PyTorch lets it
make in each pass. Matrix products PyTorch leaves to MKL, which on AMD processors is half as fast. Here both are
oneDNN's, from copies that are made once: by the operators that PyTorch's own compiler takes for networks whose weights
are frozen. Results differ from PyTorch's by rounding. Figures: docs/efficiency.md.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from timm.layers import Conv2dSame, pad_same
from torch import nn
from torch.nn import functional as F  # noqa: N812

PROCESSORS = ("x86_64", "amd64")  # on which this was measured
FEW = 32  # rows, on either side of a product, below which packing costs more than it saves; ours
_wanted = ContextVar("wanted", default=True)


def packs(weight: torch.Tensor) -> bool:
    """Whether a weight is to be packed: where it can be, but for :func:`unpacked`."""
    return _wanted.get() and packable(weight)


def packable(weight: torch.Tensor) -> bool:
    """Whether a weight can be packed: on x86 CPUs in float32, outside autocast, whose precision would be another."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and platform.machine().lower() in PROCESSORS
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


@contextmanager
def unpacked() -> Iterator[None]:
    """Compute with PyTorch's usual operators, which PyTorch's profiler and counter of operations know.

    Example:
        >>> with unpacked():
        ...     packs(torch.rand(2, 3))
        False
    """
    token = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(token)


def pack_matrix(weight: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """Pack the weight of a linear layer, for :func:`linear`.

    Args:
        weight: (D, C), one that :func:`packs` says yes to, in any layout.
        rows: For how many rows the layout is chosen.

    Returns:
        The weight in oneDNN's own layout (``is_mkldnn``).
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear`` of rows (..., C) with a weight (D, C) that may be packed, and a bias (D,).

    With gradients all products are oneDNN's where weights would be packed without.
    """
    if weight.is_mkldnn:
        return _multiply(rows, weight, bias)
    if _trains(rows, weight):
        result = OnednnLinear.apply(rows.reshape(-1, rows.shape[-1]), weight.contiguous(), bias)
        return result.view(*rows.shape[:-1], -1)  # here, so that it can be written to
    return F.linear(rows, weight, bias)


def _multiply(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    bias = None if bias is None else bias.contiguous()  # oneDNN does not look
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def linear_gelu(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``F.gelu(linear(rows, weight, bias))`` of a packed weight, without what is in between as a tensor."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias.contiguous(), "gelu", [], "none")


def linear_add(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, summand: torch.Tensor) -> torch.Tensor:
    """``linear(rows, weight, bias) + summand`` (..., D) of a packed weight, without what is in between as a tensor."""
    return torch.ops.mkldnn._linear_pointwise.binary(rows, summand, weight, bias.contiguous(), "add")


def pays(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether to pack a weight (D, C) for one product with rows (..., C): not for few, nor where it is recorded."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or rows.requires_grad:
        return False
    return min(rows.shape[:-1].numel(), len(weight)) >= FEW and packs(weight)


def product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``rows @ matrix`` of (..., C) and (C, D), packed where that pays."""
    return linear(rows, pack_matrix(matrix.T)) if pays(rows, matrix.T) else rows @ matrix


def _trains(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad) and packs(weight) and not recorded


class OnednnLinear(torch.autograd.Function):
    """``F.linear`` by oneDNN, which is given the weight as it is, also transposed. So are its gradients."""

    @staticmethod
    def forward(context: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply.

        Args:
            context: For the backward pass.
            rows: (R, C).
            weight: (D, C), contiguous, or the transpose of such a matrix.
            bias: (D,), or ``None``.

        Returns:
            (R, D).
        """
        context.save_for_backward(rows, weight)
        return _multiply(rows, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of rows, weight and bias, which have gradients themselves."""
        rows, weight = context.saved_tensors
        of_rows, of_weight, of_bias = context.needs_input_grad
        ours, theirs = gradient.contiguous().t(), rows.contiguous().t()  # (D, R), (C, R)
        return (
            OnednnLinear.apply(gradient, weight.contiguous().t(), None) if of_rows else None,
            _outer(ours, theirs) if of_weight else None,
            ours.sum(1) if of_bias else None,
        )


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply left (D, R) and right (C, R): (D, C). The first factor is copied: the smaller one."""
    if len(left) > len(right):
        return OnednnLinear.apply(right, left, None).t()
    return OnednnLinear.apply(left, right, None)


class Linear(nn.Linear):
    """A linear layer that is trained by :func:`linear`."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows (..., C): (..., D)."""
        return linear(rows, self.weight, self.bias)


def pack(layer: nn.Module, size: Sequence[int]) -> None:
    """Let a layer compute from a packed copy of its weight.

    It stays the layer that it is, with its weight, but for its ``forward``. It no longer sees changes of the weight,
    and gives no gradients.

    Args:
        layer: One of the types in :data:`FORWARDS`, with a weight that :func:`packs` says yes to.
        size: Of the input for which the layout is chosen; others are computed as well.
    """
    layer.forward = FORWARDS[type(layer)](layer, size)


@runtime_checkable
class PacksItself(Protocol):
    """A module with weights that are no layers of :data:`FORWARDS`."""

    def pack_weights(self) -> None:
        """Compute, from now on, by packed copies of the weights as they are; called on copies of the module only."""


def is_packable(layer: nn.Module) -> bool:
    """Whether :func:`pack` knows this layer."""
    padding = getattr(layer, "padding", 0), getattr(layer, "padding_mode", "zeros")
    return type(layer) in FORWARDS and not isinstance(padding[0], str) and padding[1] == "zeros"


def _linear(layer: nn.Linear, size: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    rows = torch.Size(size[:-1]).numel()
    return partial(linear, weight=pack_matrix(layer.weight, rows), bias=layer.bias)


def _convolution(layer: nn.Conv2d, size: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    geometry = [layer.padding, layer.stride, layer.dilation, layer.groups]
    weight = torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach().contiguous(), *geometry, size)
    return partial(_run, torch.ops.mkldnn._convolution_pointwise, weight, layer.bias, geometry)


def _same_convolution(layer: Conv2dSame, size: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    convolve = _convolution(layer, size)
    return lambda maps: convolve(pad_same(maps, layer.kernel_size, layer.stride, layer.dilation))


def _transposed_convolution(layer: nn.ConvTranspose2d, size: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    geometry = [layer.padding, layer.output_padding, layer.stride, layer.dilation, layer.groups]
    weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(layer.weight.detach().contiguous(), *geometry, size)
    return partial(_run, torch.ops.mkldnn._convolution_transpose_pointwise, weight, layer.bias, geometry)


def _run(
    operator: Callable, weight: torch.Tensor, bias: torch.Tensor | None, geometry: list, maps: torch.Tensor
) -> torch.Tensor:
    bias = None if bias is None else bias.contiguous()
    return operator(maps, weight, bias, *geometry, "none", [], "")


FORWARDS: dict[type[nn.Module], Callable] = {
    nn.Linear: _linear,
    Linear: _linear,
    nn.Conv2d: _convolution,
    Conv2dSame: _same_convolution,
    nn.ConvTranspose2d: _transposed_convolution,
}
