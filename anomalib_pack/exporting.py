"""Exports that see image files as the engine does.

Thresholds come from images that were resized with antialiasing. Anomalib's exported transform resizes without, and
OpenVINO ignores that an ONNX ``Resize`` asks for it. So the exported transform keeps its antialiasing, and in ONNX and
OpenVINO files an antialiased interpolation is two matrix products, which all runtimes compute alike.
"""

from __future__ import annotations

import copy
import logging
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from anomalib.data import AnomalibDataModule, InferenceBatch
from anomalib.data.transforms import ExportableCenterCrop, SquarePad
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import convert_center_crop_transform
from lightning_utilities.core.imports import module_available
from torch import nn
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2 import CenterCrop, Compose, Resize, Transform

OPSET = 18  # what PyTorch writes; to convert a graph to less, as to the 14 that Anomalib asks for, fails aloud
SPATIAL = (Resize, CenterCrop, ExportableCenterCrop, SquarePad)  # of what Anomalib keeps in checkpoints


def keep_antialiasing(pre_processor: nn.Module | None) -> None:
    """Let a pre-processor export its ``transform`` as it is, but for the crop, which Anomalib makes exportable."""
    transform = getattr(pre_processor, "transform", None)
    if isinstance(pre_processor, PreProcessor) and isinstance(transform, Transform):
        pre_processor.export_transform = convert_center_crop_transform(copy.deepcopy(transform))


def check_any_size(pre_processor: nn.Module | None) -> None:
    """Check that a graph for images of any size can hold the transform of a pre-processor.

    Raises:
        ValueError: If its first step in space is no resize to a height and a width: the graph would do to all images
            what is right for the one that it was traced with.
    """
    steps = extract_transforms_by_type(getattr(pre_processor, "transform", None), SPATIAL)
    if steps and not (isinstance(steps[0], Resize) and len(steps[0].size or ()) == 2):
        msg = (
            "An ONNX or OpenVINO file for images of any size needs a pre-processor that resizes to a height and a "
            f"width first, got {steps[0]}. Give Resize both, or export for images of one size with input_size."
        )
        raise ValueError(msg)


def check_installed(names: Sequence[str], what: str) -> None:
    """Check that the packages of the extra ``export`` are there that something needs.

    Raises:
        ModuleNotFoundError: If one is not; the message says what to install.
    """
    missing = [name for name in names if not module_available(name)]
    if missing:
        msg = f'{what} needs {" and ".join(missing)}: pip install "anomalib-pack[export]".'
        raise ModuleNotFoundError(msg)


def unasked() -> list[str]:
    """Loggers of the libraries that write ONNX in whose hundreds of lines nobody has shown an interest."""
    return [name for name in ("onnx_ir", "onnxscript") if logging.getLogger(name).level == logging.NOTSET]


@contextmanager
def images_of_size(datamodule: AnomalibDataModule | None, size: tuple[int, int] | None) -> Iterator[None]:
    """Let a datamodule that belongs to no training resize images as the file takes them.

    Quantisation runs the file on its validation and test images. Anomalib's own does so with images of any size.
    """
    if datamodule is None or size is None:
        yield
        return
    names = ("val_augmentations", "test_augmentations")
    given = {name: getattr(datamodule, name) for name in names}
    try:
        for name, own in given.items():
            setattr(datamodule, name, Compose([*([] if own is None else [own]), Resize(size, antialias=True)]))
        yield
    finally:
        for name, own in given.items():
            setattr(datamodule, name, own)


class Detailed(NamedTuple):
    """What a model gives for images, before and after its post-processor.

    Attributes:
        raw: Before it.
        batch: After it.
        branches: Scores (B,) of the model's branches by name; none where it has none.
    """

    raw: InferenceBatch
    batch: InferenceBatch
    branches: dict[str, torch.Tensor]


def detailed(model: AnomalibModule, images: torch.Tensor) -> Detailed:
    """Run a model, any of Anomalib's, as its exported file does.

    Args:
        model: In eval mode.
        images: RGB in [0, 1], (B, 3, H, W).
    """
    images = model.pre_processor(images) if model.pre_processor else images
    network = model.model
    raw, branches = (
        network.with_branch_scores(images) if hasattr(network, "with_branch_scores") else (network(images), {})
    )
    return Detailed(raw, model.post_processor(raw) if model.post_processor else raw, branches)


