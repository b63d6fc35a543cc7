"""Regions: which positions are inside, what is made of maps, and what is refused."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from PIL import Image
from tiny_model import TinyModel
from torch.nn.functional import avg_pool2d, interpolate
from torchvision.transforms.v2 import CenterCrop, Compose, RandomHorizontalFlip, Resize

from anomalib_pack.blur import gaussian_blur
from anomalib_pack.data import MVTecLoco
from anomalib_pack.region import COLOUR, RESOLUTION, WHOLE_IMAGE, Region, build_region, check_region, covers, rasterise

TRIANGLE = [[0.1, 0.2], [0.9, 0.4], [0.3, 0.95]]


def random_region(seed: int, shape: tuple[int, int] = (11, 7)) -> Region:
    return Region(np.random.default_rng(seed).random(shape) > 0.8)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def test_polygons_are_their_points() -> None:
    """Against the signs of the cross products with a triangle's edges."""
    centres = (np.arange(50) + 0.5) / 50
    x, y = np.meshgrid(centres, centres)
    sides = [
        (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1)
        for (x1, y1), (x2, y2) in zip(TRIANGLE, [*TRIANGLE[1:], TRIANGLE[0]], strict=True)
    ]
    expected = np.all(np.array(sides) > 0, axis=0)
    assert 0.2 < expected.mean() < 0.5
    np.testing.assert_array_equal(rasterise(TRIANGLE, 50), expected)


def test_polygons_join() -> None:
    left, right = [[0, 0], [0.5, 0], [0.5, 1], [0, 1]], [[0.25, 0], [0.75, 0], [0.75, 0.5], [0.25, 0.5]]
    region = build_region([left, right])
    assert region.mask.shape == (RESOLUTION, RESOLUTION)
    assert region.mask.mean() == 0.625
    assert build_region(region.given).mask.mean() == 0.625


@pytest.mark.parametrize("size", [(11, 7), (5, 3), (4, 4), (23, 40), (1, 1)])
def test_a_position_is_inside_if_any_of_the_region_is_in_it(size: tuple[int, int]) -> None:
    mask = random_region(0).mask
    expected = np.zeros(size, dtype=bool)
    for i, j in product(*map(range, size)):
        for row, column in zip(*mask.nonzero(), strict=True):
            overlaps = [
                position / new < (old + 1) / count and old / count < (position + 1) / new
                for position, new, old, count in ((i, size[0], row, 11), (j, size[1], column, 7))
            ]
            expected[i, j] |= all(overlaps)
    np.testing.assert_array_equal(covers(mask, size), expected)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("fine", "coarse"), [((64, 96), (7, 5)), ((24, 24), (6, 6)), ((30, 31), (14, 14))])
def test_every_pixel_inside_has_a_value(fine: tuple, coarse: tuple, align_corners: bool) -> None:
    """Positions of coarser grids that are inside reach all of them."""
    for seed in range(20):
        region = random_region(seed)
        maps = region.smooth(
            torch.full((1, 1, *coarse), 3.0),
            lambda maps: interpolate(maps, size=fine, mode="bilinear", align_corners=align_corners),
        )
        expected = 3.0 * region.inside(fine, maps.device)
        torch.testing.assert_close(region.clear(maps)[0, 0], expected)


def test_border() -> None:
    """A grid without the image's edges is a part of one with them."""
    region, maps = random_region(3), torch.zeros(1, 8, 6)
    inside = region.inside((8, 6), maps.device, border=4)
    torch.testing.assert_close(inside, region.inside((16, 14), maps.device)[4:-4, 4:-4])
    assert region.take(maps, border=4).shape == (1, 1, inside.sum())


def test_fill() -> None:
    images = noise(2, 3, 11, 7)
    region = random_region(4)
    for precision in (torch.float32, torch.bfloat16):
        filled = region.fill(images.to(precision))
        assert filled.dtype == precision
        assert torch.equal(filled[:, :, region.mask], images.to(precision)[:, :, region.mask])
        outside = filled[:, :, ~region.mask].float()
        torch.testing.assert_close(outside[1, :, 3], torch.tensor(COLOUR), atol=5e-3, rtol=0)
        assert (outside == outside[:, :, :1]).all()


def test_take_and_clear() -> None:
    region, maps = random_region(5), noise(2, 1, 11, 7)
    assert torch.equal(region.take(maps)[:, 0, 0], maps[:, 0, region.mask])
    assert torch.equal(region.clear(maps), maps * region.mask)


def full_size(maps: torch.Tensor) -> torch.Tensor:
    return gaussian_blur(interpolate(maps, size=(44, 28), mode="bilinear"), 9, 2.0, border="constant")


@pytest.mark.parametrize("linear", [full_size, lambda maps: avg_pool2d(maps, 3, stride=1)])
def test_smooth_leaves_out_what_is_outside(linear) -> None:
    """Against the weight of each position, found by smoothing it alone."""
    region, maps = random_region(6), noise(2, 1, 11, 7).double()
    each = linear(torch.eye(77, dtype=torch.double).view(77, 1, 11, 7)).flatten(1)  # (positions, results)
    inside = torch.tensor(region.mask.flatten())
    expected = (maps.flatten(1)[:, inside] @ each[inside]) / each[inside].sum(dim=0) * each.sum(dim=0)
    smoothed = region.smooth(maps, linear).flatten(1)
    reached = each[inside].sum(dim=0) > 1e-9
    assert 0 < reached.sum() < reached.numel() or linear is not full_size
    torch.testing.assert_close(smoothed[:, reached], expected[:, reached])
    assert torch.equal(smoothed, region.smooth(maps + 100 * torch.tensor(~region.mask), linear).flatten(1))


