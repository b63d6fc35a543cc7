"""A trained model that takes frames of a camera, from a checkpoint or any exported file."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import overload

import numpy as np
import torch
from anomalib.models import AnomalibModule
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import Transform
from torchvision.transforms.v2.functional import resize

from .checks import require
from .data.image_files import check_white_level
from .explaining import explain
from .frames import Frame, image_of, size_of
from .metadata import UNKNOWN, Normalization, normalizations, read_metadata
from .metrics.original_size import at_size, keeps_places
from .post_processing import normalize
from .records.defects import Defect, check_sizes, find_regions
from .restoring import model_from_checkpoint
from .runtimes import OnnxRuntime, OpenVinoRuntime, Outputs, Runtime, TorchRuntime, load_torch_file

logger = logging.getLogger(__name__)

SUFFIXES = (".ckpt", ".onnx", ".xml", ".pt")
SIZE = (256, 256)  # of the frame that warms up a graph for images of any size
LANDSCAPE = (300, 400)  # of an image on which it is seen what a transform does to places


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a model finds in a frame of H x W pixels.

    Attributes:
        pred_score: Normalised score: from 0.5 on anomalous, unless the model has another sensitivity.
        raw_score: The score before it was normalised; None where it is not known.
        pred_label: Whether the frame is anomalous; None of a model without thresholds.
        anomaly_map: Normalised scores of pixels, float32, (H, W); None of a model without maps, or whose pre-processor
            crops, so that they would not show whole frames.
        pred_mask: Anomalous pixels, Boolean, (H, W); None without a map, or of a model without thresholds.
        defects: Connected regions of the mask, the one with the largest score first. Their ``max_score`` is raw, or
            normalised where raw ones are not known.
        explanation: Which branch fired, e.g. ``"logical 0.83, structural 0.12"``; None where it is not known.
    """

    pred_score: float
    raw_score: float | None
    pred_label: bool | None
    anomaly_map: np.ndarray | None
    pred_mask: np.ndarray | None
    defects: tuple[Defect, ...]
    explanation: str | None


