"""Tiles of large images: how they are cut and stitched, and that the four models find in them what they see."""

import sys
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import anomalib.models
import pytest
import torch
from anomalib.data.utils.tiler import Tiler
from anomalib.models import AnomalibModule
from lightning import seed_everything
from torch import nn

from anomalib_pack import tiling
from anomalib_pack.tiling import TakesTiles, crop, divide, join
from anomalib_ulsad.lightning_model import explain

sys.path.insert(0, str(Path(__file__).parent / "contract"))
from cases import CASES

SIZES = [((64, 96), (32, 32), (32, 32), 0), ((70, 101), (32, 40), (20, 25), 0), ((64, 67), (32, 32), (15, 16), 5)]


class Result(NamedTuple):
    score: torch.Tensor
    maps: torch.Tensor
    nothing: None = None


class Net(TakesTiles):
    """Takes tiles of even sides only."""

    def check_image_size(self, size):
        if any(side % 2 for side in size):
            raise ValueError("odd")


def net(tile, stride, border=0) -> Net:
    model = Net()
    model.tiler = Tiler(tile, stride, remove_border_count=border)
    return model


@pytest.mark.parametrize(("size", "tile", "stride", "border"), SIZES)
def test_a_function_of_the_pixel_is_stitched_exactly(size, tile, stride, border) -> None:
    """Its tiles agree where they overlap: not a bit may change, whatever the weights."""
    images = torch.randn(2, 3, *size)
    result = net(tile, stride, border).over_tiles(
        images, lambda tiles: Result(tiles.amax(dim=(1, 2, 3)), tiles.square())
    )
    assert torch.equal(result.maps, images.square())
    assert torch.equal(result.score, images.amax(dim=(1, 2, 3)))  # all pixels are seen
    assert result.nothing is None


@pytest.mark.parametrize(("size", "tile", "stride", "border"), SIZES)
def test_overlaps_are_averaged(size, tile, stride, border) -> None:
    """Beside a slow reference: weights are distances from the tile's edges, but for edges of the image."""
    rows, columns = (divide(*each, border) for each in zip(size, tile, stride, strict=True))
    maps = torch.rand(1, len(rows.starts) * len(columns.starts), 1, *tile, dtype=torch.float64)
    total, weights = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for values, (top, left) in zip(maps[0, :, 0], product(rows.starts, columns.starts), strict=True):
        for y, x in product(range(tile[0]), range(tile[1])):
            weight = 1.0
            for pixel, start, side, whole in ((y, top, tile[0], size[0]), (x, left, tile[1], size[1])):
                first = side if start == 0 else pixel + 0.5 - border
                last = side if start + side == whole else side - pixel - 0.5 - border
                weight *= max(0, min(first, last))
            total[top + y, left + x] += weight * values[y, x]
            weights[top + y, left + x] += weight
    torch.testing.assert_close(join(maps, rows, columns)[0, 0], total / weights)


def test_no_seam_where_a_tile_ends() -> None:
    """Tiles of 0 and 1 in turns: a plain average would jump by a half."""
    side = divide(128, 32, 16)
    maps = (torch.arange(7.0) % 2).view(1, 7, 1, 1, 1).expand(1, 7, 1, 1, 32)
    line = join(maps, divide(1, 1, 1), side).flatten()
    assert line[0] == 0
    assert line.max() > 0.95
    assert max(abs(after - before) for before, after in pairwise(line.tolist())) < 1.1 / 16


@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
def test_tiles_where_they_fit_are_those_of_anomalib(size) -> None:
    images, tiler = torch.rand(2, 3, *size), Tiler(32, 16)
    assert torch.equal(torch.cat(list(net(32, 16).parts(images))), tiler.tile(images))
    untiled = join(tiler.tile(images).unflatten(0, (2, -1)), *(divide(side, 32, 16) for side in size))
    torch.testing.assert_close(untiled, tiler.untile(tiler.tile(images)))


def test_the_last_tile_ends_flush() -> None:
    assert divide(100, 32, 32).starts == [0, 32, 64, 68]
    assert divide(96, 32, 32).starts == [0, 32, 64]
    assert divide(32, 32, 16).starts == [0]


def test_few_tiles_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "CHUNK", 5 * 32 * 32 + 1)
    parts = list(net(32, 16).parts(torch.rand(3, 3, 64, 96)))
    assert [len(part) for part in parts] == 3 * [5, 5, 5]


