"""One pass over a data set outside the training loop: statistics, quantiles, memory banks.

Every image is seen exactly once and in order, also with several processes, so that what a pass measures does not
depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from anomalib.data import ImageBatch
from anomalib.models.components import AnomalibModule
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Subset
from torchmetrics.utilities.distributed import gather_all_tensors

from .checks import naming_unreadable_images, warn_of_constant
from .progress import hides_progress, progress_bar

Measures = TypeVar("Measures", bound=NamedTuple)

ROUNDING = 1e-6  # ours: what resizing may add to an image of one colour; a step of 16 bits is 15 times as much


def one_pass(module: AnomalibModule, loader: DataLoader, description: str) -> Iterator[ImageBatch]:
    """Iterate over this process's share of a loader's data set.

    Args:
        module: The model that is being trained or validated; its trainer, device and pre-processor are used.
        loader: The loader whose data set, batch size, workers and collate function are taken. Its sampler is not: the
            order is that of the data set.
        description: Label of the progress bar.

    Yields:
        Batches on the module's device whose images went through the pre-processor.

    Raises:
        ValueError: If an image cannot be read, which the message names, or there are fewer images than processes.
    """
    trainer = module.trainer
    if len(loader.dataset) < trainer.world_size:
        msg = f"{trainer.world_size} processes need at least as many images, got {len(loader.dataset)}."
        raise ValueError(msg)
    share = Subset(loader.dataset, range(trainer.global_rank, len(loader.dataset), trainer.world_size))
    batches = DataLoader(
        share, batch_size=loader.batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn
    )
    constant = []
    with naming_unreadable_images(loader.dataset):
        for batch in progress_bar(batches, desc=description, disable=hides_progress(trainer)):
            low, high = batch.image.flatten(2).aminmax(dim=2)  # (B, 3)
            of_one_colour = (high - low < ROUNDING).all(dim=1).nonzero().flatten()
            constant += [batch.image_path[index] for index in of_one_colour] if batch.image_path else []
            on_device = trainer.strategy.batch_to_device(batch, module.device)
            if getattr(module.pre_processor, "transform", None):  # none in Anomalib's tiled ensemble
                on_device.image = module.pre_processor.transform(on_device.image)
            on_device.image = trainer.precision_plugin.convert_input(on_device.image)
            yield on_device
    if loader is trainer.train_dataloader:
        warn_of_constant(constant)


def gathered_pass(
    module: AnomalibModule,
    loader: DataLoader,
    description: str,
    measure: Callable[[torch.Tensor], Measures],
) -> Iterator[Measures]:
    """Measure every image, or every tile of them, and give every process all measures.

    Args:
        module: The model, see :func:`one_pass`.
        loader: The loader, see there.
        description: Label of the progress bar.
        measure: Takes images (n, 3, H, W) and returns a named tuple of tensors with a row for each image, or ``None``.

    Yields:
        The measures of a batch from each process, in the order of the data set, the same in all processes. Of images in
        tiles: of some tiles of an image from each process; with several, their order depends on the number of these.
    """
    tiled = getattr(module.model, "tiler", None) is not None
    pieces = getattr(module.model, "pieces", lambda images: [images])
    measures = (measure(images) for batch in one_pass(module, loader, description) for images in pieces(batch.image))
    gather = partial(gather_tiles if tiled else gather_shares, module)
    share = None
    while True:
        found = next(measures, None)
        if module.trainer.strategy.broadcast(found is None):  # the first process has the largest share
            return
        share = found or _map(_no_rows, share)
        yield _map(gather, share)  # pyrefly: ignore [invalid-yield]


def measures_of_normal_images(
    module: AnomalibModule,
    loader: DataLoader,
    description: str,
    measure: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Measure the normal images of a validation set, and give every process all measures.

    Args:
        module: The model, see :func:`one_pass`.
        loader: The loader, see there.
        description: Label of the progress bar.
        measure: Takes images (n, 3, H, W) and returns a row for each.

    Returns:
        The rows of the normal images, in the order of the data set.

    Raises:
        ValueError: If there are none.
    """
    rows: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for batch in one_pass(module, loader, description):
        rows.append(measure(batch.image))
        labels.append(batch.gt_label)
    normal = gather_shares(module, torch.cat(labels)) == 0
    if not normal.any():
        msg = "The validation set has no normal images, which are needed to normalise scores and maps."
        raise ValueError(msg)
    return gather_shares(module, torch.cat(rows))[normal]


def _no_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows[:0]


def _map(function: Callable[[torch.Tensor], torch.Tensor], measures: Measures) -> Measures:
    return measures._make(None if rows is None else function(rows) for rows in measures)


def validation_loader(trainer: Trainer) -> DataLoader | list[DataLoader]:
    """Loader of the validation that is running; a list where the user gave several.

    ``Trainer.val_dataloaders`` is that of the last ``fit`` also while ``validate`` runs on other data.
    """
    validating = trainer.state.fn == TrainerFn.VALIDATING
    loop = trainer.validate_loop if validating else trainer.fit_loop.epoch_loop.val_loop
    return loop._combined_loader.iterables  # Lightning has no public name for this choice


def share_buffers(module: AnomalibModule) -> None:
    """Give every process the first one's buffers, which are the ones that a checkpoint holds.

    After an epoch's last step each process has BatchNorm statistics of its own.
    """
    if module.trainer.world_size == 1:
        return
    shared = module.trainer.strategy.broadcast({name: buffer.cpu() for name, buffer in module.model.named_buffers()})
    for name, buffer in module.model.named_buffers():
        buffer.copy_(shared[name])


def sum_over_processes(module: AnomalibModule, share: torch.Tensor) -> torch.Tensor:
    """Add up what the processes measured on their shares, elementwise."""
    return module.trainer.strategy.reduce(share, reduce_op="sum")


def gather_shares(module: AnomalibModule, share: torch.Tensor) -> torch.Tensor:
    """Join what the processes measured on their shares, in the order of the data set.

    Args:
        module: The model whose trainer runs the processes.
        share: One row for each image of this process's share, (n, ...).

    Returns:
        One row for each image of the data set, (N, ...).
    """
    if module.trainer.world_size == 1:
        return share
    shares = gather_all_tensors(share)
    joined = share.new_empty(sum(len(part) for part in shares), *shares[0].shape[1:])
    for rank, part in enumerate(shares):
        joined[rank :: len(shares)] = part
    return joined


def gather_tiles(module: AnomalibModule, share: torch.Tensor) -> torch.Tensor:
    """Join likewise what each process measured on some tiles of one image, or nothing: one row for each tile."""
    images = share.unsqueeze(0) if len(share) else share.unsqueeze(1)  # (1, K, ...) or (0, 1, ...)
    return gather_shares(module, images).flatten(0, 1)