def raw_score(raw: InferenceBatch) -> torch.Tensor:
    """Scores before post-processing; where a model gives none, the maxima of its maps, as post-processors have it."""
    return raw.anomaly_map.amax(dim=(-2, -1)) if raw.pred_score is None else raw.pred_score


def branch_outputs(branches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scores of branches by the name of their output."""
    return {f"{name}_score": scores for name, scores in branches.items()}


def with_extra_outputs(model: AnomalibModule, images: torch.Tensor) -> NamedTuple:
    """What a model gives for images, with ``raw_score``, and the score of a branch called b as ``b_score``."""
    raw, batch, branches = detailed(model, images)
    extra = {"raw_score": raw_score(raw)} | branch_outputs(branches)
    return namedtuple("ExtendedBatch", [*batch._fields, *extra])(*batch, *extra.values())


@contextmanager
def giving_extra_outputs(model: AnomalibModule, wanted: bool) -> Iterator[None]:
    """Let a model give extra outputs, if that is wanted or it does already."""
    before = model.extra_outputs
    model.extra_outputs = wanted or before
    try:
        yield
    finally:
        model.extra_outputs = before


class AntialiasingByProducts(TorchFunctionMode):
    """Context in which antialiased interpolations of images are matrix products.

    Around an export it replaces the pre-processor's resize, and the one that fits the position embedding of a ViT to
    the size of the images.

    Example:
        >>> with AntialiasingByProducts():
        ...     resized = interpolate(torch.rand(1, 3, 90, 70), size=(32, 48), mode="bilinear", antialias=True)
        >>> tuple(resized.shape)
        (1, 3, 32, 48)
    """

    def __torch_function__(
        self, func: Callable, _types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call :func:`resize` instead of ``interpolate``, which comes here with all its options by name."""
        options = kwargs or {}
        if func is interpolate and options["antialias"] and isinstance(options["size"], Sequence):
            [images] = args
            return resize(images, options["size"], options["mode"])
        return func(*args, **options)


def resize(images: torch.Tensor, size: Sequence[int], mode: str) -> torch.Tensor:
    """Resize images as ``interpolate(images, size, mode=mode, antialias=True)`` does.

    Args:
        images: Shape (B, C, H, W).
        size: Height and width of the result.
        mode: ``"bilinear"`` or ``"bicubic"``, the only ones with antialiasing.
    """
    kernel = {"bilinear": triangle, "bicubic": cubic}[mode]
    rows, columns = (
        filter_weights(old, new, kernel).to(images) for old, new in zip(images.shape[-2:], size, strict=True)
    )
    return rows @ (images @ columns.mT)  # (h, H) @ ((B, C, H, W) @ (W, w))


def filter_weights(old: int, new: int, kernel: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Weights (new, old) of the pixels of a line in each pixel of the resized line.

    The kernel stands at the centre of the new pixel; where the line gets shorter it is stretched. ``old`` may be a
    symbol, because an exported graph learns the size of an image when it runs. Distances stay whole numbers up to the
    division: OpenVINO computes in bfloat16 where the processor can, and bfloat16 does not tell 256 from 257.
    """
    old_pixels, new_pixels = torch.arange(old), torch.arange(new)
    length = old_pixels[-1] + 1
    distances = (2 * old_pixels + 1) * new - (2 * new_pixels[:, None] + 1) * length  # in units of 1 / (2 new) pixels
    weights = kernel(distances.float() / (2 * length.clamp(min=new)).float())
    return weights / weights.sum(dim=1, keepdim=True)


def triangle(x: torch.Tensor) -> torch.Tensor:
    """Kernel of bilinear interpolation."""
    return (1 - x.abs()).clamp(min=0)


def cubic(x: torch.Tensor) -> torch.Tensor:
    """Kernel of bicubic interpolation (Keys 1981) with a = -1/2, which torch takes where it antialiases."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
