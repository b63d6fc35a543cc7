"""What an exported file says of itself: ``metadata.json`` beside it.

The graph keeps Anomalib's outputs. Here is what they cannot say: what the graph takes, which raw score a normalised one
was, where thresholds lie, what the model is.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing.utils.spec import spec_to_transform, transform_to_spec
from torchvision.transforms.v2 import Transform

from .files import replace_file
from .post_processing import RankPreservingPostProcessor, threshold_and_scale
from .restoring import class_path

logger = logging.getLogger(__name__)

NAME = "metadata.json"
ANY = "any"  # size of an axis
LARGEST = 1 - 2.0**-25  # the least that float32 rounds to 1

PRE_PROCESSING = (
    "Give RGB (not BGR) in the order N x 3 x H x W as float32 in [0, 1]: 8-bit values divided by 255, values of more "
    "bits by the one that is white. A gray image has three equal channels. Where image_size is 'any', images have the "
    "camera's size; else resize them to it (height, width) bilinearly with antialiasing. Nothing else: the graph holds "
    "the model's own resize and normalisation, steps, in their order."
)

# Normalised score y of z = (raw - center) / scale, and z of y.
FORMULAS = {
    "rank_preserving": ("z < 0 ? 0.5 / (1 - z) : 1 - 0.5 / (1 + z)", "y < 0.5 ? 1 - 0.5 / y : 0.5 / (1 - y) - 1"),
    "min_max": ("min(max(z + 0.5, 0), 1)", "y - 0.5 where 0 < y < 1, else lost"),
    "none": ("raw", "y"),
    "unknown": ("of another post-processor", "not known"),
}


@dataclass(frozen=True)
class Normalization:
    """How raw scores become normalised ones, and which of them are anomalous.

    With z = (raw - center) / scale, a normalised score y is by ``kind``:

    - ``rank_preserving``: (1 + z / (1 + abs(z))) / 2, see :func:`anomalib_pack.post_processing.normalize`;
    - ``min_max``: z + 0.5, clamped to [0, 1], which is Anomalib's own;
    - ``none``: the raw score;
    - ``unknown``: something else.

    Attributes:
        kind: Of the normalisation.
        center: Raw score that becomes 0.5.
        scale: Difference to it that becomes 0.25 or 0.75 (``rank_preserving``), or the range that becomes [0, 1].
        threshold: On normalised scores, the sensitivity in it; None without thresholds.
        raw_threshold: The same on raw scores; None also where no raw score reaches it.
        decision: ``>=`` or ``>``: how an anomalous score stands to the threshold.
    """

    kind: Literal["rank_preserving", "min_max", "none", "unknown"]
    center: float | None
    scale: float | None
    threshold: float | None
    raw_threshold: float | None
    decision: Literal[">=", ">"]

    def raw(self, normalized: np.ndarray) -> np.ndarray:
        """Raw scores of normalised ones; NaN where they are not known.

        Normalised scores are float32, spaced 6e-8 between 0.5 and 1. So with z as above the raw score is exact to
        scale * 2e-7 * (1 + abs(z)) ** 2 above the threshold, and to scale * 2e-7 * (1 + abs(z)) below it; to which
        comes float32's own rounding of the raw score.
        """
        y = np.asarray(normalized, dtype=np.float64)
        if self.kind == "none":
            return y
        if self.kind == "unknown":
            return np.full_like(y, np.nan)
        if self.kind == "min_max":
            z = np.where((y > 0) & (y < 1), y - 0.5, np.nan)
        else:
            y = np.minimum(y, LARGEST)  # so that no score is infinite
            with np.errstate(divide="ignore"):
                z = np.where(y < 0.5, 1 - 0.5 / y, 0.5 / (1 - y) - 1)
        return self.center + z * self.scale

    def is_anomalous(self, raw: np.ndarray, normalized: np.ndarray) -> np.ndarray | None:
        """Which scores are anomalous; None without thresholds."""
        scores, threshold = (normalized, self.threshold) if self.raw_threshold is None else (raw, self.raw_threshold)
        if threshold is None:
            return None
        return scores >= threshold if self.decision == ">=" else scores > threshold


UNKNOWN = Normalization("unknown", None, None, None, None, ">=")


def normalizations(post_processor: PostProcessor | None) -> tuple[Normalization, Normalization]:
    """What a post-processor does with scores of images and with those of pixels."""
    return _normalization(post_processor, "image"), _normalization(post_processor, "pixel")


def _normalization(post_processor: PostProcessor | None, what: str) -> Normalization:
    if post_processor is None:
        return Normalization("none", None, None, None, None, ">=")
    is_ours = isinstance(post_processor, RankPreservingPostProcessor)
    if not is_ours and type(post_processor) is not PostProcessor:
        return UNKNOWN
    decision = ">=" if is_ours else ">"
    names = (f"{what}_threshold", f"{what}_min", f"{what}_max")
    threshold, low, high = (getattr(post_processor, name) for name in names)
    center, scale = threshold_and_scale(threshold, low, high)
    thresholding = post_processor.enable_thresholding
    if not post_processor.enable_normalization or (center + scale).isnan():
        # Stock compares raw scores with 1 - sensitivity then.
        known = f"raw_{what}_threshold" if is_ours else f"normalized_{what}_threshold"
        raw_threshold = _finite(getattr(post_processor, known)) if thresholding else None
        return Normalization("none", None, None, raw_threshold, raw_threshold, decision)
    normalized = _finite(getattr(post_processor, f"normalized_{what}_threshold")) if thresholding else None
    if is_ours:
        raw = _finite(getattr(post_processor, f"raw_{what}_threshold")) if thresholding else None
        return Normalization("rank_preserving", float(center), float(scale), normalized, raw, decision)
    scale = high - low
    raw = None if normalized is None else _finite(stock_raw_threshold(center, scale, normalized))
    if scale == 0:
        return Normalization("unknown", None, None, normalized, raw, decision)
    return Normalization("min_max", float(center), float(scale), normalized, raw, decision)


def stock_raw_threshold(center: torch.Tensor, scale: torch.Tensor, normalized: float) -> torch.Tensor:
    """Raw score above which Anomalib's own post-processor calls one anomalous.

    Args:
        center: Raw score that becomes 0.5.
        scale: Range of raw scores that becomes [0, 1].
        normalized: Threshold of normalised scores. These are cut at 1, so none is above a threshold of 1.

    Returns:
        A scalar, infinite where no score is anomalous.
    """
    return center + (normalized - 0.5) * scale if normalized < 1 else torch.full_like(center, torch.inf)


def _finite(value: torch.Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def write_metadata(model: AnomalibModule, file: Path, input_size: tuple[int, int] | None) -> None:
    """Write what a file says of itself.

    Args:
        model: The exported model.
        file: The file.
        input_size: Height and width of the images that it takes; None for any.
    """
    replace_file(file.with_name(NAME), json.dumps(describe(model, file, input_size), indent=2).encode() + b"\n")


def describe(model: AnomalibModule, file: Path, input_size: tuple[int, int] | None) -> dict[str, Any]:
    """What a file says of itself, as plain data."""
    image, pixel = normalizations(model.post_processor)
    source, outputs = GRAPHS[file.suffix](file)
    state = getattr(model, "trained_state", {})
    return {
        "file": file.name,
        "model": class_path(type(model)),
        "versions": {name: version(name) for name in ("anomalib-pack", "anomalib", "torch")},
        "input": {
            **source,
            "layout": "NCHW",
            "colors": "RGB",
            "range": [0, 1],
            "image_size": ANY if input_size is None else list(input_size),
        },
        "pre_processing": {
            "what_to_do": PRE_PROCESSING,
            "steps": _steps(model),
            "network_input": None if model.input_size is None else list(model.input_size),
        },
        "outputs": outputs,
        "normalization": {
            "z": "(raw - center) / scale",
            "image": _with_formulas(image),
            "pixel": _with_formulas(pixel),
        },
        "explanation": list(model.explanation_classes),
        "region": state.get("region"),
        "tiles": state.get("tiles"),
    }


@dataclass(frozen=True)
class Metadata:
    """What the inspector needs of a file's metadata.

    Attributes:
        image: Normalisation of the scores of images.
        pixel: Normalisation of the maps.
        transform: Of the pre-processor; None where there is none, or one that Anomalib cannot store.
        explanation: Branches whose scores are the explanation.
    """

    image: Normalization
    pixel: Normalization
    transform: Transform | None
    explanation: list[str]


def read_metadata(file: Path) -> Metadata | None:
    """Read what a file says of itself.

    Args:
        file: The file.

    Returns:
        None if there is nothing beside it, or it belongs to another file.

    Raises:
        ValueError: If there is something else in its place.
    """
    path = file.with_name(NAME)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        of_file, steps = content["file"], content["pre_processing"]["steps"]
        metadata = Metadata(
            _normalization_of(content["normalization"]["image"]),
            _normalization_of(content["normalization"]["pixel"]),
            None if isinstance(steps, str) else spec_to_transform(steps),
            content["explanation"],
        )
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path} is not what an export of the pack's models writes ({error!r}): remove it, or export anew."
        raise ValueError(msg) from error
    if of_file != file.name:
        logger.warning(
            "%s belongs to %s, so raw scores of %s are not known. If that was only renamed, write its name there.",
            path,
            of_file,
            file.name,
        )
        return None
    return metadata


def _normalization_of(entry: dict[str, Any]) -> Normalization:
    return Normalization(**{field.name: entry[field.name] for field in fields(Normalization)})


def _with_formulas(normalization: Normalization) -> dict[str, Any]:
    formula, inverse = FORMULAS[normalization.kind]
    return {**asdict(normalization), "formula": formula, "inverse": inverse}


def _steps(model: AnomalibModule) -> Any:
    transform = getattr(model.pre_processor, "transform", None)
    try:
        return transform_to_spec(transform)
    except ValueError:  # none that Anomalib stores
        return str(transform)


def _torch_graph(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """The model itself, whose outputs are known when it runs."""
    del file
    return {"name": None, "dtype": "float32", "shape": [ANY, 3, ANY, ANY]}, None


def _onnx_graph(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    onnx = import_module("onnx")  # an extra
    graph = onnx.load(file, load_external_data=False).graph

    def tensor(value: Any) -> dict[str, Any]:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        shape = [side.dim_value if side.HasField("dim_value") else ANY for side in kind.shape.dim]
        return {"name": value.name, "dtype": dtype, "shape": shape}

    return tensor(graph.input[0]), [tensor(output) for output in graph.output]


def _openvino_graph(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    model = import_module("openvino").Core().read_model(file)  # an extra

    def tensor(value: Any) -> dict[str, Any]:
        shape = [side.get_length() if side.is_static else ANY for side in value.partial_shape]
        return {"name": value.any_name, "dtype": value.element_type.to_dtype().name, "shape": shape}

    return tensor(model.input(0)), [tensor(output) for output in model.outputs]


GRAPHS = {".pt": _torch_graph, ".onnx": _onnx_graph, ".xml": _openvino_graph}
