"""Tiles of large images: how they are cut and stitched, and that the four models find in them what they see."""

import logging
import sys
from contextlib import suppress
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import anomalib.models
import onnxruntime
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data.utils.tiler import Tiler
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning import seed_everything
from tiny_model import RawScores
from torch import nn

from anomalib_pack import passes, tiling
from anomalib_pack.data import MVTecLoco
from anomalib_pack.explaining import explain
from anomalib_pack.passes import gather_tiles
from anomalib_pack.tiling import TakesTiles, crop, divide, join
from anomalib_ulsad.torch_model import branch_scores

sys.path.insert(0, str(Path(__file__).parent / "contract"))
from cases import CASES
from runs import quiet_engine

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


class Doubled(Net):
    """Gives a map and a score."""

    def forward(self, images):
        return self.over_tiles(images, lambda tiles: Result(tiles.amax(dim=(1, 2, 3)), 2 * tiles))[:2]


@torch.no_grad()
def test_tiles_in_a_graph() -> None:
    """For any number of images; the sides do not divide."""
    model, images = Doubled(), torch.rand(3, 1, 50, 70)
    model.tiler = Tiler(32, 20)
    dynamic = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(model, (images[:2],), dynamic_shapes=dynamic, strict=False)
    for given, expected in zip(program.module()(images), model(images), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
def test_tiles_where_they_fit_are_those_of_anomalib(size) -> None:
    images, tiler = torch.rand(2, 3, *size), Tiler(32, 16)
    assert torch.equal(torch.cat(list(net(32, 16).pieces(images))), tiler.tile(images))
    untiled = join(tiler.tile(images).unflatten(0, (2, -1)), *(divide(side, 32, 16) for side in size))
    torch.testing.assert_close(untiled, tiler.untile(tiler.tile(images)))


def test_the_last_tile_ends_flush() -> None:
    assert divide(100, 32, 32).starts == [0, 32, 64, 68]
    assert divide(96, 32, 32).starts == [0, 32, 64]
    assert divide(32, 32, 16).starts == [0]


def test_few_tiles_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "CHUNK", 5 * 32 * 32 + 1)
    pieces = list(net(32, 16).pieces(torch.rand(3, 3, 64, 96)))
    assert [len(part) for part in pieces] == 3 * [5, 5, 5]


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
    for run in (lambda: list(model.pieces(torch.rand(1, 3, *size))), lambda: model.drawn(torch.rand(1, 3, *size))):
        with pytest.raises(ValueError, match=message):
            run()


def test_a_strip_may_be_as_high_as_a_tile() -> None:
    net(32, 16).check_tiles((32, 200))


def test_without_a_tiler_nothing_is_cut() -> None:
    model, images = Net(), torch.rand(2, 3, 7, 7)
    assert model.tiles is None
    assert model.drawn(images) is images
    assert [part is images for part in model.pieces(images)] == [True]
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
    assert explain(branch_scores(maps)) == [f"structural {maps.highest.item():.2f}"]
    losses = model.loss(model.model.train()(torch.rand(1, 3, 256, 320)))
    assert list(losses) == ["local"]


