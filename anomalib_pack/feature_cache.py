"""Features of a frozen network, computed once in a training.

A frozen network sees the same training image in every epoch, and without augmentation its features never change::

    first epoch     image file -> pre-processor -> frozen network -> features -> training step
                                                                        |
                                                                  FeatureStore
                                                                        |
    later epochs    the order of the images ----------------------> features -> training step

In later epochs a data loader without workers gives batches of images without pixels, in the order and with the random
numbers of the training's own loader. It takes that one's place once every image has been seen, which is after an epoch
where an epoch has all images.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing.utils.spec import transform_to_spec
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from pandas import DataFrame
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import Resize, Transform

from .checks import require
from .feature_store import GB, FeatureStore, allowance, choose_place, open_blocks

logger = logging.getLogger(__name__)

PLACES = {"auto": ("ram", "disk"), "ram": ("ram",), "disk": ("disk",), None: ()}
COLUMNS = {"image_path": "image_path", "gt_label": "label_index", "mask_path": "mask_path", "group": "group"}


class CannotCacheError(Exception):
    """The features cannot be kept; the message says why."""


class FeatureCache(Callback):
    """Keeps what a frozen network makes of each training image.

    The model has one as ``feature_cache`` and calls it in its training step. Where images may look different the next
    time (augmentations), the network is trained, or the space is not enough, it steps aside, and a line in the log says
    so: then every epoch reads the images and runs the network.

    Args:
        cache: ``"ram"``, ``"disk"``, ``"auto"`` for the first of them that has the space, or None.
        budget: The most that may be taken, in GB; None for half of what is free in memory, or on the disk of temporary
            files.

    Raises:
        ValueError: If a value is impossible; the message names the model's argument.
    """

    def __init__(self, cache: str | None = "auto", budget: float | None = None) -> None:
        require("cache", cache, cache in PLACES, f"one of {tuple(PLACES)}")
        require("cache_budget", budget, budget is None or budget > 0, "above 0, or None")
        self.cache = cache
        self.budget = budget
        self._trainer: Trainer | None = None  # while features are kept
        self._store: FeatureStore | None = None  # from the first batch on
        self._known: KnownImages | None = None
        self._loader: DataLoader | None = None  # the training's own, while another one has its place

    def __call__(
        self, batch: ImageBatch, compute: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    ) -> Sequence[torch.Tensor]:
        """Give the frozen network's tensors for a training batch.

        Args:
            batch: The batch.
            compute: Gives them for images (B, 3, H, W): tensors with a row for each image that depends on this image
                alone.
        """
        if self._loader is not None:
            return self._store.read(batch.image_path, batch.image.device)
        tensors = compute(batch.image)
        if self._trainer is not None:
            self._keep(batch, tensors)
        return tensors

    def _keep(self, batch: ImageBatch, tensors: Sequence[torch.Tensor]) -> None:
        if self._store is None:
            try:
                self._store = self._open(batch, tensors)
            except (CannotCacheError, OSError) as reason:
                level = logging.INFO if self.cache == "auto" else logging.WARNING
                logger.log(level, "Each epoch computes the features of the frozen network: %s.", reason)
                self._trainer = None
                return
        self._store.write(batch.image_path, tensors)

    def _open(self, batch: ImageBatch, tensors: Sequence[torch.Tensor]) -> FeatureStore:
        trainer = self._trainer
        if any(tensor.requires_grad for tensor in tensors):
            msg = "it is trained"
            raise CannotCacheError(msg)
        check_images_stay(trainer)
        paths = trainer.train_dataloader.dataset.samples["image_path"].tolist()
        sizes = FeatureStore.sizes(len(paths), tensors)
        place = trainer.strategy.broadcast(choose_place(PLACES[self.cache], sum(sizes), self.budget))
        if place is None:
            left = " and ".join(f"{allowance(each, self.budget) / GB:.2f} GB ({each})" for each in PLACES[self.cache])
            msg = f"they take {sum(sizes) / GB:.2f} GB, and cache_budget leaves {left}"
            raise CannotCacheError(msg)
        store = FeatureStore(paths, tensors, open_blocks(trainer, place, sizes))
        logger.info("The features of %d images are kept, %.2f GB (%s).", len(paths), sum(sizes) / GB, place)
        self._known = KnownImages(trainer.train_dataloader.dataset.samples, batch)
        return store

    def on_train_start(self, trainer: Trainer, _pl_module: LightningModule) -> None:
        """Forget an earlier training."""
        self._close()
        if self.cache is not None and trainer.max_epochs - trainer.current_epoch != 1:
            self._trainer = trainer

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put another loader in the place of the training's own once all images have been seen."""
        if self._store is None or self._loader is not None:
            return
        if trainer.strategy.reduce_boolean_decision(self._store.complete, all=True):
            self._loader = trainer.train_dataloader
            _set_train_dataloader(trainer, self._known.loader(self._loader))
            if pl_module.pre_processor is not None:
                pl_module.pre_processor.on_train_batch_start = _leave_pixels_alone

    def on_train_end(self, _trainer: Trainer, _pl_module: LightningModule) -> None:
        """Give all back."""
        self._close()

    def on_exception(self, _trainer: Trainer, _pl_module: LightningModule, _exception: BaseException) -> None:
        """Give all back."""
        self._close()

    def _close(self) -> None:
        if self._loader is not None:
            _set_train_dataloader(self._trainer, self._loader)
            pre_processor = self._trainer.lightning_module.pre_processor
            if pre_processor is not None:
                del pre_processor.on_train_batch_start  # the hook of its class is there again
        self._trainer = self._store = self._known = self._loader = None


