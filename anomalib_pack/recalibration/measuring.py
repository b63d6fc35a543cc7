"""Raw scores of the images in a folder, as prediction has them before they are post-processed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from anomalib.data import ImageBatch
from anomalib.models import AnomalibModule
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_pack.data.image_files import names
from anomalib_pack.data.predict import PredictImages
from anomalib_pack.post_processing import check_finite
from anomalib_pack.progress import progress_bar
from anomalib_pack.quantiles import MAX_VALUES, drawn
from anomalib_pack.region import region_of

BATCH = 8  # ours; images
PIXELS = 2**20  # ours: in a batch of large images


@dataclass(frozen=True)
class Measured:
    """Raw scores of the images in a folder.

    Attributes:
        scores: Of images, (N,).
        pixels: Of pixels inside the model's region, (n,); of more than 2^24 a random sample, equally many of each
            image. ``None`` without maps.
        pixel_range: Lowest and highest score of all these pixels, (2,); ``None`` without maps.
    """

    scores: Tensor
    pixels: Tensor | None
    pixel_range: Tensor | None


def folders(normal: Path, anomalous: Path | None, white_level: float | None) -> list[PredictImages]:
    """List the images of the folders.

    Raises:
        FileNotFoundError: If there is no image in one; the message names it.
        ValueError: If an image is in both.
    """
    found = [PredictImages(folder, white_level=white_level) for folder in (normal, anomalous) if folder is not None]
    if len(found) == 2:
        first, second = ({file.resolve() for file in each.image_filenames} for each in found)
        both = sorted(first & second)
        if both:
            msg = f"Images are both in {normal} and in {anomalous}, {len(both)} in all: {names(both)}."
            raise ValueError(msg)
    return found


@torch.no_grad()
def measure(model: AnomalibModule, images: PredictImages, description: str) -> Measured:
    """Run a model on the images of a folder, and keep what thresholds need.

    Raises:
        OSError: If an image cannot be read; the message names it.
        ValueError: If a score is not finite; the message names the image.
    """
    region = region_of(model)
    limit = max(MAX_VALUES // len(images), 1)
    scores, pixels, ranges = [], [], []
    for batch in batches(model, images, description):
        output = model.predict_step(batch, 0)
        check_finite(output)
        maps = None if output.anomaly_map is None else region.take(output.anomaly_map.float()).flatten(1)
        scores.append((maps.amax(dim=1) if output.pred_score is None else output.pred_score.float().flatten()).cpu())
        if maps is not None:
            pixels += [drawn(each, limit, seed=len(pixels) + index).cpu() for index, each in enumerate(maps)]
            ranges.append(torch.stack(maps.aminmax()).cpu())
    return Measured(torch.cat(scores), torch.cat(pixels) if pixels else None, _joined(ranges))


@torch.no_grad()
def measure_parts(
    model: AnomalibModule, images: PredictImages, description: str, parts: Callable[[Tensor], Tensor]
) -> Tensor:
    """Run a part of a model on the images of a folder: ``parts`` takes a batch and gives a row for each image."""
    return torch.cat([parts(batch.image).cpu() for batch in batches(model, images, description)])


def batches(model: AnomalibModule, images: PredictImages, description: str) -> Iterator[ImageBatch]:
    """Read images as prediction does, pre-process each, and yield them in batches on the model's device."""
    images.transform = getattr(model.pre_processor, "transform", None)
    size = model.input_size  # None: they are not resized to one size, and cannot be stacked
    count = 1 if size is None else max(1, min(BATCH, PIXELS // (size[0] * size[1])))
    loader = DataLoader(images, batch_size=count, collate_fn=images.collate_fn)
    for batch in progress_bar(loader, desc=description, leave=False):
        batch.image = batch.image.to(model.device)
        yield batch


def _joined(ranges: Sequence[Tensor]) -> Tensor | None:
    """Range of all, from those of batches."""
    if not ranges:
        return None
    low, high = torch.stack(list(ranges)).unbind(dim=1)
    return torch.stack([low.min(), high.max()])
