"""What a measurement ran on."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = {"anomalib_pack": "anomalib-pack", "anomalib": "anomalib", "torch": "torch", "timm": "timm"}
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11")  # distributions of the module


def environment(device: torch.device) -> dict[str, Any]:
    """Device, its name, number of CPU threads, and versions; an empty version where a library is not installed."""
    versions = library_versions()
    faiss = next(filter(None, map(_version, FAISS)), "")
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        **versions,
        "faiss": faiss,
        "cuda": torch.version.cuda if device.type == "cuda" else "",
        "python": platform.python_version(),
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on; an empty one where a library is not installed."""
    return {name: _version(distribution) for name, distribution in LIBRARIES.items()}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")  # Linux, where `platform` knows the architecture only
    match = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return match[1] if match else platform.processor() or platform.machine()
