"""Fake tensors on a GPU that need not be there, and a watch over what makes Python wait for one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# Their results are values, or have shapes that depend on values.
VALUES = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class WaitError(AssertionError):
    """Python would wait for the GPU, or a tensor is not there."""


class Watch(TorchDispatchMode):
    """Fails where a value is read, a shape depends on one, or a tensor is on another device than the GPU.

    Fake tensors alone allow some of it: copies to the CPU, and ``nonzero`` and masks where shapes may be unknown.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in VALUES:
            msg = f"{func} waits for values"
            raise WaitError(msg)
        if func.overloadpacket in INDEXING and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            msg = f"{func} with a mask waits for its values"
            raise WaitError(msg)
        result = func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device != DEVICE:
                msg = f"{func} has a tensor {tuple(tensor.shape)} on {tensor.device}"
                raise WaitError(msg)
        return result


def to_fake_gpu(module: nn.Module, mode: FakeTensorMode) -> None:
    """Exchange all parameters and buffers for fake ones on the GPU."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return FakeTensor(mode, torch.empty_like(tensor, device="meta"), DEVICE)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer)


@contextmanager
def gpu_precision(precision: torch.dtype) -> Iterator[None]:
    """Autocast on the GPU; float32 is none. ``torch.autocast`` switches itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", precision != torch.float32)
    if precision != torch.float32:
        torch.set_autocast_dtype("cuda", precision)
    try:
        matrix = torch.ones(2, 2, device=DEVICE)
        assert (matrix @ matrix).dtype == precision
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


def is_there(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Check a result."""
    assert (tensor.device, tuple(tensor.shape), tensor.dtype) == (DEVICE, shape, dtype)