def test_random_tiles() -> None:
    """Everywhere, of each image as many, in the order of the images; drawn with the seed."""
    model = net((16, 32), (16, 32))
    model.random_tile_count = 500
    position = torch.arange(40 * 48.0).view(1, 1, 40, 48)
    images = torch.cat([position, position + 10_000])
    seed_everything(0)
    tiles = model.drawn(images)
    assert tiles.shape == (1000, 1, 16, 32)
    starts = tiles[:500, 0, 0, 0].long()
    assert set((starts // 48).tolist()) == set(range(25))
    assert set((starts % 48).tolist()) == set(range(17))
    for tile, start in zip(tiles[:50], starts[:50].tolist(), strict=True):
        assert torch.equal(tile[0], crop(position[0, 0], divmod(start, 48), (16, 32)))
    assert tiles[:500].max() < 10_000 <= tiles[500:].min()
    seed_everything(0)
    assert torch.equal(model.drawn(images), tiles)
    assert not torch.equal(model.drawn(images), tiles)


@pytest.mark.parametrize(
    ("size", "tile", "stride", "border", "message"),
    [
        ((32, 32), 32, 16, 0, "not above the tiler's tile_size, .*Set the size of large images in the pre-processor"),
        ((24, 64), 32, 16, 0, r"\(24, 64\) .* not above the tiler's tile_size, \(32, 32\)"),
        ((64, 64), 32, 24, 5, "leave gaps where remove_border_count=5"),
        ((64, 64), 33, 16, 0, "odd"),
    ],
)
def test_impossible_tiles(size, tile, stride, border, message) -> None:
    model = net(tile, stride, border)
    for run in (lambda: list(model.parts(torch.rand(1, 3, *size))), lambda: model.drawn(torch.rand(1, 3, *size))):
        with pytest.raises(ValueError, match=message):
            run()


def test_a_strip_may_be_as_high_as_a_tile() -> None:
    net(32, 16).check_tiles((32, 200))


def test_without_a_tiler_nothing_is_cut() -> None:
    model, images = Net(), torch.rand(2, 3, 7, 7)
    assert model.tiles is None
    assert model.drawn(images) is images
    assert [part is images for part in model.parts(images)] == [True]
    assert model.over_tiles(images, lambda given: given) is images
    assert model.state_dict() == net(32, 16).state_dict() == {}


def test_tiles_are_plain_data() -> None:
    model, other = net((32, 64), 16, 2), Net()
    assert model.tiles == {"tile_size": [32, 64], "stride": [16, 16], "remove_border_count": 2}
    other.tiles = model.tiles
    assert other.tiles == model.tiles
    other.tiles = None
    assert other.tiler is None
    assert isinstance(other, nn.Module)


SCORING = {"MiniMaxAd": {"blur_width": 1}}  # it blurs the stitched map, not those of tiles
TILES = {"MiniMaxAd": (64, (96, 128)), "Uniad": (64, (96, 128)), "Ulsad": (256, (256, 320)), "Unislad": (64, (96, 128))}


def small(name: str, **arguments) -> AnomalibModule:
    """The contract suite's small model, with what it needs to run."""
    seed_everything(0)
    case = CASES[name]
    model = getattr(anomalib.models, name)(**case.arguments | arguments)
    case.complete(model)
    return model.eval()


@pytest.mark.parametrize("name", TILES)
@torch.no_grad()
def test_a_tile_is_an_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are the highest of what each tile alone gets; maps are theirs, stitched."""
    tile, size = TILES[name]
    stride = tile // 4 * 3
    images = torch.rand(2, 3, *size)
    model = small(name, **({"global_loss": None} if name == "Ulsad" else {}), **SCORING.get(name, {}))
    sides = [divide(side, tile, stride) for side in size]
    alone = [model.model(crop(images, place, (tile, tile))) for place in product(sides[0].starts, sides[1].starts)]
    monkeypatch.setattr(tiling, "CHUNK", 3 * tile**2)
    model.model.tiler = Tiler(tile, stride)
    result = model.model(images)
    expected = torch.stack([each.pred_score for each in alone], dim=1).amax(dim=1)
    torch.testing.assert_close(result.pred_score, expected, rtol=1e-4, atol=1e-5)
    expected = join(torch.stack([each.anomaly_map for each in alone], dim=1), *sides)
    torch.testing.assert_close(result.anomaly_map, expected, rtol=1e-4, atol=1e-5)


def test_the_map_of_minimaxad_is_blurred_as_a_whole() -> None:
    """Otherwise each tile would have a dark edge, as an image has: the tiles of one image get the same map."""
    model = small("MiniMaxAd")
    with torch.no_grad():
        one = torch.rand(1, 3, 64, 64)
        model.model.tiler = Tiler(64, 64)
        pair = model.model(torch.cat([one, one], dim=3)).anomaly_map
        model.model.tiler = None
        edge, seam = model.model(one).anomaly_map[..., -1], pair[..., 63]
    assert (seam[..., 8:-8] > 1.1 * edge[..., 8:-8]).all()


def test_ulsad_runs_its_local_branch_only() -> None:
    model = small("Ulsad")
    model.model.tiler = Tiler(256, 256)
    model.model.autoencoder.forward = None  # is not called
    with torch.no_grad():
        maps = model.model.maps(torch.rand(1, 3, 256, 320))
    assert maps.logical is None
    assert maps.highest >= maps.structural.max()
    assert explain(maps) == [f"structural {maps.highest.item():.2f}"]
    losses = model.loss(model.model.train()(torch.rand(1, 3, 256, 320)))
    assert list(losses) == ["local"]