def _set_train_dataloader(trainer: Trainer, loader: DataLoader) -> None:
    trainer.fit_loop._combined_loader.flattened = [loader]  # Lightning has no public way within a training


def _leave_pixels_alone(*_arguments: Any) -> None:
    """In the place of the pre-processor's hook: there are no pixels."""


class KnownImages(Dataset):
    """Stands in for a data set whose images need not be read.

    Args:
        samples: Those of the data set.
        batch: A batch of its images.
    """

    def __init__(self, samples: DataFrame, batch: ImageBatch) -> None:
        self.batch_class = type(batch)
        self.columns = {
            field: samples[column].tolist()
            for field, column in COLUMNS.items()
            if column in samples and getattr(batch, field, None) is not None
        }

    def __len__(self) -> int:
        return len(self.columns["image_path"])

    def __getitem__(self, index: int) -> int:
        """An image is its number until it is in a batch."""
        return index

    def collate(self, indices: list[int]) -> ImageBatch:
        """Say of images what the data set says of them; they are (B, 3, 0, 0)."""
        fields: dict[str, Any] = {field: [column[index] for index in indices] for field, column in self.columns.items()}
        if "gt_label" in fields:
            fields["gt_label"] = torch.tensor(fields["gt_label"])
        return self.batch_class(image=torch.empty(len(indices), 3, 0, 0), **fields)

    def loader(self, own: DataLoader) -> DataLoader:
        """A loader that gives these images in the order of another one, and draws the random numbers that it draws."""
        # Each pass draws a seed for workers; workers that stay have theirs.
        generator = torch.Generator() if own.persistent_workers else own.generator
        return DataLoader(self, batch_sampler=own.batch_sampler, collate_fn=self.collate, generator=generator)


def check_images_stay(trainer: Trainer) -> None:
    """Check that each training image is read once in an epoch, and looks the same in the next one.

    Raises:
        CannotCacheError: If that is not sure.
    """
    loader, module = trainer.train_dataloader, trainer.lightning_module
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, AnomalibDataset) or loader.batch_sampler is None:
        msg = "the training images are not in one data set of Anomalib's"
        raise CannotCacheError(msg)
    transforms = [part.augmentations for part in (dataset, *getattr(dataset, "parts", {}).values())]
    reasons = {
        "data loaders are reloaded in the training": trainer.reload_dataloaders_every_n_epochs > 0,
        "the data loader has a collate_fn of its own": loader.collate_fn != dataset.collate_fn,
        "the datamodule has an on_after_batch_transfer of its own": (
            trainer.datamodule is not None and is_overridden("on_after_batch_transfer", trainer.datamodule)
        ),
        "random tiles are drawn of each image": getattr(module.model, "tiler", None) is not None,
        "an image is in the data set more than once": not dataset.samples["image_path"].is_unique,
        "the images are augmented": not all(map(is_fixed, transforms)),
        "the images are not resized to one size before they are in a batch": not resizes_to_one_size(transforms[0]),
        "the pre-processor may be random": not is_fixed(getattr(module.pre_processor, "transform", None)),
    }
    for reason, holds in reasons.items():
        if holds:
            raise CannotCacheError(reason)
    if draws_random_numbers(dataset):
        msg = "random numbers are drawn where an image is read"
        raise CannotCacheError(msg)


def is_fixed(transform: Transform | None) -> bool:
    """Whether a transform is of those that Anomalib stores in checkpoints, which have nothing random."""
    try:
        transform_to_spec(transform)
    except ValueError:
        return False
    return True


def resizes_to_one_size(transform: Transform | None) -> bool:
    """Whether a transform resizes to a height and a width.

    Where it does not, Anomalib resizes the images of a batch to the largest of them.
    """
    return any(len(resize.size or ()) == 2 for resize in extract_transforms_by_type(transform, Resize))


def draws_random_numbers(dataset: AnomalibDataset) -> bool:
    """Whether reading the first image takes random numbers; they are as before afterwards."""
    with isolate_rng(include_cuda=False):
        before = _random_states()
        dataset[0]
        return _random_states() != before


def _random_states() -> tuple[Any, ...]:
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002, what transforms draw from
    return random.getstate(), state["key"].tobytes(), state["pos"], torch.get_rng_state().tolist()
