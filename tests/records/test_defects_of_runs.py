"""Defects of real runs of a tiny model: at the size of the files, without specks, and as COCO annotations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem, InferenceBatch, PredictDataset
from anomalib.metrics import F1Score
from anomalib.models import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from PIL import Image
from records_runs import Tiny, engine, folder, read
from scipy import ndimage
from skimage.draw import polygon
from tiny_model import RawScores, TinyModel, TinyNet
from torch.utils.data import Dataset
from torchvision.transforms.v2 import CenterCrop

from anomalib_pack.callbacks import WriteRecords
from anomalib_pack.data import MVTecLoco
from anomalib_pack.metrics import GroupEvaluator

MIN_AREA = 12


class Sees(Visualizer):
    """Keeps labels and masks as visualizers get them."""

    def __init__(self) -> None:
        self.labels, self.masks = [], []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.labels += batch.pred_label.tolist()
        self.masks += list(torch.Tensor(batch.pred_mask.clone()).bool().reshape(-1, 32, 32).numpy())


def with_threshold(model: AnomalibModule, loco: MVTecLoco, root: Path) -> tuple[AnomalibModule, float]:
    """Train the model, and choose thresholds between its test scores that give many defects."""
    raw = RawScores()
    running = engine(root, raw)
    running.fit(model, datamodule=loco)
    running.test(model, datamodule=loco)
    _, scores, maps, _, _ = raw.arrays()
    processor, pixels = model.post_processor, np.sort(maps.flatten())
    threshold = float(pixels[int(0.97 * len(pixels)) :][:2].mean())
    processor._pixel_threshold.fill_(threshold)
    processor._image_threshold.fill_(float(np.sort(scores)[2:4].mean()))
    processor.pixel_min.fill_(float(pixels[0]))
    processor.pixel_max.fill_(float(pixels[-1]))
    return model, threshold


def at_file_size(maps: np.ndarray) -> np.ndarray:
    return torch.nn.functional.interpolate(torch.tensor(maps)[:, None], size=(64, 64), mode="bilinear")[:, 0].numpy()


def slow_defects(raw_map: np.ndarray, threshold: float, min_area: int) -> list[tuple[float, int]]:
    """Largest score and area of each defect of an image of 64 x 64 pixels."""
    [large] = at_file_size(raw_map[None])
    found, count = ndimage.label(large > threshold, structure=np.ones((3, 3)))
    regions = [found == number for number in range(1, count + 1)]
    return sorted(((large[region].max(), region.sum()) for region in regions if region.sum() >= min_area), reverse=True)


@pytest.fixture(scope="module", params=["pack", "stock"])
def trained(request: pytest.FixtureRequest, loco_root: Path, tmp_path_factory) -> tuple[AnomalibModule, float]:
    torch.manual_seed(0)
    data = MVTecLoco(root=loco_root, category="tray", train_batch_size=4, eval_batch_size=4, num_workers=0)
    model = (Tiny if request.param == "pack" else TinyModel)(visualizer=Sees())
    return with_threshold(model, data, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("min_area", [0, MIN_AREA])
def test_defects(trained: tuple[AnomalibModule, float], loco: MVTecLoco, tmp_path: Path, min_area: int) -> None:
    """Files, masks and labels have the same ones."""
    model, threshold = trained
    raw, seen = RawScores(), model.visualizer
    seen.__init__()
    running = engine(tmp_path, raw, WriteRecords(min_area=min_area, pixel_size=0.5))
    running.test(model, datamodule=loco)
    found = read(folder(running) / "test_defects.csv")
    predictions = read(folder(running) / "test_predictions.csv")
    paths, _, maps, _, _ = raw.arrays()
    counts = []
    for path, raw_map, mask, label, prediction in zip(paths, maps, seen.masks, seen.labels, predictions, strict=True):
        rows = [row for row in found if row["image_path"] == path]
        slow = slow_defects(raw_map, threshold, min_area)
        assert [int(row["defect"]) for row in rows] == list(range(1, len(rows) + 1))
        np.testing.assert_allclose([(float(row["max_score"]), int(row["area"])) for row in rows], slow or [], rtol=1e-6)
        above = float(prediction["raw_score"]) > float(prediction["raw_threshold"])
        assert label == (above and (bool(slow) or not min_area))
        assert int(prediction["pred_label"]) == label
        if not min_area:
            np.testing.assert_array_equal(mask, raw_map > threshold)
        assert mask.any() == bool(slow)
        counts.append(len(slow))
    assert len(found) == sum(counts) > 5
    assert {(row["category"], row["group"]) for row in found} <= {
        (row["category"], row["group"]) for row in predictions
    }
    for row in found:
        assert float(row["area_mm2"]) == int(row["area"]) / 4
        assert 0 <= int(row["x"]) <= float(row["centroid_x"]) < int(row["x"]) + int(row["width"]) <= 64
        assert 0 <= int(row["y"]) <= float(row["centroid_y"]) < int(row["y"]) + int(row["height"]) <= 64
    specks = sum(len(slow_defects(raw_map, threshold, 0)) for raw_map in maps) - len(found)
    assert (specks > 0) == (min_area > 0)


def test_metrics_at_the_original_size_have_no_specks(loco: MVTecLoco, tmp_path: Path) -> None:
    torch.manual_seed(0)
    metric = F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_")
    model = Tiny(evaluator=GroupEvaluator(test_metrics=metric, map_size="original"))
    model, threshold = with_threshold(model, loco, tmp_path)
    values = []
    for min_area in (0, MIN_AREA):
        raw = RawScores()
        [metrics] = engine(tmp_path, raw, WriteRecords(min_area)).test(model, datamodule=loco)
        values.append(metrics["pixel_F1Score"])
        large = torch.nn.functional.interpolate(torch.tensor(raw.arrays()[2])[:, None], size=(64, 64), mode="bilinear")[
            :, 0
        ].numpy()
        masks = [ndimage.label(each >= threshold, structure=np.ones((3, 3))) for each in large]
        predicted = np.stack(
            [np.isin(found, np.flatnonzero(np.bincount(found.flat) >= min_area)[1:]) for found, _ in masks]
        )
        truth = true_masks(raw.paths)
        assert values[-1] == pytest.approx(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))
    assert values[0] != values[1]


def true_masks(paths: list[str]) -> np.ndarray:
    masks = []
    for path in map(Path, paths):
        files = (path.parents[2] / "ground_truth" / path.parent.name / path.stem).glob("*.png")
        masks.append(sum((np.array(Image.open(file)) > 0 for file in files), np.zeros((64, 64), dtype=bool)))
    return np.stack(masks)


def test_coco(trained: tuple[AnomalibModule, float], loco: MVTecLoco, tmp_path: Path) -> None:
    """Another library that fills the polygons finds the areas of the annotations."""
    model, _ = trained
    running = engine(tmp_path, WriteRecords(coco=tmp_path / "labels" / "coco.json"))
    running.test(model, datamodule=loco)
    content = json.loads((tmp_path / "labels" / "coco.json").read_text())
    paths = loco.test_data.samples.image_path.tolist()
    root = content["info"]["description"].split(" of ")[-1]
    assert [str(Path(root, image["file_name"])) for image in content["images"]] == paths
    assert {(image["width"], image["height"]) for image in content["images"]} == {(64, 64)}
    [category] = content["categories"]
    rows = read(folder(running) / "test_defects.csv")
    names = {image["id"]: str(Path(root, image["file_name"])) for image in content["images"]}
    assert len(names) == len(paths)
    assert [each["id"] for each in content["annotations"]] == list(range(1, len(rows) + 1))
    for row, each in zip(rows, content["annotations"], strict=True):
        assert names[each["image_id"]] == row["image_path"]
        assert (each["category_id"], each["iscrowd"]) == (category["id"], 0)
        assert each["bbox"] == [int(row[key]) for key in ("x", "y", "width", "height")]
        assert each["score"] == float(row["max_score"])
        [corners] = each["segmentation"]
        x, y = np.array(corners).reshape(-1, 2).T
        pixels = np.zeros((64, 64), dtype=bool)
        pixels[polygon(y - 0.5, x - 0.5, pixels.shape)] = True
        assert pixels.sum() == each["area"] >= int(row["area"])
        assert [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()] == each["bbox"]


def test_crops(loco: MVTecLoco, loco_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a defect is in the file is not known; who asks for defects is told so before the run."""
    model = Tiny()
    model.pre_processor = PreProcessor(transform=CenterCrop(32))
    running = engine(tmp_path)
    running.test(model, datamodule=loco)
    assert caplog.text.count("There are no records of defects. The maps of Tiny do not show images") == 1
    assert len(read(folder(running) / "test_predictions.csv")) == 12
    assert not (folder(running) / "test_defects.csv").exists()
    for asked in ({"min_area": 5}, {"coco": tmp_path / "coco.json"}):
        with pytest.raises(ValueError, match="do not show images"):
            engine(tmp_path, WriteRecords(**asked)).test(model, datamodule=loco)
    images = PredictDataset(loco_root / "tray" / "test" / "good")
    with pytest.raises(ValueError, match="do not show images"):
        engine(tmp_path, WriteRecords(min_area=5)).predict(model, dataset=images)


