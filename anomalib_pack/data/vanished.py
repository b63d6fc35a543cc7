"""Anomalies of whose mask the model's resize and crop leave nothing."""

import os
import warnings

from anomalib.data import ImageBatch
from anomalib.utils.attrs import get_nested_attr

from anomalib_pack.data.image_files import names


class ReportsVanished:
    """Mixin for datamodules that names such images at the end of a run; stands before ``AnomalibDataModule``.

    Each process of several names its own.

    Attributes:
        vanished_as_normal: Whether such images count as normal; otherwise they stay anomalous, with an empty mask.
    """

    vanished_as_normal = False

    @property
    def _image_root(self) -> str:
        """Folder that is left out of the names."""
        return str(self.root)

    def on_before_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Look for anomalous images of whose mask the model's pre-processor, which comes next, leaves nothing."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if batch.gt_mask is not None and batch.gt_label is not None and batch.gt_label.any():
            transform = get_nested_attr(self, "trainer.lightning_module.pre_processor.transform", None)
            masks = transform(batch.gt_mask) if transform else batch.gt_mask
            vanished = batch.gt_label & ~masks.flatten(1).any(dim=1)
            self.__dict__.setdefault("_vanished", set()).update(
                path for path, found in zip(batch.image_path, vanished, strict=True) if found
            )
            if self.vanished_as_normal:
                batch.gt_label = batch.gt_label & ~vanished
        return batch

    def teardown(self, stage: str) -> None:
        """Report the anomalous images of whose mask nothing was left."""
        super().teardown(stage)
        vanished = self.__dict__.pop("_vanished", None)
        if vanished:
            # Of another place are the images of synthetic anomalies.
            found = [path.removeprefix(f"{self._image_root}{os.sep}") for path in sorted(vanished)]
            warnings.warn(
                f"Anomalous images of whose mask the model's resize and crop leave nothing, {len(found)} in all, count "
                f"as {'normal' if self.vanished_as_normal else 'anomalous'}{self._choice}: {names(found)}.",
                stacklevel=2,
            )

    @property
    def _choice(self) -> str:
        """The argument that decides, for the message."""
        return f" (vanished_as_normal={self.vanished_as_normal})" if "vanished_as_normal" in vars(self) else ""
