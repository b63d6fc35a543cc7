"""Parameters and floating point operations.

A multiplication with its addition counts as two operations, as in the EfficientAD paper: by this count its networks
have the 76 and 235 x 10^9 of its Table 11. Papers that count one have half the number.
"""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from anomalib_pack.packing import unpacked


def parameter_count(network: nn.Module) -> int:
    """Number of values in all parameters, trained or not.

    Example:
        >>> parameter_count(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in network.parameters())


def learnable_count(network: nn.Module) -> int:
    """Number of values in the parameters that training changes.

    Example:
        >>> learnable_count(nn.Linear(3, 2).requires_grad_(False))
        0
    """
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def flops(network: nn.Module, images: torch.Tensor) -> int:
    """Operations of a pass in convolutions (transposed ones too), matrix products and attention.

    Args:
        network: In eval mode.
        images: (B, 3, H, W) on its device.

    Returns:
        Operations for the whole batch. What is not an operator of PyTorch is not counted, e.g. a search by FAISS.

    Example:
        >>> flops(nn.Linear(3, 2), torch.ones(1, 3))
        12
    """
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # an operator that the counter does not know
    try:
        # Not in inference mode: where a layer gets a parameter as its input, as FastFlow's do, the counter fails there.
        with torch.inference_mode(mode=False), torch.no_grad():
            network(images)  # the first pass also finds what can be folded
            # Attention as matrix products: PyTorch 2.10 does not count the fused operator of CPUs.
            with unpacked(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                network(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    return counter.get_total_flops()


def profiler_flops(network: nn.Module, images: torch.Tensor) -> int:
    """Operations of a pass as in the paper: `torch.profiler.profile(with_flops=True)`.

    It counts convolutions, matrix products, and additions and multiplications by element, but neither transposed
    convolutions nor fused attention.

    Args:
        network: In eval mode.
        images: (B, 3, H, W) on its device.

    Returns:
        Operations for the whole batch.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports its start and end on the console
    with unpacked(), profile(activities=[ProfilerActivity.CPU], with_flops=True) as prof:
        network(images)
    return sum(event.flops for event in prof.key_averages())
