"""Metrics and thresholds of a model with a region: those of images that were cropped to it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, F1Score, create_anomalib_metric
from lightning import seed_everything
from tiny_model import RawScores, TinyModel, TinyNet
from torch.nn.functional import interpolate
from torchmetrics import MeanMetric

from anomalib_pack.data import MVTecLoco
from anomalib_pack.defect import Defect
from anomalib_pack.metrics import GroupEvaluator, pixel
from anomalib_pack.metrics.spro import auc_spro
from anomalib_pack.post_processing import RankPreservingPostProcessor
from anomalib_pack.region import build_region

REGION = [[[0.25, 0.125], [0.75, 0.125], [0.75, 1], [0.25, 1]]]
ROWS, COLUMNS = (4, 32), (8, 24)  # of an image of 32 x 32
Mean = create_anomalib_metric(MeanMetric)
METRICS = (pixel.AUROC, pixel.AP, pixel.F1Max, pixel.AUPRO, pixel.AUPROPerImage)


class Net(TinyNet):
    """Finds much outside its region, too."""

    def __init__(self):
        super().__init__()
        self.region = build_region(REGION)

    def forward(self, images):
        found = super().forward(images)
        if self.training:
            return found
        return InferenceBatch(anomaly_map=found.anomaly_map - 10 * images[:, :1], pred_score=found.pred_score)


class InsideModel(TinyModel):
    """The tiny model with a region that the metrics have to mind by themselves."""

    def __init__(self, evaluator):
        super().__init__(post_processor=RankPreservingPostProcessor(pixel_quantile=0.9), evaluator=evaluator)
        self.model = Net()


def cropped(maps: torch.Tensor, scale: int = 1) -> torch.Tensor:
    (top, bottom), (left, right) = ROWS, COLUMNS
    return maps[..., scale * top : scale * bottom, scale * left : scale * right]


@pytest.fixture
def tray(loco_root: Path) -> MVTecLoco:
    """Images of 64 x 64, twice as large as the network's input."""
    return MVTecLoco(root=loco_root, category="tray", train_batch_size=4, eval_batch_size=3, num_workers=0)


def run(evaluator: GroupEvaluator, data: MVTecLoco, folder: Path) -> tuple[dict, dict, InsideModel, RawScores]:
    """Metrics of validation and test, the model, and what it gave in the test."""
    seed_everything(0)
    model, raw = InsideModel(evaluator), RawScores()
    quiet = {"enable_progress_bar": False, "logger": False}
    engine = Engine(callbacks=[raw], accelerator="cpu", max_epochs=1, default_root_dir=folder, **quiet)
    engine.fit(model, datamodule=data)
    of_validation = {name: float(value) for name, value in engine.trainer.callback_metrics.items()}
    [of_test] = engine.test(model, datamodule=data, verbose=False)
    return of_validation, of_test, model, raw


def test_metrics_and_thresholds_are_those_of_the_crop(tray: MVTecLoco, tmp_path: Path) -> None:
    fields = ["anomaly_map", "gt_mask"]
    ours = [metric(fields=fields, prefix="pixel_") for metric in METRICS]
    stock = [AUROC(fields=fields, prefix="stock_"), F1Score(fields=["pred_mask", "gt_mask"], prefix="stock_")]
    evaluator = GroupEvaluator(Mean(fields=["anomaly_map"]), [*ours, *stock])
    of_validation, found, model, raw = run(evaluator, tray, tmp_path)

    _, _, maps, _, masks = raw.arrays()
    inside = SimpleNamespace(anomaly_map=cropped(torch.tensor(maps)), gt_mask=cropped(torch.tensor(masks)) > 0)
    assert (masks > 0).sum() > inside.gt_mask.sum() > 0  # defects lie on both sides
    for metric in ours:
        fresh = metric.clone()
        fresh.update(inside)
        assert found[metric.name] == pytest.approx(float(fresh.compute()), abs=1e-6), metric.name
    assert found["stock_AUROC"] == pytest.approx(found["pixel_AUROC"], abs=1e-4)
    post_processor = model.post_processor
    predicted = inside.anomaly_map >= post_processor.raw_pixel_threshold
    overlap = (predicted & inside.gt_mask).sum()
    assert found["stock_F1Score"] == pytest.approx(float(2 * overlap / (predicted.sum() + inside.gt_mask.sum())))

    with torch.no_grad():
        of_normal = torch.cat([cropped(model.model.eval()(batch.image).anomaly_map) for batch in tray.val_dataloader()])
    expected = np.quantile(of_normal.numpy(), 0.9)
    assert float(post_processor._pixel_threshold) == pytest.approx(expected, rel=1e-5)
    assert float(post_processor.pixel_min) == pytest.approx(float(of_normal.min()))
    assert float(post_processor.pixel_max) == pytest.approx(float(of_normal.max()))
    assert of_validation["MeanMetric"] == pytest.approx(float(of_normal.mean()), rel=1e-5)


def test_metrics_at_the_size_of_the_files(tray: MVTecLoco, tmp_path: Path) -> None:
    fields = ["anomaly_map", "gt_mask"]
    metrics = [pixel.AUPRO(fields=fields), pixel.AUROC(fields=fields), pixel.SPRO()]
    _, found, _, raw = run(GroupEvaluator(test_metrics=metrics, map_size="original"), tray, tmp_path)

    paths, _, maps, _, _ = raw.arrays()
    maps = interpolate(torch.tensor(maps)[:, None], size=(64, 64), mode="bilinear")[:, 0]
    defects = [tray.test_data.defects(path) for path in paths]
    masks = torch.stack([sum((each.mask for each in some), torch.zeros(64, 64)) > 0 for some in defects])
    inside = SimpleNamespace(anomaly_map=cropped(maps, 2), gt_mask=cropped(masks, 2))
    for metric in metrics[:2]:
        fresh = metric.clone()
        fresh.update(inside)
        assert found[metric.name] == pytest.approx(float(fresh.compute()), abs=1e-6), metric.name
    parts = [
        [
            Defect(each.name, part, min(each.saturation_area, int(part.sum())))
            for each in some
            if (part := cropped(each.mask, 2)).any()
        ]
        for some in defects
    ]
    assert sum(map(len, parts)) < sum(map(len, defects))  # one lies outside
    assert found["SPRO"] == pytest.approx(auc_spro(list(inside.anomaly_map), parts)[0.05], abs=1e-6)


def test_metrics_that_cannot_leave_pixels_out(tray: MVTecLoco, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Anomalib's stock_AUPRO cannot leave out the pixels outside"):
        run(GroupEvaluator(test_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"], prefix="stock_")]), tray, tmp_path)