def test_smooth_with_a_least_share() -> None:
    region = Region(np.array([[True, True, False, False, False]]))
    maps = torch.tensor([[[[3.0, 1.0, 5.0, 5.0, 5.0]]]])
    pooled = region.smooth(maps, lambda maps: avg_pool2d(maps, (1, 3), stride=1), least=0.5)
    assert pooled.flatten().tolist() == [2.0, 0.0, 0.0]  # two of three inside, one, none
    pooled = region.smooth(maps, lambda maps: avg_pool2d(maps, (1, 5), stride=1), least=0.5)
    assert pooled.flatten().tolist() == [2.0]  # none has a half


def test_all_is_as_no_region() -> None:
    """To the last bit."""
    whole, maps = Region(np.ones((1, 1), dtype=bool)), noise(2, 1, 11, 7)
    assert torch.equal(whole.smooth(maps, full_size), WHOLE_IMAGE.smooth(maps, full_size))
    assert torch.equal(whole.clear(maps), maps)
    assert torch.equal(whole.fill(noise(1, 3, 5, 5)), noise(1, 3, 5, 5))
    assert torch.equal(whole.take(maps).flatten(), maps.flatten())


@pytest.mark.parametrize(
    "region",
    [
        [],
        [[]],
        TRIANGLE,
        [TRIANGLE[:2]],
        [[*TRIANGLE, [0.5]]],
        [[*TRIANGLE, [0.5, 1.01]]],
        [[*TRIANGLE, [-0.1, 0.5]]],
        [["a", "b", "c"]],
        [[*TRIANGLE, ["a", "b"]]],
        [[[0.2, 0.2], [0.5, 0.5], [0.7, 0.7]]],  # has no area
    ],
)
def test_polygons_that_are_none(region) -> None:
    with pytest.raises(ValueError, match=r"^region must be .*") as failure:
        build_region(region)
    assert repr(region) in str(failure.value)


def write(path: Path, values: np.ndarray) -> str:
    Image.fromarray(values.astype(np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("inside", [1, 255])
def test_mask_file(tmp_path: Path, inside: int) -> None:
    values = np.zeros((6, 8))
    values[1:3, 2:7] = inside
    path = write(tmp_path / "mask.png", values)
    for given in (path, Path(path), write(tmp_path / "colour.png", np.repeat(values[..., None], 3, axis=2))):
        region = build_region(given)
        np.testing.assert_array_equal(region.mask, values > 0)
        np.testing.assert_array_equal(build_region(region.given).mask, values > 0)  # without the file
    assert build_region(write(tmp_path / "all.png", np.full((2, 2), inside))).mask.all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((4, 4)), "must not be 0 everywhere, as .*mask.png is"),
        (np.diag([0, 10, 200, 255]), "two values, 0 outside and one inside, but .*mask.png has 4"),
        (np.diag([100, 100]) + 100, "two values, 0 outside and one inside, but .*mask.png has 2"),
    ],
)
def test_mask_files_that_are_none(tmp_path: Path, values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_region(write(tmp_path / "mask.png", values))


def test_mask_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing\.png"):
        build_region(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(OSError, match=r"text\.png"):
        build_region(tmp_path / "text.png")


# --- What a model with a region refuses ---


def model_with(region: Region, datamodule=None, transform=None) -> TinyModel:
    model = TinyModel()
    model.model.region = region
    if transform is not None:
        model.pre_processor.transform = transform
    model.trainer = SimpleNamespace(datamodule=datamodule)
    return model


@pytest.mark.parametrize(
    "transform",
    [
        Compose([Resize(40), CenterCrop(32)]),
        RandomHorizontalFlip(),
        Compose([Resize((32, 32)), RandomHorizontalFlip()]),
    ],
)
def test_transforms_that_move_what_is_inside(transform) -> None:
    with pytest.raises(ValueError, match="elsewhere after the pre-processor's transform"):
        check_region(model_with(random_region(9), transform=transform))
    check_region(model_with(WHOLE_IMAGE, transform=transform))


def test_augmentations_that_move_what_is_inside(loco: MVTecLoco) -> None:
    loco.train_augmentations = RandomHorizontalFlip()
    loco.setup()
    model = model_with(random_region(9), loco)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="augmentations of the train data"):
        check_region(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_tiles_of_an_ensemble(loco: MVTecLoco) -> None:
    """Anomalib gives each of its models one tile of all images, by the function that makes batches."""
    loco.external_collate_fn = ImageBatch.collate
    loco.setup()
    with pytest.raises(ValueError, match="elsewhere after the collate function"):
        check_region(model_with(random_region(9), loco))


def test_mask_of_another_shape(loco: MVTecLoco, tmp_path: Path) -> None:
    """The images are 64 x 64. A mask may be of any size, with a side that was rounded."""
    loco.setup()
    for size in ((64, 64), (640, 640), (9, 9), (20, 21)):
        check_region(model_with(build_region(write(tmp_path / "mask.png", np.ones(size))), loco))
    wide = build_region(write(tmp_path / "wide.png", np.ones((60, 80))))
    with pytest.raises(ValueError, match=r"wide\.png, has size \(60, 80\) .*000\.png has \(64, 64\)"):
        check_region(model_with(wide, loco))