class Inspector:
    """Inspects frames of a camera with a trained model.

    A frame is a NumPy array as a camera gives it, H x W x 3 of uint8 in the order **RGB**, gray (H x W), or uint16 with
    its ``white_level``, of any size; or the path of an image file. OpenCV's frames are BGR: give ``frame[:, :, ::-1]``.
    Results are those of ``Engine.predict`` on an image file with the same pixels, from every kind of file.

    The model is loaded and has run once when the constructor returns. Calls from several threads wait for each other;
    processes need an inspector each.

    Args:
        source: A checkpoint (``.ckpt``), or an ONNX (``.onnx``), OpenVINO (``.xml``) or Torch file (``.pt``; as for
            Anomalib's ``TorchInferencer`` the environment must say ``TRUST_REMOTE_CODE=1``); or a model in memory,
            which then is on the device and in eval mode.
        model: Class or name of the model where a checkpoint does not say it, as those of Anomalib's own models.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"``; for OpenVINO its own names, as ``"gpu"``.
        batch_size: The most frames of one size that the network sees at once.
        white_level: The value that is white in frames and files of more than 8 bits, e.g. 4095 for 12 bits.
        min_area: Least number of pixels of a defect. With it, smaller regions are dropped from the mask, and a frame is
            anomalous only if its score says so and a defect is left.
        pixel_size: Width and height of a frame's pixel in millimetres, for areas in square millimetres.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If what runs it is not installed; the message says what to install.
        ValueError: If its format is unknown, an argument is out of range, the device is not there, or there is a
            ``min_area`` but no mask.
    """

    def __init__(
        self,
        source: str | Path | AnomalibModule,
        *,
        model: str | type[AnomalibModule] | None = None,
        device: str = "auto",
        batch_size: int = 8,
        white_level: float | None = None,
        min_area: int = 0,
        pixel_size: float | None = None,
    ) -> None:
        require("batch_size", batch_size, batch_size >= 1, "at least 1")
        check_sizes(min_area, pixel_size)
        self.white_level = check_white_level(white_level)
        self.min_area, self.pixel_size = min_area, pixel_size
        self._graph = _graph_of(source, device) if isinstance(source, AnomalibModule) else load(source, model, device)
        self._batch_size = self._graph.runtime.batch_size or batch_size
        self._lock = Lock()
        height, width = self._graph.runtime.image_size or SIZE
        warm = self.predict(np.zeros((height, width, 3), np.uint8))
        require("min_area", min_area, min_area == 0 or warm.pred_mask is not None, "0 where there is no mask")
        if warm.pred_label is not None and self._graph.image.kind == "none" and self._graph.image.threshold is None:
            logger.warning("No validation run has set a threshold: all frames are labelled normal.")

    @overload
    def predict(self, frames: Frame) -> Inspection: ...

    @overload
    def predict(self, frames: Sequence[Frame]) -> list[Inspection]: ...

    def predict(self, frames: Frame | Sequence[Frame]) -> Inspection | list[Inspection]:
        """Inspect a frame, or a list of frames of any sizes.

        Raises:
            OSError: If a file cannot be read; the message names it.
            TypeError: If a frame is neither an array of uint8 or uint16 nor a path.
            ValueError: If it has another shape, values beyond what is white, or 16 bits without a ``white_level``.
        """
        if not isinstance(frames, list | tuple):
            return self.predict([frames])[0]
        by_size = defaultdict(list)
        for index, frame in enumerate(frames):
            by_size[size_of(frame)].append(index)
        found: dict[int, Inspection] = {}
        with self._lock:
            for size, indices in by_size.items():
                for start in range(0, len(indices), self._batch_size):
                    part = indices[start : start + self._batch_size]
                    found |= zip(part, self._inspect([frames[index] for index in part], size), strict=True)
        return [found[index] for index in range(len(frames))]

    def _inspect(self, frames: Sequence[Frame], size: tuple[int, int]) -> Iterator[Inspection]:
        """Inspect frames of one size, no more than a batch."""
        images = [image_of(frame, self.white_level)[None] for frame in frames]
        batch = images[0] if len(images) == 1 else torch.cat(images)  # frames are large
        if self._graph.runtime.image_size is not None:
            batch = resize(batch, list(self._graph.runtime.image_size), antialias=True)
        if self._graph.runtime.batch_size is not None:  # the last image again, until there are enough
            batch = torch.cat([batch, batch[-1:].expand(self._batch_size - len(batch), -1, -1, -1)])
        outputs = self._graph.runtime(batch.numpy())
        for index in range(len(frames)):
            yield self._inspection({name: values[index] for name, values in outputs.items()}, size)

    def _inspection(self, outputs: Outputs, size: tuple[int, int]) -> Inspection:
        """What is found in a frame of this size, from the outputs for it."""
        graph = self._graph
        score, label = float(outputs["pred_score"].squeeze()), _label(outputs.get("pred_label"))
        raw = outputs["raw_score"] if "raw_score" in outputs else graph.image.raw(outputs["pred_score"])
        scores, anomaly_map, mask = graph.maps(outputs, size)
        defects: tuple[Defect, ...] = ()
        if mask is not None and mask.any():
            regions = find_regions(mask, scores, self.min_area, self.pixel_size)
            defects, mask = tuple(regions.defects), regions.labels > 0
        if self.min_area and label is not None:  # as in records
            label = label and bool(defects)
        return Inspection(score, _known(raw), label, anomaly_map, mask, defects, graph.explanation(outputs))


