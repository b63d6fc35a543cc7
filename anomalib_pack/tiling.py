"""Large images in tiles: cut, shown to a network some at a time, stitched.

Anomalib's ``TilerConfigurationCallback`` sets ``tiler`` of a network that has one::

    training      image -> random tiles -> network -> loss
    inference     image -> all tiles -> network, some at a time -> maps of tiles   -> stitched map
                                                                -> scores of tiles -> the highest

To a network a tile is an image. All tiles lie within the image: the last of a row and of a column end flush with it.
Anomalib's ``Tiler`` would fill images up with black instead, and a black edge is what detectors find first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data.utils.tiler import Tiler
from lightning.pytorch import Callback
from torch import nn

from .region import WHOLE_IMAGE, WholeImage

Result = TypeVar("Result", bound=NamedTuple)

CHUNK = 2**20  # ours: pixels of the tiles that a network sees at a time, which is 16 tiles of 256 x 256


class TakesTiles(nn.Module):
    """Mixin for networks that detect anomalies in images or in their tiles; it has no state dict.

    Images are filled outside the region before they are cut. Of a tile that the region reaches into all counts, and
    others are left out; the stitched map is cleared outside.

    Attributes:
        region: What counts of images.
        tiler: Sizes of tile and stride; ``None`` for whole images. Its ``mode`` has no effect: nothing is filled up.
        random_tile_count: Tiles that are drawn of each image in training. 4 in Anomalib's ``Tiler``.
    """

    region: WholeImage = WHOLE_IMAGE
    tiler: Tiler | None = None
    random_tile_count: int = 4

    @property
    def counted(self) -> WholeImage:
        """What counts of what the network sees: of a tile all."""
        return self.region if self.tiler is None else WHOLE_IMAGE

    @property
    def tiles(self) -> dict[str, Any] | None:
        """The tiler as plain data for checkpoints and metadata: (height, width) of tile and stride, and the border."""
        if self.tiler is None:
            return None
        return {
            "tile_size": [self.tiler.tile_size_h, self.tiler.tile_size_w],
            "stride": [self.tiler.stride_h, self.tiler.stride_w],
            "remove_border_count": self.tiler.remove_border_count,
        }

    @tiles.setter
    def tiles(self, tiles: dict[str, Any] | None) -> None:
        self.tiler = None if tiles is None else Tiler(**tiles)

    def check_tiles(self, size: Sequence[int]) -> None:
        """Check that images of this (height, width) can be cut into tiles, and that the network can take those.

        Raises:
            ValueError: If not; the message says what to do.
        """
        tile, stride, border = self.tiles.values()
        if any(side < least for side, least in zip(size, tile, strict=True)) or list(size) == tile:
            msg = (
                f"Images of {tuple(size)} (height, width) are not above the tiler's tile_size, {tuple(tile)}. Set the "
                "size of large images in the pre-processor (its Resize), or leave the tiler out."
            )
            raise ValueError(msg)
        if any(step + 2 * border > side for step, side in zip(stride, tile, strict=True)):
            msg = (
                f"Tiles of {tuple(tile)} with the stride {tuple(stride)} leave gaps where remove_border_count={border} "
                "pixels are taken off each side. Use a stride of at most tile_size - 2 remove_border_count."
            )
            raise ValueError(msg)
        self.check_image_size(tile)

    def drawn(self, images: torch.Tensor) -> torch.Tensor:
        """What is trained on: images (B, C, H, W) themselves, or random tiles of each (B n, C, h, w)."""
        images = self.region.fill(images)
        if self.tiler is None:
            return images
        self.check_tiles(images.shape[-2:])
        tile = self.tiles["tile_size"]
        places = self.region.random_places(images.shape[-2:], tile, self.random_tile_count * len(images))
        return torch.stack(
            [crop(images[index // self.random_tile_count], place, tile) for index, place in enumerate(places)]
        )

    def pieces(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """What is looked at: images (B, C, H, W) themselves, or tiles of one after the other, (n, C, h, w) at a time.

        A graph that is exported has all tiles of all images at once.
        """
        images = self.region.fill(images)
        if self.tiler is None:
            yield images
            return
        self.check_tiles(images.shape[-2:])
        tile = self.tiles["tile_size"]
        places = [place for place, counts in self._places(images).items() if counts]
        if torch.compiler.is_exporting():
            yield torch.stack([crop(images, place, tile) for place in places], dim=1).flatten(0, 1)
            return
        chunk = max(1, CHUNK // (tile[0] * tile[1]))
        for image in images:
            for first in range(0, len(places), chunk):
                yield torch.stack([crop(image, place, tile) for place in places[first : first + chunk]])

    def over_tiles(self, images: torch.Tensor, detect: Callable[[torch.Tensor], Result]) -> Result:
        """Detect anomalies in images, or in all tiles of them.

        Args:
            images: (B, C, H, W).
            detect: Gives for images a named tuple of maps (B, 1, H, W) and scores (B,), or ``None`` for either.

        Returns:
            The same: of tiles the stitched maps and the highest scores.
        """
        results = [detect(tiles) for tiles in self.pieces(images)]
        if self.tiler is None:
            return results[0]
        return type(results[0])(
            *(
                None if field[0] is None else self._joined(images, torch.cat(field))
                for field in zip(*results, strict=True)
            )
        )

    def _joined(self, images: torch.Tensor, of_tiles: torch.Tensor) -> torch.Tensor:
        """Join what the tiles of images gave, of those that count: (B n, ...)."""
        counts = list(self._places(images).values())
        of_tiles = of_tiles.unflatten(0, (-1, sum(counts)))
        if of_tiles.ndim == 2:
            return of_tiles.amax(dim=1)
        if not all(counts):  # where a tile does not count any other stands in for it: the map is cleared there
            order = (np.cumsum(counts) - 1).clip(0)
            of_tiles = of_tiles.index_select(1, torch.tensor(order, device=of_tiles.device))
        return self.region.clear(join(of_tiles, self._side(images, 0), self._side(images, 1)))

    def _places(self, images: torch.Tensor) -> dict[tuple[int, int], bool]:
        """Where the tiles of images begin, row after row, and whether they count."""
        rows, columns = (self._side(images, axis).starts for axis in (0, 1))
        tile = self.tiles["tile_size"]
        return {(y, x): self.region.reaches(images.shape[-2:], (y, x), tile) for y in rows for x in columns}

    def _side(self, images: torch.Tensor, axis: int) -> Side:
        tile, stride, border = self.tiles.values()
        return divide(int(images.shape[-2:][axis]), tile[axis], stride[axis], border)


class FollowsTiles:
    """Mixin for models with a network that takes tiles; stands before ``FollowsCheckpoint``.

    The tiles are state of the trained model: those of a checkpoint win over those of a callback.
    """

    _trained_tiles: dict[str, Any] | None = None  # state with the key "tiles", once there is a checkpoint

    def setup(self, stage: str) -> None:
        """Take the tiles of a training, or outside one those that the network was trained with."""
        if stage == "fit":
            self._trained_tiles = None
        elif self._trained_tiles is not None:
            self._take_trained_state(self.trained_state | self._trained_tiles)
        super().setup(stage)

    @property
    def trained_state(self) -> dict[str, Any]:
        """The tiles, ``None`` for whole images."""
        return {**super().trained_state, "tiles": self.model.tiles}

    def take_trained_state(self, state: dict[str, Any]) -> None:
        """Take the checkpoint's tiles."""
        super().take_trained_state(state)
        self.model.tiles = state.get("tiles")
        self._trained_tiles = {"tiles": self.model.tiles}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember what the checkpoint is told."""
        super().on_save_checkpoint(checkpoint)
        self._trained_tiles = {"tiles": self.model.tiles}


class Side(NamedTuple):
    """How the pixels of an image's side are covered by tiles."""

    starts: list[int]  # first pixels of the tiles
    sources: list[list[int]]  # for each pixel the same number of places in the row of all tiles' pixels
    weights: list[list[float]]  # of these, with the sum 1; the first above 0


