"""Script: python ddp_run.py IMAGES RESULTS DEVICES. Trains and tests on the CPU; the first process writes results."""

import csv
import json
import os
import sys
from pathlib import Path

import torch
from anomalib.data import MVTecAD
from anomalib.data.datasets.image.mvtecad import MVTecADDataset
from anomalib.engine import Engine
from tiny_model import TinyModel

from anomalib_pack.callbacks import WriteRecords
from anomalib_pack.data.masks import read_mask
from anomalib_pack.defect import Defect
from anomalib_pack.metrics import GroupEvaluator, default_test_metrics, pixel
from anomalib_pack.post_processing import RankPreservingPostProcessor


def defects(dataset, image_path):
    """A quarter of each mask is to be found."""
    sample = dataset.samples[dataset.samples.image_path == image_path].iloc[0]
    if not sample.label_index:
        return []
    mask = read_mask(sample.mask_path)
    return [Defect(sample.label, mask, int(mask.sum()) // 4)]


def records(folder, coco):
    """All that a test writes of images and defects."""
    found = {"files": sorted(path.name for path in folder.glob("*.csv"))}
    for name in ("test_predictions", "test_defects"):
        with (folder / f"{name}.csv").open(newline="") as file:
            found[name] = list(csv.DictReader(file))
    return found | {"coco": json.loads(coco.read_text())}


def run(images, results, devices, val_split_mode):
    """Thresholds and other statistics, and test metrics."""
    torch.manual_seed(0)
    model = TinyModel(
        post_processor=RankPreservingPostProcessor(image_quantile=0.9, pixel_quantile=0.9),
        evaluator=GroupEvaluator(
            test_metrics=[*default_test_metrics(), pixel.AUPROPerImage(prefix="pixel_")],
            group_by="folder",
            map_size="input" if val_split_mode == "from_train" else "original",
        ),
    )
    # No step changes the weights, so that one and two processes evaluate the same model.
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    # 7 normal images for validation, or the 25 test images: odd numbers, so that the distributed sampler repeats one.
    datamodule = MVTecAD(
        images, "cloth", 4, 3, num_workers=0, val_split_mode=val_split_mode, val_split_ratio=0.3, seed=0
    )
    engine = Engine(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        # A folder for each process: where they start a run at the same time, Anomalib makes one twice.
        default_root_dir=results / os.environ.get("LOCAL_RANK", "0"),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[WriteRecords(coco=results / "coco.json")],
    )
    MVTecADDataset.defects = defects
    engine.fit(model, datamodule=datamodule)
    metrics = engine.test(model, datamodule=datamodule)[0]
    names = ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max")
    statistics = {name: getattr(model.post_processor, name).item() for name in names}
    found = {"statistics": statistics, "metrics": metrics}
    if engine.trainer.is_global_zero:
        found["records"] = records(Path(engine.trainer.default_root_dir), results / "coco.json")
        published = json.loads((Path(engine.trainer.default_root_dir) / "cloth_metrics.json").read_text())
        found["published"] = published["localization"]["auc_spro"] | {"images": published["classification"]["auc_roc"]}
    return found, engine.trainer.is_global_zero


def main():
    images, results, devices = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    found = {}
    for val_split_mode in ("from_train", "same_as_test"):
        found[val_split_mode], is_first = run(images, results / val_split_mode, devices, val_split_mode)
    if is_first:
        (results / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
