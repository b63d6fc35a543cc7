"""Maps, masks and defects at the size of the image files, for metrics.

Batches have masks that are resized already, and often no mask paths. So files are found by the path of the image in the
``samples`` of the data set. An image is kept with its map at the size that the model gives, and its masks as bits: one
image at a time is brought to the size of its file when a metric is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib import TaskType
from anomalib.data import Batch, PredictDataset
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import LabelName
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import tv_tensors

from anomalib_pack.defect import Defect

ORIGINAL_FIELDS = ("anomaly_map", "gt_mask", "pred_mask", "defects")  # those that exist at the original size


class NotWholeError(ValueError):
    """Maps do not show whole images."""


class KeepsRawMaps(Callback):
    """Keeps the maps of a batch as the model gives them; stands before the post-processor, which replaces them.

    Attributes:
        maps: Those of the last batch, shape (B, H, W), float32; None if the model gives none.
    """

    maps: Tensor | None = None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Copy the maps."""
        del trainer, pl_module, batch, batch_idx, dataloader_idx
        maps = outputs.anomaly_map
        self.maps = None if maps is None else maps.detach().clone().float().reshape(len(maps), *maps.shape[-2:])


def at_size(anomaly_map: Tensor, size: Sequence[int]) -> Tensor:
    """A map, (H, W), resized as the papers do, bilinearly between the centres of pixels."""
    return interpolate(anomaly_map[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


class Bits(NamedTuple):
    """A Boolean mask in an eighth of its memory.

    Attributes:
        bits: Eight pixels in a byte.
        size: Height and width.
    """

    bits: np.ndarray
    size: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> Bits:
        """Pack a mask, (H, W)."""
        return cls(np.packbits(mask.numpy()), tuple(mask.shape))

    def mask(self) -> Tensor:
        """Unpack the mask."""
        height, width = self.size
        bits = np.unpackbits(self.bits, count=height * width)
        return torch.from_numpy(bits.view(bool).reshape(self.size))


@dataclass(frozen=True)
class Original:
    """A test image, with what is known of it at the size of its file.

    Attributes:
        raw: Map as the model gives it, (h, w).
        size: Height and width of the file.
        mask: Its anomalous pixels; None if they are not needed, or the data set has no masks.
        defects: Its defects, with their masks as :class:`Bits`; None if they are not needed.
    """

    raw: Tensor
    size: tuple[int, int]
    mask: Bits | None
    defects: list[Defect] | None

    def anomaly_map(self) -> Tensor:
        """Map at the size of the file."""
        return at_size(self.raw, self.size)

    def batch(self, fields: Sequence[str], post_processor: PostProcessor | None, min_area: int = 0) -> SimpleNamespace:
        """A batch of this image with those of the fields that exist at the original size.

        Maps and masks have shape (1, H, W). Predicted masks are those of the post-processor, at this size, without
        regions of fewer than ``min_area`` pixels.
        """
        found, device, maps = SimpleNamespace(), self.raw.device, self.anomaly_map().unsqueeze(0)
        for field in set(fields).intersection(ORIGINAL_FIELDS):
            if field == "anomaly_map":
                found.anomaly_map = maps
            elif field == "gt_mask":
                found.gt_mask = None if self.mask is None else self.mask.mask().unsqueeze(0).to(device)
            elif field == "pred_mask":
                found.pred_mask = predicted_masks(maps, post_processor, min_area)
            elif self.defects is None:
                found.defects = None
            else:
                found.defects = [[defect._replace(mask=defect.mask.mask()) for defect in self.defects]]
        return found


def predicted_masks(maps: Tensor, post_processor: PostProcessor | None, min_area: int = 0) -> Tensor | None:
    """Masks of a post-processor for raw maps, (B, H, W), without smaller regions; None if it gives none."""
    if post_processor is None:
        return None
    device = next((buffer.device for buffer in post_processor.buffers()), maps.device)
    batch = SimpleNamespace(anomaly_map=maps.to(device), pred_score=None, pred_label=None, pred_mask=None)
    post_processor.post_process_batch(batch)
    if batch.pred_mask is None:
        return None
    masks = batch.pred_mask.to(maps.device)
    if min_area:
        from anomalib_pack.records.defects import find_regions  # noqa: PLC0415  # records need this module

        labels = [find_regions(mask, mask, min_area).labels for mask in masks.cpu().numpy()]
        masks = torch.from_numpy(np.stack(labels)).to(maps.device) > 0
    return masks


class Originals:
    """Files of a test set by the path of the image.

    Args:
        dataset: The test set.

    Raises:
        ValueError: If it does not tell the files of its images.
    """

    def __init__(self, dataset: Any) -> None:
        if not isinstance(dataset, AnomalibDataset):
            msg = f"Metrics at the original size need a data set of Anomalib's, with samples, got {type(dataset)}."
            raise ValueError(msg)  # noqa: TRY004  # as for a data set without masks
        self.dataset = dataset
        self._samples = {sample.image_path: sample for sample in dataset.samples.itertuples()}
        self._has_masks = dataset.task == TaskType.SEGMENTATION
        self._defects = getattr(dataset, "defects", None)

    @property
    def has_defects(self) -> bool:
        """Whether the data set tells the defects of its images."""
        return self._defects is not None

    def check_defects(self) -> None:
        """Read the defects of an image of each category.

        Raises:
            OSError: If a file is missing.
            ValueError: If two files contradict each other.
        """
        anomalous = [sample for sample in self._samples.values() if sample.label_index == LabelName.ABNORMAL]
        for sample in {getattr(sample, "category", None): sample for sample in anomalous}.values():
            self._defects(sample.image_path)

    def read(self, image_path: str, raw: Tensor, fields: Iterable[str]) -> Original:
        """Read what is needed of an image.

        Args:
            image_path: Its path.
            raw: Its map as the model gives it, (h, w).
            fields: What is needed, of ``ORIGINAL_FIELDS``.

        Raises:
            OSError: If a file cannot be read.
            ValueError: If the masks do not fit the image, or it is not of the data set.
        """
        from anomalib_pack.data.image_files import read_header  # noqa: PLC0415  # data sets need metrics

        if image_path not in self._samples:
            msg = f"{image_path} is no image of the test set, whose samples tell the files of masks."
            raise ValueError(msg)
        size = read_header(image_path).size
        mask = self._mask(image_path, size) if "gt_mask" in fields else None
        defects = None
        if "defects" in fields:
            defects = [defect._replace(mask=Bits.of(defect.mask)) for defect in self._defects(image_path)]
        return Original(raw, size, mask, defects)

    def _mask(self, image_path: str, size: tuple[int, int]) -> Bits | None:
        from anomalib_pack.data.masks import read_union  # noqa: PLC0415  # data sets need metrics

        sample = self._samples[image_path]
        if not self._has_masks or sample.label_index == LabelName.UNKNOWN:
            return None
        if sample.label_index == LabelName.NORMAL:
            return Bits.of(torch.zeros(size, dtype=torch.bool))
        return Bits.of(read_union(mask_files(sample.mask_path, image_path), image_path, size))


def mask_files(mask_path: Any, image_path: str) -> list[Path]:
    """Files of the masks of an anomalous image.

    Args:
        mask_path: What a data set has as ``mask_path``: a file, a list of files, or a folder of them.
        image_path: The image, for the message.

    Raises:
        ValueError: If there are none.
    """
    paths = list(mask_path) if isinstance(mask_path, list | tuple) else [mask_path]
    paths = [Path(path) for path in paths if isinstance(path, str | Path) and str(path)]
    if not paths:
        msg = f"The anomalous image {image_path} has no mask, which metrics at the original size need."
        raise ValueError(msg)
    return [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


def check_whole_image(model: AnomalibModule, dataset: AnomalibDataset | PredictDataset) -> None:
    """Check that a model's maps show the images of a test set, or those to predict, from edge to edge.

    Raises:
        NotWholeError: If the augmentations of the test set or the pre-processor crop images, pad, flip or turn them.
    """
    from anomalib_pack.data.image_files import read_header  # noqa: PLC0415  # data sets need metrics

    paths = dataset.samples.image_path if hasattr(dataset, "samples") else dataset.image_filenames
    size = read_header(next(iter(paths))).size
    pre_processing = getattr(getattr(model, "pre_processor", None), "transform", None)
    # Those that a category has of its own come with the common ones.
    for augmentations in {id(each): each for each in map(_augmentations, _parts(dataset))}.values():
        if not keeps_places(size, [step for step in (augmentations, pre_processing) if step is not None]):
            msg = (
                f"The maps of {model.name} do not show images of size {size} (height, width) from edge to edge: the "
                f"pre-processor's transform, {pre_processing}, or the augmentations of the test set, {augmentations}, "
                "do more than resize them. For metrics at the original size, nothing may crop, pad, flip or turn them."
            )
            raise NotWholeError(msg)


def _parts(dataset: AnomalibDataset | PredictDataset) -> list[AnomalibDataset | PredictDataset]:
    return list(getattr(dataset, "parts", {}).values()) or [dataset]


def _augmentations(dataset: AnomalibDataset | PredictDataset) -> Any:
    return dataset.augmentations if hasattr(dataset, "augmentations") else dataset.transform


def keeps_places(size: tuple[int, int], steps: Sequence[Any]) -> bool:
    """Whether transforms leave a place in an image of this size where it is, as a share of height and width."""
    height, width = size
    image = tv_tensors.Image(torch.zeros(3, height, width))
    place = torch.tensor([[3 / 8, 3 / 8, 1 / 2, 1 / 2]])  # neither in the middle nor at an edge
    box = place * torch.tensor([width, height, width, height])
    box = tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=size)  # pyrefly: ignore [unexpected-keyword]
    for step in steps:
        image, box = step(image, box)
    height, width = box.canvas_size
    return torch.allclose(torch.as_tensor(box) / torch.tensor([width, height, width, height]), place, atol=1e-3)