@lru_cache(maxsize=16)
def divide(size: int, tile: int, stride: int, border: int = 0) -> Side:
    """Divide a side into tiles.

    A tile's weight falls linearly to its edges, so that a stitched map has no step where a tile ends; at the edges of
    the image it does not fall.

    Args:
        size: Pixels of the side.
        tile: Pixels of a tile, at most ``size``.
        stride: Pixels from one tile to the next; the last one ends flush with the side.
        border: Pixels at the edges of a tile that do not count, but for the image's own edges.

    Example:
        >>> divide(size=10, tile=4, stride=4).starts
        [0, 4, 6]
    """
    starts = [*range(0, size - tile, stride), size - tile]
    pixels, first = np.arange(size)[:, None], np.array(starts)
    left = np.where(first == 0, tile, pixels - first + 0.5 - border)  # distances from the edges, (size, tiles)
    right = np.where(first == size - tile, tile, first + tile - pixels - 0.5 - border)
    inside = (pixels >= first) & (pixels < first + tile)
    weights = np.where(inside, np.minimum(left, right).clip(0), 0)
    covering = (weights > 0).sum(axis=1).max()
    tiles = np.argsort(-weights, axis=1, kind="stable")[:, :covering]
    weights = np.take_along_axis(weights, tiles, axis=1)
    sources = np.where(weights > 0, tiles * tile + pixels - first[tiles], 0)
    return Side(starts, sources.T.tolist(), (weights / weights.sum(axis=1, keepdims=True)).T.tolist())


def crop(images: torch.Tensor, place: Sequence[int], tile: Sequence[int]) -> torch.Tensor:
    """Cut a tile of (height, width) with its first pixel at (y, x) out of images (..., H, W)."""
    return images[..., place[0] : place[0] + tile[0], place[1] : place[1] + tile[1]]


def join(of_tiles: torch.Tensor, rows: Side, columns: Side) -> torch.Tensor:
    """Join maps of tiles, row after row: (B, N, C, h, w) to (B, C, H, W)."""
    grid = of_tiles.unflatten(1, (len(rows.starts), len(columns.starts)))  # (B, n, m, C, h, w)
    lines = grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, C, n h, m w)
    return _blend(_blend(lines, rows).mT, columns).mT


def _blend(lines: torch.Tensor, side: Side) -> torch.Tensor:
    """Average overlapping lines of pixels: (B, C, n h, W) -> (B, C, H, W). Equal values stay what they are."""
    first, *others = (lines.index_select(2, torch.tensor(places, device=lines.device)) for places in side.sources)
    blended = first
    for other, weights in zip(others, side.weights[1:], strict=True):
        blended = blended + torch.tensor(weights, device=lines.device, dtype=lines.dtype)[:, None] * (other - first)
    return blended


def check_tiler(callbacks: Sequence[Callback]) -> None:
    """Check the trainer's callbacks for a tiler without a stride, which Anomalib's ``Tiler`` cannot do without.

    Raises:
        ValueError: If there is one; the message says what to give.
    """
    for callback in callbacks:
        if isinstance(callback, TilerConfigurationCallback) and callback.enable and callback.stride is None:
            msg = (
                f"TilerConfigurationCallback has no stride: give stride={callback.tile_size} for tiles side by side, "
                "or less to let them overlap, such as three quarters of tile_size."
            )
            raise ValueError(msg)
