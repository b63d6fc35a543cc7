"""Peak memory of passes, and the size of a memory bank."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

MIB = 2**20
PROCESS = Path("/proc/self")  # Linux


def reset_peak(device: torch.device) -> None:
    """Start anew with the peak that :func:`peak_mib` returns."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # some containers forbid it: then the peak is that of the process since its start
        (PROCESS / "clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float | None:
    """Peak memory in MiB since :func:`reset_peak`.

    Returns:
        On CUDA what PyTorch has reserved on the device (Sec. 5: `reserved_bytes.all.peak`); on a CPU the resident
        memory of the process, Python and its modules included. None on a CPU without `/proc`.
    """
    if device.type == "cuda":
        return round(torch.cuda.memory_stats(device)["reserved_bytes.all.peak"] / MIB, 1)
    with suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())
        return round(int(match[1]) / 1024, 1) if match else None
    return None


def bank_size(network: nn.Module, names: list[str]) -> dict[str, Any]:
    """Size of the memory bank that some buffers make up.

    Returns:
        The shapes in words, the number of values, which the paper adds to that of the parameters, and MiB. Without a
        bank an empty string and zeros.

    Example:
        >>> network = nn.Module()
        >>> network.register_buffer("memory_bank", torch.zeros(4096, 64))
        >>> bank_size(network, ["memory_bank"])
        {'bank': '4096 x 64', 'bank_values': 262144, 'bank_mib': 1.0}
    """
    buffers = [network.get_buffer(name) for name in names]
    return {
        "bank": " + ".join(" x ".join(map(str, buffer.shape)) for buffer in buffers),
        "bank_values": sum(buffer.numel() for buffer in buffers),
        "bank_mib": round(sum(buffer.nbytes for buffer in buffers) / MIB, 2),
    }
