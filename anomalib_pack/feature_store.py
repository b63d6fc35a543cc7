"""Tensors of every training image, in memory or on disk, shared by the processes of a machine.

Nothing here has a name in a file system, so that nothing is left behind, however a process ends: memory is mapped
without a file or in a file of memory, and a file on disk is a ``TemporaryFile``, in the folder that ``TMPDIR`` names.
Several processes open the first one's files through ``/proc``, which Linux has.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from lightning import Trainer

from .training import gather_objects

GB = 10**9
FREE_SHARE = 0.5  # ours: of what is free, where the user sets no budget
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # the limits of a container


class Rows:
    """What one tensor of a batch holds for each image, kept in the order that it has in memory.

    Convolutions of channels-last tensors round differently, so what is read is laid out as what was written.

    Args:
        block: Bytes of all images.
        example: A tensor of a batch, (B, ...).
    """

    def __init__(self, block: torch.Tensor, example: torch.Tensor) -> None:
        strides = example.stride()
        self.order = [0, *sorted(range(1, example.ndim), key=lambda dimension: -strides[dimension])]
        self.inverse = [self.order.index(dimension) for dimension in range(example.ndim)]
        shape = [example.shape[dimension] for dimension in self.order[1:]]
        self.values = block.view(example.dtype).view(-1, *shape)

    def write(self, rows: torch.Tensor, tensor: torch.Tensor) -> None:
        """Keep the tensor of a batch."""
        self.values[rows] = tensor.detach().permute(self.order).to("cpu")

    def read(self, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Give the tensor of a batch."""
        values = self.values[rows]
        if device.type == "cuda":  # from pinned memory nobody waits for the copy
            values = values.pin_memory()
        return values.to(device, non_blocking=True).permute(self.inverse)


class FeatureStore:
    """Tensors by the path of the image.

    Args:
        paths: Paths of all images, each once.
        examples: The tensors of a batch.
        blocks: Memory of :func:`open_blocks`, of the sizes that :meth:`sizes` gives.
    """

    def __init__(self, paths: Sequence[str], examples: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor]) -> None:
        self._row_of = {path: row for row, path in enumerate(paths)}
        self._is_there = blocks[0].view(torch.bool)
        self._tensors = [Rows(block, example) for block, example in zip(blocks[1:], examples, strict=True)]

    @staticmethod
    def sizes(count: int, examples: Sequence[torch.Tensor]) -> list[int]:
        """Bytes of each block for this number of images."""
        return [count, *(count * example[0].numel() * example.element_size() for example in examples)]

    @property
    def complete(self) -> bool:
        """Whether all images are there."""
        return bool(self._is_there.all())

    def write(self, paths: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        """Keep what belongs to images; it is the same whoever writes it."""
        rows = self._rows(paths)
        for kept, tensor in zip(self._tensors, tensors, strict=True):
            kept.write(rows, tensor)
        self._is_there[rows] = True

    def read(self, paths: Sequence[str], device: torch.device) -> list[torch.Tensor]:
        """Give what was kept of images, in tensors of one's own."""
        rows = self._rows(paths)
        return [kept.read(rows, device) for kept in self._tensors]

    def _rows(self, paths: Sequence[str]) -> torch.Tensor:
        return torch.tensor([self._row_of[path] for path in paths])


def choose_place(places: Sequence[str], size: int, budget: float | None) -> str | None:
    """The first place that may take so many bytes.

    Args:
        places: Of ``"ram"`` and ``"disk"``.
        size: Bytes.
        budget: The most that may be taken, in GB; None for half of what is free there.
    """
    return next((place for place in places if size <= allowance(place, budget)), None)


def allowance(place: str, budget: float | None) -> float:
    """Bytes that may be taken in a place; see :func:`choose_place`."""
    if budget is not None:
        return budget * GB
    free = free_memory() if place == "ram" else shutil.disk_usage(tempfile.gettempdir()).free
    return FREE_SHARE * free


def free_memory() -> int:
    """Bytes of memory that can still be taken, also in a container with a limit; 0 where that is not known."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:  # not Linux
        return 0
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        cache = next(
            line.split()[1]
            for line in (CGROUP / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file")
        )
    except (OSError, StopIteration):  # no container, or an older kind
        return available
    return available if limit == "max" else min(available, int(limit) - int(used) + int(cache))


def open_blocks(trainer: Trainer, place: str, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Bytes that are zero, the same ones in all processes of a machine.

    Args:
        trainer: The trainer, whose processes all call this.
        place: ``"ram"`` or ``"disk"``.
        sizes: Bytes of each block.

    Raises:
        OSError: If they cannot be had, in all processes alike.
    """
    if trainer.world_size == 1 and place == "ram":
        return [torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8) for size in sizes]
    files: list[BinaryIO] | None = []
    if trainer.local_rank == 0:
        try:
            files = [_new_file(place, size) for size in sizes]
        except OSError:
            files = None  # told to the other processes, which wait
    if trainer.world_size > 1:
        files = _first_process_files(trainer, files)
    if files is None:
        msg = f"{sum(sizes) / GB:.2f} GB could not be had"
        raise OSError(msg)
    blocks = [
        torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
        for file, size in zip(files, sizes, strict=True)
    ]
    trainer.strategy.barrier("feature_store")  # the first process keeps its files open until all have them
    for file in files:
        file.close()  # what is mapped stays
    return blocks


def _new_file(place: str, size: int) -> BinaryIO:
    """A file without a name that has its space."""
    if place == "ram":
        file = os.fdopen(os.memfd_create("anomalib_pack_features"), "r+b")
        file.truncate(size)
        return file
    file = tempfile.TemporaryFile()  # noqa: SIM115, closed once it is mapped
    if hasattr(os, "posix_fallocate"):  # else a full disk would end the process where it writes
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)
    return file


def _first_process_files(trainer: Trainer, files: list[BinaryIO] | None) -> list[BinaryIO] | None:
    """The files of the first process on this machine, or None if one machine's has none."""
    own = None if files is None else [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in files]
    addresses = gather_objects(trainer, own)
    if None in addresses:
        return None
    if trainer.local_rank == 0:
        return files
    return [Path(address).open("r+b") for address in addresses[trainer.global_rank - trainer.local_rank]]
