"""Regions of images in tiles: the image is filled first, and tiles that it does not reach are left out."""

import sys
from pathlib import Path

import anomalib.models
import numpy as np
import pytest
import torch
from anomalib.data.utils.tiler import Tiler
from anomalib.models import AnomalibModule
from lightning import seed_everything

from anomalib_pack.region import WHOLE_IMAGE, Region, build_region
from anomalib_pack.tiling import crop, divide

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from cases import CASES

CORNER = [[[0.05, 0.1], [0.35, 0.1], [0.35, 0.9]]]  # leaves out the tiles on the right
TILES = {
    "MiniMaxAd": (64, (128, 192)),
    "Uniad": (64, (128, 192)),
    "Ulsad": (256, (288, 768)),
    "Unislad": (64, (128, 192)),
}


def small(name: str) -> AnomalibModule:
    """The contract suite's small model, with what it needs to run."""
    seed_everything(0)
    arguments = CASES[name].arguments | ({"global_loss": None} if name == "Ulsad" else {})  # as with tiles
    model = getattr(anomalib.models, name)(**arguments)
    CASES[name].complete(model)
    tile, _ = TILES[name]
    model.model.tiler = Tiler(tile, tile)
    return model.eval()


@pytest.mark.parametrize("name", TILES)
@torch.no_grad()
def test_tiles_of_filled_images(name: str) -> None:
    """Against the same model without a region, on images that are filled already."""
    tile, size = TILES[name]
    region, images = build_region(CORNER), torch.rand(2, 3, *size)
    filled, inside = region.fill(images), region.inside(size, images.device)
    model = small(name).model
    expected = model(filled)
    model.region = region
    pieces = torch.cat(list(model.pieces(images)))
    places = [(y, x) for y in divide(size[0], tile, tile).starts for x in divide(size[1], tile, tile).starts]
    reached = [place for place in places if crop(inside, place, (tile, tile)).any()]
    assert 0 < len(reached) < len(places)
    assert torch.equal(
        pieces, torch.cat([crop(image, place, (tile, tile))[None] for image in filled for place in reached])
    )

    result = model(images)
    assert len(result.anomaly_map[..., ~inside].unique()) == 1
    if name != "MiniMaxAd":  # it blurs the stitched map, and then what lies inside alone
        torch.testing.assert_close(result.anomaly_map[..., inside], expected.anomaly_map[..., inside])
    model.tiler, model.region = None, WHOLE_IMAGE
    highest = torch.cat([model(piece[None]).pred_score for piece in pieces]).view(2, -1).amax(dim=1)
    torch.testing.assert_close(result.pred_score, highest, rtol=1e-4, atol=1e-5)


def test_random_tiles_are_of_the_region() -> None:
    mask = np.zeros((40, 60), dtype=bool)
    mask[30:, 50:58] = True
    region = Region(mask)
    places = region.random_places((40, 60), (16, 24), 5000)
    assert all(mask[y : y + 16, x : x + 24].any() for y, x in places)
    assert {y for y, _ in places} == set(range(15, 25))
    assert {x for _, x in places} == set(range(27, 37))
