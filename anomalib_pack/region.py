"""What of an image is inspected, so that nothing else counts.

A network holds one of two as ``region``, and calls it alike::

    image -> fill -> network -> features -> take    -> losses, statistics, memory banks
                                         -> smooth  -> clear -> anomaly map
                                                       take  -> scores, quantiles, thresholds, metrics

    WholeImage    everything counts; each method gives back what it gets
    Region        outside, the image is of one colour, and maps are 0, the distance that perfectly normal features have

A region is a mask that covers the image from edge to edge. One rule brings it to any grid, that of the network's input,
of features, of maps or of an image file: a position is inside if any of the region lies in it. So a border is exact to
a pixel of the network's input, and a position of a coarse grid is inside if one of the finer grid in it is.

The networks see filled images whole, and the colour never changes. What they make of it is left out by position:
losses, statistics and banks take the positions inside alone, and where a map is resized or blurred, values outside have
no weight.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torchvision.transforms.v2 import Transform

from .checks import require
from .data.image_files import read, read_header
from .data.masks import count_values, mask_values
from .feature_cache import is_fixed
from .metrics.original_size import keeps_places

Polygons = Sequence[Sequence[Sequence[float]]]

COLOUR = (0.485, 0.456, 0.406)  # ImageNet's mean, which the networks' normalisation makes 0
RESOLUTION = 1024  # ours: side of the mask that polygons become
PIXELS = ("anomaly_map", "gt_mask", "pred_mask")  # fields of a batch
TRIES = 20  # ours: for random transforms; a flip with probability 0.5 stays unseen once in a million times
KEPT = 16  # grids whose masks are kept
URL = "data:image/png;name="
RULE = "None, the path of a mask, or polygons: lists of at least three points [x, y] with x and y from 0 to 1"


class WholeImage:
    """No region: everything counts.

    Attributes:
        is_part: Whether something does not.
        given: The argument that it was built from, as plain data.
    """

    is_part = False
    given: Polygons | str | None = None

    def fill(self, images: torch.Tensor) -> torch.Tensor:
        """Give images (B, 3, H, W), RGB in [0, 1], one colour outside."""
        return images

    def take(self, maps: torch.Tensor, border: int = 0) -> torch.Tensor:  # noqa: ARG002
        """Take the positions inside: (..., h, w) -> (..., 1, n).

        Args:
            maps: Features, distances or masks.
            border: Positions at each edge of the image that the grid lacks.
        """
        return maps

    def smooth(
        self,
        maps: torch.Tensor,
        linear: Callable[[torch.Tensor], torch.Tensor],
        least: float = 0,  # noqa: ARG002
        border: int = 0,  # noqa: ARG002
    ) -> torch.Tensor:
        """Resize, blur or pool maps, whose values outside have no weight.

        Args:
            maps: (B, 1, h, w).
            linear: What does so; linear, with weights of at least 0.
            least: Results are 0 where a smaller share of their weights lies inside, or, where none has so much, a
                smaller one than the largest.
            border: As in :meth:`take`.
        """
        return linear(maps)

    def clear(self, maps: torch.Tensor) -> torch.Tensor:
        """Set maps of distances, (B, 1, H, W), to 0 outside."""
        return maps

    def reaches(self, size: Sequence[int], place: Sequence[int], tile: Sequence[int]) -> bool:  # noqa: ARG002
        """Whether something counts of a tile (height, width) of images of a size, with its first pixel at (y, x)."""
        return True

    def random_places(self, size: Sequence[int], tile: Sequence[int], count: int) -> list[tuple[int, int]]:
        """Draw places (y, x) of tiles of which something counts."""
        ends = [whole - side + 1 for whole, side in zip(size, tile, strict=True)]
        return list(zip(*(torch.randint(end, (count,)).tolist() for end in ends), strict=True))

    def part_of(self, batch: SimpleNamespace) -> SimpleNamespace:
        """A batch for metrics of single pixels: maps and masks with the positions inside alone."""
        maps = {name: self.take(value) for name, value in vars(batch).items() if name in PIXELS and value is not None}
        return SimpleNamespace(**(vars(batch) | maps))


WHOLE_IMAGE = WholeImage()


class Region(WholeImage):
    """A part of all images.

    Args:
        mask: Boolean, (h, w); it covers images from edge to edge.
        given: See :class:`WholeImage`.

    Example:
        >>> region = Region(np.array([[True, False], [False, False]]))
        >>> region.take(torch.arange(16.0).view(1, 1, 4, 4))
        tensor([[[[0., 1., 4., 5.]]]])
    """

    is_part = True

    def __init__(self, mask: np.ndarray, given: Polygons | str | None = None) -> None:
        self.mask = mask
        self.given = given
        self._kept: dict[tuple, Any] = {}

    def inside(self, size: Sequence[int], device: torch.device, border: int = 0) -> torch.Tensor:
        """Which positions of a grid are inside.

        Args:
            size: Height and width of the grid.
            device: Of the result.
            border: Positions at each edge of the image that the grid lacks.

        Returns:
            Boolean, (h, w).
        """
        height, width = map(int, size)
        return self._constant(("inside", height, width, border, device), lambda: self._covers(height, width, border))

    def _covers(self, height: int, width: int, border: int = 0) -> np.ndarray:
        whole = covers(self.mask, (height + 2 * border, width + 2 * border))
        return whole[border : border + height, border : border + width]

    def reaches(self, size: Sequence[int], place: Sequence[int], tile: Sequence[int]) -> bool:
        """Whether something counts of a tile (height, width) of images of a size, with its first pixel at (y, x)."""
        mask = self._on_cpu(size)
        return bool(mask[place[0] : place[0] + tile[0], place[1] : place[1] + tile[1]].any())

    def random_places(self, size: Sequence[int], tile: Sequence[int], count: int) -> list[tuple[int, int]]:
        """Draw places (y, x) of tiles: a pixel that counts, and a tile that it is in."""
        height, width = size
        index = self._index(height, width, 0, torch.device("cpu"))
        pixels = np.unravel_index(index[torch.randint(len(index), (count,))].numpy(), tuple(size))
        places = (
            (chosen - torch.randint(side, (count,)).numpy()).clip(0, whole - side).tolist()
            for chosen, whole, side in zip(pixels, size, tile, strict=True)
        )
        return list(zip(*places, strict=True))

    def _on_cpu(self, size: Sequence[int]) -> np.ndarray:
        height, width = map(int, size)
        key = ("pixels", height, width)
        if key not in self._kept:
            self._keep(key, self._covers(height, width))
        return self._kept[key]

    def _keep(self, key: tuple, value: Any) -> None:
        if len(self._kept) >= KEPT:
            self._kept.clear()
        self._kept[key] = value

    def _constant(self, key: tuple, make: Callable[[], np.ndarray]) -> torch.Tensor:
        """A tensor on the device that the key ends with, made once."""
        if key in self._kept:
            return self._kept[key]
        with torch.inference_mode(mode=False):  # training needs it too
            tensor = torch.from_numpy(make()).to(key[-1])
        if type(tensor) is torch.Tensor:  # no stand-in, as while a graph is exported
            self._keep(key, tensor)
        return tensor

    def fill(self, images: torch.Tensor) -> torch.Tensor:
        """Give images (B, 3, H, W), RGB in [0, 1], one colour outside."""
        colour = self._constant(("colour", images.device), lambda: np.array(COLOUR, dtype=np.float32).reshape(3, 1, 1))
        return torch.where(self.inside(images.shape[-2:], images.device), images, colour.to(images.dtype))

    def take(self, maps: torch.Tensor, border: int = 0) -> torch.Tensor:
        """Take the positions inside: (..., h, w) -> (..., 1, n)."""
        height, width = map(int, maps.shape[-2:])
        index = self._index(height, width, border, maps.device)
        return maps.flatten(-2).index_select(-1, index).unsqueeze(-2)

    def _index(self, height: int, width: int, border: int, device: torch.device) -> torch.Tensor:
        """Positions inside, counted row after row."""
        return self._constant(
            ("index", height, width, border, device), lambda: np.flatnonzero(self._covers(height, width, border))
        )

    def smooth(
        self,
        maps: torch.Tensor,
        linear: Callable[[torch.Tensor], torch.Tensor],
        least: float = 0,
        border: int = 0,
    ) -> torch.Tensor:
        """Resize, blur or pool maps, whose values outside have no weight."""
        inside = self.inside(maps.shape[-2:], maps.device, border)[None, None].to(maps.dtype)
        # What is linear may itself give the edges of an image less weight than 1.
        weights = linear(torch.cat([inside, torch.ones_like(inside)]))
        least_weight = torch.finfo(maps.dtype).tiny
        share = weights[:1] / weights[1:].clamp_min(least_weight)
        smoothed = linear(torch.where(inside > 0, maps, 0)) / share.clamp_min(least_weight)
        return torch.where(share >= share.amax(dim=(0, 1, 2, 3)).clamp_max(least), smoothed, 0)

    def clear(self, maps: torch.Tensor) -> torch.Tensor:
        """Set maps of distances, (B, 1, H, W), to 0 outside."""
        return torch.where(self.inside(maps.shape[-2:], maps.device), maps, 0)


def build_region(region: Polygons | str | Path | None) -> WholeImage:
    """Build what a model's argument ``region`` says.

    Args:
        region: Polygons of points [x, y] in fractions of the image's width and height, of which what lies in any is
            inside; a mask, inside where it is not 0, as the path of its file or what :func:`plain_region` makes of
            that; or ``None`` for the whole image.

    Raises:
        OSError: If the mask cannot be read; the message names the file.
        ValueError: If it is none of these, or nothing is inside.
    """
    given = plain_region(region)
    if given is None:
        return WHOLE_IMAGE
    if isinstance(given, str):
        return Region(decode(given), given)
    return Region(np.any([rasterise(polygon, RESOLUTION) for polygon in given], axis=0), given)


def plain_region(region: Polygons | str | Path | None) -> list | str | None:
    """A model's argument ``region`` as plain data that needs no file: a mask as the text of a ``data:`` URL.

    Raises:
        OSError: If the mask cannot be read; the message names the file.
        ValueError: If it is neither that nor polygons, or nothing is inside.
    """
    if region is None or (isinstance(region, str) and region.startswith(URL)):
        return region
    if isinstance(region, str | Path):
        return encode(read_region(region), Path(region).name)
    require("region", region, bool(region) and all(map(is_polygon, region)), RULE)
    has_area = any(rasterise(polygon, RESOLUTION).any() for polygon in region)
    require("region", region, has_area, f"polygons that have something inside, at {RESOLUTION} points a side")
    return [[[float(x), float(y)] for x, y in polygon] for polygon in region]


def encode(mask: np.ndarray, name: str) -> str:
    """A mask as the text of a ``data:`` URL, with the name of its file.

    Example:
        >>> text = encode(np.array([[True, False]]), "mask of 2.png")
        >>> text[:44], name_of(text)
        ('data:image/png;name=mask%20of%202.png;base64', 'mask of 2.png')
        >>> decode(text)
        array([[ True, False]])
    """
    file = BytesIO()
    Image.fromarray(mask).save(file, "PNG", optimize=True)
    return f"{URL}{quote(name)};base64,{b64encode(file.getvalue()).decode()}"


def decode(text: str) -> np.ndarray:
    """The mask of such a text."""
    with Image.open(BytesIO(b64decode(text.partition(",")[2]))) as image:
        return np.array(image)


def name_of(text: str) -> str:
    """The name in such a text."""
    return unquote(text.removeprefix(URL).partition(";")[0])


def is_polygon(points: Any) -> bool:
    """Whether these are at least three points within the image."""
    if not isinstance(points, Sequence) or isinstance(points, str) or len(points) < 3:
        return False
    numbers = [list(point) for point in points if isinstance(point, Sequence) and len(point) == 2]
    return len(numbers) == len(points) and all(
        isinstance(number, int | float) and 0 <= number <= 1 for point in numbers for number in point
    )


def rasterise(polygon: Sequence[Sequence[float]], side: int) -> np.ndarray:
    """Which points of a square grid lie in a polygon, by the even-odd rule.

    Example:
        >>> rasterise([[0, 0], [0.5, 0], [0.5, 1], [0, 1]], side=2)
        array([[ True, False],
               [ True, False]])
    """
    centres = (np.arange(side) + 0.5) / side
    inside = np.zeros((side, side), dtype=bool)
    for (x1, y1), (x2, y2) in pairwise([*polygon, polygon[0]]):
        crossed = (y1 > centres) != (y2 > centres)  # lines of the grid that the edge crosses
        x = x1 + (centres[crossed] - y1) / (y2 - y1 or 1) * (x2 - x1)
        inside[crossed] ^= centres < x[:, None]
    return inside


def read_region(path: str | Path) -> np.ndarray:
    """Read a mask, (h, w).

    Raises:
        OSError: If it cannot be read; the message names the file.
        ValueError: If it has other values than 0 and one more, or is 0 everywhere.
    """
    values = read(mask_values, path)
    count = count_values(values) + bool(values.all())  # a mask without 0 may have one value
    if count > 2:
        msg = (
            f"The mask of a region must have two values, 0 outside and one inside, but {path} has "
            f"{count_values(values)}. Save it without soft edges and without JPEG's compression, as a PNG."
        )
        raise ValueError(msg)
    if not values.any():
        msg = f"The mask of a region must not be 0 everywhere, as {path} is: nothing would be inside."
        raise ValueError(msg)
    return values > 0


def covers(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Bring a mask to a grid: a position is inside if any of what lies in it is.

    Example:
        >>> covers(np.array([[True, False, False]]), (1, 2))
        array([[ True, False]])
        >>> covers(np.array([[False, True, False]]), (1, 2))
        array([[ True,  True]])
    """
    total = np.pad(mask.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
    (top, bottom), (left, right) = (edges(*sides) for sides in zip(mask.shape, size, strict=True))
    return (total[bottom][:, right] - total[bottom][:, left] - total[top][:, right] + total[top][:, left]) > 0


def edges(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of ``new`` positions of a line, the first of ``old`` ones that lie in it, and the one behind the last."""
    position = np.arange(new)
    return position * old // new, -(-(position + 1) * old // new)


def region_of(module: Any) -> WholeImage:
    """The region of a model; the whole image for models without."""
    region = getattr(getattr(module, "model", None), "region", None)
    return region if isinstance(region, WholeImage) else WHOLE_IMAGE


def check_region(module: AnomalibModule) -> None:
    """Check that a model's region lies in the images that it will see as it lies in those that it was drawn on.

    Raises:
        ValueError: If a transform crops, pads, flips or turns images, if Anomalib's tiled ensemble cuts them, or if the
            mask's file is not of their shape.
    """
    region = region_of(module)
    if not region.is_part:
        return
    _check_transform(getattr(module.pre_processor, "transform", None), "pre-processor's transform")
    datamodule = module.trainer.datamodule
    if not isinstance(datamodule, AnomalibDataModule):
        return
    _check_transform(datamodule.external_collate_fn, "collate function")
    for split in ("train", "val", "test"):
        dataset = getattr(datamodule, f"{split}_data", None)
        parts = list(getattr(dataset, "parts", {}).values()) or [part for part in [dataset] if part is not None]
        for transform in {id(part.augmentations): part.augmentations for part in parts}.values():
            _check_transform(transform, f"augmentations of the {split} data")
        if isinstance(region.given, str):
            for part in parts:
                path = part.samples.image_path.iloc[0]
                _check_shape(region, path, read_header(path).size)


def _check_transform(transform: Any, what: str) -> None:
    if not _keeps_places(transform):
        msg = (
            f"A region is defined on the whole image, but it would be elsewhere after the {what}: {transform}. For a "
            "region nothing may crop, pad, flip or turn images."
        )
        raise ValueError(msg)


def _keeps_places(transform: Any) -> bool:
    if transform is None:
        return True
    if not isinstance(transform, Transform):  # who knows
        return False
    with isolate_rng(include_cuda=False):
        return all(keeps_places((360, 480), [transform]) for _ in range(1 if is_fixed(transform) else TRIES))


def _check_shape(region: WholeImage, path: str, size: Sequence[int]) -> None:
    (height, width), (rows, columns) = size, region.mask.shape
    # To a pixel of the mask, whose sides may have been rounded.
    if abs(rows - columns * height / width) > 1 and abs(columns - rows * width / height) > 1:
        msg = (
            f"The mask of the region, {name_of(region.given)}, has size {(rows, columns)} (height, width), which is "
            f"not of the shape of the images: {path} has {tuple(size)}. Draw it on an image of the camera, of any size."
        )
        raise ValueError(msg)


def check_one_size(module: AnomalibModule) -> None:
    """Check that a graph for images of any size can hold a model's region.

    Raises:
        ValueError: If nothing in it resizes them: their size would be known too late.
    """
    if region_of(module).is_part and module.input_size is None:
        msg = (
            "An ONNX or OpenVINO file with a region needs a pre-processor that resizes images, or the input_size of "
            "the export."
        )
        raise ValueError(msg)
