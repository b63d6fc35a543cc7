"""Parts of batches: what an evaluation keeps of them."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler


def unpadded_count(loader: DataLoader | list[DataLoader], batch_idx: int, dataloader_idx: int = 0) -> int | None:
    """Number of samples of a batch, from its start, that are no repetitions.

    ``DistributedSampler`` repeats samples until every process has equally many, which would count them twice. The
    repetitions come last on each process. A process that has nothing else keeps one sample: collective operations
    wait for a process without data for ever.

    Args:
        loader: Data loader of the running evaluation, or the list of them.
        batch_idx: Index of the batch on this process.
        dataloader_idx: Index of the loader that the batch comes from.

    Returns:
        The number, at least 0, or None if all samples count.
    """
    if isinstance(loader, list):
        loader = loader[dataloader_idx]
    sampler = getattr(loader, "sampler", None)  # Lightning takes any iterable of batches for a loader.
    if not isinstance(sampler, DistributedSampler):
        return None
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
    return max(max(own, 1) - batch_idx * loader.batch_size, 0)


def names_group(name: str) -> bool:
    """Whether what an image has as ``group`` is a group, and not several; see :func:`belongs`."""
    return bool(name) and not name.endswith("/")


def belongs(name: str, group: str) -> bool:
    """Whether an image belongs to a group.

    Args:
        name: What the image has as ``group``: the name of its group, or the start of the names of all groups that it
            belongs to, which is empty or ends in ``/``.
        group: Name of a group; to the group ``""`` belong all images.
    """
    return not group or name == group or (not names_group(name) and group.startswith(name))


def select(batch: Any, fields: Iterable[str], which: slice | Tensor) -> SimpleNamespace:
    """Some fields of some samples of a batch; a field that the batch lacks is None.

    Args:
        batch: Any object with the fields as attributes: tensors with the samples along the first dimension, or lists.
        fields: Names of the fields.
        which: Slice, or boolean mask of shape (B,) on the CPU, of the samples.
    """
    return SimpleNamespace(**{field: _select(getattr(batch, field, None), which) for field in fields})


def _select(values: Tensor | list | None, which: slice | Tensor) -> Tensor | list | None:
    if values is None:
        return None
    if isinstance(which, slice):
        return values[which]
    if isinstance(values, Tensor):
        return values[which.to(values.device)]
    return [value for value, chosen in zip(values, which.tolist(), strict=True) if chosen]


def copied(batch: SimpleNamespace, device: torch.device | str | None = None) -> SimpleNamespace:
    """The batch with its tensors copied, to another device if given.

    A reference to a loader's tensor would keep its shared memory, and with it a file descriptor, for each batch.
    """
    return SimpleNamespace(
        **{
            field: torch.empty_like(value, device=device).copy_(value) if isinstance(value, Tensor) else value
            for field, value in vars(batch).items()
        }
    )