@dataclass(frozen=True)
class Graph:
    """A graph that runs, and what its outputs mean.

    Attributes:
        runtime: Runs it.
        image: Normalisation of scores.
        pixel: Normalisation of maps.
        has_maps: Whether maps show whole frames, as far as is known.
        explanation_classes: Branches whose scores are the explanation.
    """

    runtime: Runtime
    image: Normalization
    pixel: Normalization
    has_maps: bool = True
    explanation_classes: Sequence[str] = ()

    def maps(
        self, outputs: Outputs, size: tuple[int, int]
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Raw map, or the normalised one where that is not known, normalised map, and mask, all at the frame's size.

        Raw scores are resized, then compared with the threshold and normalised, as for metrics and records at the size
        of image files. Where they may be lost, in those of another post-processor, its own results are resized.
        """
        if "anomaly_map" not in outputs or not self.has_maps:
            return None, None, None
        if self.pixel.kind not in {"rank_preserving", "none"}:
            anomaly_map = _at_size(outputs["anomaly_map"], size)
            mask = outputs.get("pred_mask")
            return anomaly_map, anomaly_map, None if mask is None else _nearest(mask, size)
        small = outputs["raw_map"] if "raw_map" in outputs else self.pixel.raw(outputs["anomaly_map"])
        raw = _at_size(small, size)
        anomaly_map = raw
        if self.pixel.kind == "rank_preserving":
            anomaly_map = normalize(torch.from_numpy(raw), self.pixel.center, self.pixel.scale).numpy()
        return raw, anomaly_map, self.pixel.is_anomalous(raw, anomaly_map)

    def explanation(self, outputs: Outputs) -> str | None:
        """Which branch fired; None where its score is no output."""
        names = {name: f"{name}_score" for name in self.explanation_classes}
        scores = {name: torch.from_numpy(outputs[key].reshape(1)) for name, key in names.items() if key in outputs}
        return explain(scores)[0] if scores else None


def load(path: str | Path, model: str | type[AnomalibModule] | None, device: str) -> Graph:
    """Load a checkpoint or an exported file, see :class:`Inspector`."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        msg = f"{path} must be a checkpoint or an exported file, with one of the suffixes {', '.join(SUFFIXES)}."
        raise ValueError(msg)
    if not path.is_file():
        msg = f"There is no file {path}."
        raise FileNotFoundError(msg)
    require("model", model, model is None or path.suffix == ".ckpt", "left out for an exported file")
    if path.suffix == ".ckpt":
        return _graph_of(model_from_checkpoint(path, model), device)
    if path.suffix == ".pt":
        return _graph_of(load_torch_file(path), device)
    return _graph_of_file(path, device)


def _graph_of(model: AnomalibModule, device: str) -> Graph:
    image, pixel = normalizations(model.post_processor)
    return Graph(
        TorchRuntime(model, device),
        image,
        pixel,
        has_maps=_shows_whole_frames(getattr(model.pre_processor, "transform", None)),
        explanation_classes=getattr(model, "explanation_classes", ()),
    )


def _graph_of_file(path: Path, device: str) -> Graph:
    runtime = OnnxRuntime(path, device) if path.suffix == ".onnx" else OpenVinoRuntime(path, device)
    if "pred_score" not in runtime.outputs:
        msg = f"{path} is no export of a model of Anomalib's: it has no output pred_score, only {runtime.outputs}."
        raise ValueError(msg)
    metadata = read_metadata(path)
    if metadata is None:
        return Graph(runtime, UNKNOWN, UNKNOWN)
    return Graph(
        runtime,
        metadata.image,
        metadata.pixel,
        has_maps=_shows_whole_frames(metadata.transform),
        explanation_classes=metadata.explanation,
    )


def _shows_whole_frames(transform: Transform | None) -> bool:
    if transform is None or keeps_places(LANDSCAPE, [transform]):
        return True
    logger.warning(
        "There are no maps, masks and defects: the pre-processor does more than resize frames, %s, so that maps do not "
        "show them from edge to edge.",
        transform,
    )
    return False


def _at_size(anomaly_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map resized bilinearly, from (1, h, w) or (h, w) to float32 (H, W)."""
    small = torch.from_numpy(np.asarray(anomaly_map, np.float32)).reshape(anomaly_map.shape[-2:])
    return at_size(small, size).numpy()


def _nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask enlarged or reduced, from (1, h, w) or (h, w) to (H, W)."""
    small = torch.from_numpy(mask).reshape(1, 1, *mask.shape[-2:]).float()
    return interpolate(small, size=size, mode="nearest-exact")[0, 0].numpy() > 0.5


def _label(value: np.ndarray | None) -> bool | None:
    """A label; None where there is none, as of Anomalib's post-processor before a validation."""
    return bool(value.squeeze()) if value is not None and value.dtype == np.bool_ else None


def _known(value: np.ndarray) -> float | None:
    number = float(value.squeeze())
    return None if np.isnan(number) else number
