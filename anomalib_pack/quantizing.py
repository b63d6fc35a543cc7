"""Full INT8 quantisation of OpenVINO models, with the layers near the map in float where it needs them.

Detectors compare features, and a small difference of large numbers is what INT8 loses first. So the maps of normal
validation images are compared with those in float, and if they deviate too much, layers stay in float from the end of
the graph on: as few as it takes. No label and no test image has a say in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from torchvision.transforms.v2.functional import resize

from .checks import require
from .region import WHOLE_IMAGE, WholeImage

logger = logging.getLogger(__name__)

DEVIATION = 0.02  # of the maps' range; ours
WEIGHTED = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")  # what INT8 makes fast
IMAGES = 300  # for calibration, NNCF's own number


def quantize_file(
    in_float: Path, quantized: Path, datamodule: AnomalibDataModule | None, region: WholeImage = WHOLE_IMAGE
) -> Path:
    """Quantise an OpenVINO file of any of Anomalib's models with the normal validation images of a datamodule.

    Args:
        in_float: Path of the ``.xml`` of the model in float32.
        quantized: Path of the ``.xml`` that is written.
        datamodule: Where the images are.
        region: The model's.

    Returns:
        ``quantized``.

    Raises:
        ValueError: If there is no datamodule, or no normal validation image in it.
    """
    if datamodule is None:
        msg = "INT8_PTQ needs a datamodule, whose normal validation images say how large activations are."
        raise ValueError(msg)
    openvino = import_module("openvino")  # an extra, as NNCF
    model = openvino.Core().read_model(in_float)
    sides = model.input(0).partial_shape[2:]
    size = tuple(side.get_length() for side in sides) if all(side.is_static for side in sides) else None
    quantized.parent.mkdir(parents=True, exist_ok=True)
    made = quantize(model, normal_validation_images(datamodule, size), region)
    openvino.save_model(made, quantized, compress_to_fp16=False)
    return quantized


def quantize(
    model: Any, images: Sequence[np.ndarray], region: WholeImage = WHOLE_IMAGE, deviation: float = DEVIATION
) -> Any:
    """Quantise a model's weights and activations to INT8 (post-training quantisation).

    Args:
        model: ``openvino.Model`` with an output ``anomaly_map``, or else ``pred_score``.
        images: Of normal validation images, each (1, 3, H, W) as the model takes them.
        region: Where maps are compared; outside they are 0 in any precision.
        deviation: By how much the mean of the maps' differences may exceed nothing, as a share of their range.

    Returns:
        The quantised model. If nothing but float keeps within ``deviation`` it is the model itself.

    Raises:
        ValueError: If there is no image.
    """
    require("images", len(images), len(images) > 0, "at least one normal validation image")
    nncf = import_module("nncf")
    expected = maps_of(model, images, region)
    names = [op.get_friendly_name() for op in model.get_ordered_ops()]
    # Layers with weights, in the order of the graph; at each the part that stays in float may begin.
    starts = [names.index(op.get_friendly_name()) for op in model.get_ordered_ops() if op.get_type_name() in WEIGHTED]

    def in_float_from(start: int) -> tuple[Any, float]:
        scope = nncf.IgnoredScope(names=names[start:], validate=False)
        quantized = nncf.quantize(model, nncf.Dataset(images), ignored_scope=scope, subset_size=IMAGES)
        found = difference(maps_of(quantized, images, region), expected)
        logger.info("INT8 up to operation %s of %s: maps deviate by %.2f %%", start, len(names), 100 * found)
        return quantized, found

    return latest_start(in_float_from, [*starts, len(names)], deviation) or model


def latest_start(attempt: Callable[[int], tuple[Any, float]], starts: Sequence[int], limit: float) -> Any | None:
    """What ``attempt`` makes of the last start whose deviation is within the limit, found by halving.

    Args:
        attempt: Makes something of a start, and says by how much it deviates; the less, the earlier the start.
        starts: In ascending order.
        limit: Largest deviation.

    Returns:
        ``None`` if there is none but the first, which leaves nothing to do.
    """
    made, found = attempt(starts[-1])
    if found <= limit:
        return made
    best, low, high = None, 0, len(starts) - 1
    while high - low > 1:
        middle = (low + high) // 2
        made, found = attempt(starts[middle])
        if found <= limit:
            best, low = made, middle
        else:
            high = middle
    return best


def difference(maps: np.ndarray, expected: np.ndarray) -> float:
    """Mean absolute difference of maps, as a share of the range of those expected.

    Example:
        >>> difference(np.array([0.0, 1.0, 4.0]), np.array([0.0, 1.0, 1.0]))
        1.0
    """
    spread = float(expected.max() - expected.min())
    return float(np.abs(maps - expected).mean()) / spread if spread > 0 else float(np.abs(maps - expected).max() > 0)


def maps_of(model: Any, images: Sequence[np.ndarray], region: WholeImage = WHOLE_IMAGE) -> np.ndarray:
    """What lies inside a region of images' anomaly maps, or scores where a model has no maps."""
    compiled = import_module("openvino").compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = {name for output in compiled.outputs for name in output.names}
    if "anomaly_map" not in names:
        return np.concatenate([compiled(image)["pred_score"] for image in images])
    maps = np.concatenate([compiled(image)["anomaly_map"] for image in images])
    return region.take(torch.from_numpy(maps)).numpy()


def normal_validation_images(
    datamodule: AnomalibDataModule, size: tuple[int, int] | None, count: int = IMAGES
) -> list[np.ndarray]:
    """The first normal validation images, each (1, 3, H, W), resized if the model takes one size only."""
    datamodule.setup("fit")
    data, images = datamodule.val_data, []
    for index in np.flatnonzero(data.samples.label_index == 0)[:count]:
        image = data[int(index)].image
        images.append((image if size is None else resize(image, list(size), antialias=True))[None].numpy())
    return images