class InMemory(Dataset):
    """Images that are in no files."""

    collate_fn = staticmethod(ImageBatch.collate)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> ImageItem:
        return ImageItem(image=torch.rand(3, 32, 32), image_path=f"frames/{index}.png")


def test_images_without_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They have no size of a file; a user who needs it is told so."""
    torch.manual_seed(0)
    model = Tiny()
    model.post_processor._pixel_threshold.fill_(-1.0)  # all is anomalous
    running = engine(tmp_path)
    running.predict(model, dataset=InMemory())
    rows = read(folder(running) / "predictions.csv")
    assert [row["image_path"] for row in rows] == [f"frames/{index}.png" for index in range(3)]
    assert read(folder(running) / "defects.csv") == []
    assert caplog.text.count("There is no record of its defects. Cannot read frames/0.png") == 1
    assert "frames/1.png" not in caplog.text
    with pytest.raises(OSError, match=r"Cannot read frames/0.png"):
        engine(tmp_path, WriteRecords(min_area=5)).predict(model, dataset=InMemory())


class ScoresOnly(TinyNet):
    """Without maps."""

    def forward(self, images):
        return InferenceBatch(pred_score=super().forward(images).pred_score)


def test_without_maps(loco: MVTecLoco, tmp_path: Path) -> None:
    model = Tiny()
    model.model = ScoresOnly()
    running = engine(tmp_path, WriteRecords(min_area=5, coco=tmp_path / "coco.json"))
    running.test(model, datamodule=loco)
    assert len(read(folder(running) / "test_predictions.csv")) == 12
    assert read(folder(running) / "test_defects.csv") == []
    assert json.loads((tmp_path / "coco.json").read_text())["annotations"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"min_area": -1}, "min_area must be at least 0, got -1"), ({"pixel_size": 0}, "pixel_size must be above 0")],
)
def test_impossible_values_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WriteRecords(**arguments)
