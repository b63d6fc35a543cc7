"""Metrics of the maps of a category.

The score of an image is the maximum of its map, as in the published evaluation of MVTec LOCO, and not a model's score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from anomalib_pack.evaluation.images import MappedImage, MappedImages
from anomalib_pack.metrics import pixel
from anomalib_pack.metrics.samples import belongs, names_group
from anomalib_pack.metrics.spro import LIMITS, image_curve, published_result
from anomalib_pack.metrics.tables import mean_row, with_mad
from anomalib_pack.progress import progress_bar

# The metrics that are read off one curve of all pixels.
PIXEL_METRICS = (pixel.AUROC, pixel.AP, pixel.F1Max, pixel.AUPRO)


class Result(NamedTuple):
    """What maps are worth.

    Attributes:
        rows: Metrics of all test images, ``""``, of each group, and of their mean.
        published: What the published evaluation writes to ``<category>_metrics.json``.
    """

    rows: dict[str, dict[str, float]]
    published: dict[str, Any]


def evaluate(mapped: MappedImages) -> Result:
    """Compute the metrics of a category.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a map, a mask or the defects of an image are not as they should be, or a group has no normal
            images.
    """
    groups = sorted({image.group for image in mapped.images if names_group(image.group)})
    members = {group: [image for image in mapped.images if belongs(image.group, group)] for group in ("", *groups)}
    for group, images in members.items():
        if {image.anomalous for image in images} != {True, False}:
            msg = f"The group {group} of {mapped.category} must have normal and anomalous test images, has one kind."
            raise ValueError(msg)
    rows, areas = {}, {}
    passes = 4 if mapped.has_defects else 2  # two for each curve
    total = passes * sum(map(len, members.values()))
    with progress_bar(total=total, desc=f"Maps of {mapped.category}", leave=False) as bar:
        for group, images in members.items():
            rows[group], areas[group] = _values(mapped, images, bar)
    # Where there are no groups, all images have the place of the mean.
    reported = {group: group for group in groups} or {"mean": ""}
    published = published_result(
        {name: areas[group] for name, group in reported.items()},
        {name: rows[group]["image_AUROC"] for name, group in reported.items()},
        "auc_spro" if mapped.has_defects else "au_pro",
    )
    if groups:
        rows["mean"] = mean_row([rows[group] for group in groups])
    return Result(rows, published)


def _values(
    mapped: MappedImages, images: Sequence[MappedImage], bar: tqdm
) -> tuple[dict[str, float], dict[float, float]]:
    """Metrics of some images, and the area that the published evaluation reports, by the limit of its curve."""
    maxima = torch.zeros(len(images))

    def batches(metric: pixel.PixelMetric) -> Iterator[SimpleNamespace]:
        for index, batch in enumerate(mapped.batches(images, metric.fields)):
            maxima[index] = batch.anomaly_map.max()
            bar.update()
            yield batch

    pixels, spro = pixel.AUROC(), pixel.SPRO(prefix="pixel_")
    curve = pixels.curve_of(lambda: batches(pixels))
    of_images = image_curve(maxima, [image.anomalous for image in images])
    row = {
        "image_AUROC": of_images.auroc(),
        "image_AP": of_images.average_precision(),
        "image_F1Max": of_images.f1_max(),
        **{metric.name: metric.value(curve) for metric in (kind(prefix="pixel_") for kind in PIXEL_METRICS)},
    }
    if mapped.has_defects:
        curve = spro.curve_of(lambda: batches(spro))
        row[spro.name] = spro.value(curve)
    return with_mad(row), {limit: curve.aupro(limit) for limit in LIMITS}