def test_the_order_of_tiles_from_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tiles of an image from each process; the last has no image left, and remembers fewer tiles."""
    first, second, none = torch.rand(3, 2), torch.rand(3, 2), torch.rand(0, 2)
    module = SimpleNamespace(trainer=SimpleNamespace(world_size=2))
    for shares, expected in (([first, second], torch.cat([first, second])), ([first, none], first)):
        packed = []
        monkeypatch.setattr(passes, "gather_all_tensors", packed.append)
        for share in shares:
            with suppress(TypeError):  # nothing is gathered yet
                gather_tiles(module, share)
        monkeypatch.setattr(passes, "gather_all_tensors", lambda _, packed=packed: packed)
        assert torch.equal(gather_tiles(module, shares[1]), expected)


def tiler(tile: int, stride: int | None) -> TilerConfigurationCallback:
    return TilerConfigurationCallback(enable=True, tile_size=tile, stride=stride)


def build(name: str, size: tuple[int, int], **arguments) -> AnomalibModule:
    model_class = getattr(anomalib.models, name)
    return small(name, pre_processor=model_class.configure_pre_processor(size), **arguments)


def fit(name: str, data: MVTecLoco, root: Path, **arguments) -> tuple[AnomalibModule, Engine]:
    """Train for an epoch on tiles that overlap by a quarter."""
    tile, size = TILES[name]
    model = build(name, size, **arguments)
    engine = quiet_engine(root, max_epochs=1, callbacks=[tiler(tile, tile // 4 * 3)])
    engine.fit(model, datamodule=data)
    return model, engine


def tiles_of(model: AnomalibModule, images: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(model.model.pieces(torch.stack(images))))


def test_the_tiles_of_a_checkpoint_win(loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained, engine = fit("Uniad", loco, tmp_path, random_tile_count=3)
    checkpoint = engine.best_model_path
    tiles = {"tile_size": [64, 64], "stride": [48, 48], "remove_border_count": 0}
    scores = RawScores()
    expected = quiet_engine(tmp_path, callbacks=[scores]).test(trained, datamodule=loco)
    for other in ([], [tiler(64, 64)]):
        caplog.clear()
        model, again = build("Uniad", TILES["Uniad"][1]), RawScores()
        metrics = quiet_engine(tmp_path, callbacks=[again, *other]).test(model, datamodule=loco, ckpt_path=checkpoint)
        assert metrics == expected
        assert torch.equal(torch.cat(again.maps), torch.cat(scores.maps))
        [line] = [record.message for record in caplog.records if record.name == "anomalib_pack.checkpoints"]
        assert f"tiles={tiles} instead of" in line
    restored = type(model).load_from_checkpoint(checkpoint)
    assert restored.model.tiles == tiles
    for each in (restored, trained):  # in whose network the callback puts its own
        assert quiet_engine(tmp_path, callbacks=[tiler(64, 64)]).test(each, datamodule=loco) == expected

    whole = build("Uniad", TILES["Uniad"][1])
    engine = quiet_engine(tmp_path / "whole", max_epochs=1)
    engine.fit(whole, datamodule=loco)
    assert whole.state_dict().keys() == trained.state_dict().keys()
    quiet_engine(tmp_path, callbacks=[tiler(64, 64)]).test(model, datamodule=loco, ckpt_path=engine.best_model_path)
    assert model.model.tiles is None


def test_frozen_features_of_random_tiles_are_not_kept(
    loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("Uniad", (96, 128))
    engine = quiet_engine(tmp_path, max_epochs=2, max_steps=2, limit_val_batches=0, callbacks=[tiler(64, 48)])
    with caplog.at_level(logging.INFO):
        engine.fit(model, datamodule=loco)
    assert "features of the frozen network: random tiles are drawn of each image." in caplog.text


def test_what_ulsad_measures_is_of_tiles(loco: MVTecLoco, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, engine = fit("Ulsad", loco, tmp_path)
    assert "only the local branch runs" in caplog.text
    network = model.model.eval()
    with torch.no_grad():
        features = network.raw_features(tiles_of(model, [item.image for item in loco.train_data]))
        maps = network.raw_maps(torch.stack([item.image for item in loco.val_data])).structural
    torch.testing.assert_close(network.feature_mean.flatten(), features.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-5)
    q_alpha, q_beta = network.structural_quantiles
    assert abs((maps < q_alpha).float().mean() - 0.9) < 0.01  # of every fourth row and column
    assert abs((maps < q_beta).float().mean() - 0.995) < 0.002
    [first, *_] = engine.predict(model, datamodule=loco)
    assert first.explanation[0].startswith("structural")
    assert "logical" not in first.explanation[0]
    assert first.anomaly_map.shape[-2:] == (256, 320)


def test_what_unislad_remembers_is_of_tiles(loco: MVTecLoco, tmp_path: Path) -> None:
    model, _ = fit("Unislad", loco, tmp_path, local_ratio=0.0, global_ratio=0.0)
    network = model.model.eval()
    images = [item.image for item in loco.train_data]
    tiles = tiles_of(model, images)
    assert len(tiles) == 6 * len(images)  # 2 x 3
    with torch.no_grad():
        features = network.extract(tiles)
        scores = network.raw_scores(features, network.patch_map(features))
        normal = torch.stack([item.image for item in loco.val_data])
        of_tiles = model._raw_scores(normal)
    assert len(network.class_bank.neighbors.bank) == len(tiles)
    assert len(network.local_bank.neighbors.bank) == features.local_patches[:, 0].numel()
    assert scores[3].max() < 1e-2  # what is remembered has no distance
    assert of_tiles.shape == (len(normal), 6, 4)
    torch.testing.assert_close(network.score_mean, of_tiles.mean(dim=(0, 1)), rtol=1e-3, atol=1e-4)


def test_minimaxad_learns_from_random_tiles(loco: MVTecLoco, tmp_path: Path) -> None:
    seen = []
    model = build("MiniMaxAd", (96, 128), random_tile_count=3)
    model.model.bottleneck.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].shape))
    engine = quiet_engine(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[tiler(64, 48)])
    engine.fit(model, datamodule=loco)
    assert [shape[0] for shape in seen] == [3 * 4]
    assert seen[0][2:] == (16, 16)


def test_a_callback_without_stride(loco: MVTecLoco, tmp_path: Path) -> None:
    engine = quiet_engine(tmp_path, max_epochs=1, callbacks=[tiler(64, None)])
    with pytest.raises(ValueError, match="TilerConfigurationCallback has no stride: give stride=64"):
        engine.fit(build("Uniad", (96, 128)), datamodule=loco)


def test_images_no_larger_than_a_tile(loco: MVTecLoco, tmp_path: Path) -> None:
    engine = quiet_engine(tmp_path, max_epochs=1, callbacks=[tiler(96, 48)])
    with pytest.raises(ValueError, match="not above the tiler's tile_size"):
        engine.fit(build("Uniad", (96, 96)), datamodule=loco)


@pytest.mark.slow
@pytest.mark.parametrize("name", TILES)
@torch.no_grad()
def test_an_exported_file_has_the_tiles(name: str, tmp_path: Path) -> None:
    tile, size = TILES[name]
    model = build(name, size)
    model.model.tiler = Tiler(tile, tile // 4 * 3)
    images = torch.rand(2, 3, *size)
    expected = model(images)
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path, input_size=size))
    outputs = dict(
        zip((each.name for each in session.get_outputs()), session.run(None, {"input": images.numpy()}), strict=True)
    )
    again = torch.load(model.to_torch(tmp_path), weights_only=False)["model"].eval()(images)
    for field in ("pred_score", "anomaly_map"):
        value = getattr(expected, field)
        torch.testing.assert_close(torch.from_numpy(outputs[field]).view(value.shape), value, rtol=1e-3, atol=1e-3)
        assert torch.equal(getattr(again, field), value)
