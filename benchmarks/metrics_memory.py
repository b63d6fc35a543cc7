"""Peak memory and time of test metrics at the size of MVTec AD: 1 725 maps of 256x256, in 15 groups.

    python benchmarks/metrics_memory.py
    python benchmarks/metrics_memory.py --stock
    python benchmarks/metrics_memory.py --devices 2
    python benchmarks/metrics_memory.py --original

With --original, all metrics at the size of the image files, for the largest category that MVTec LOCO could have: 340
images of 1600x1280, whose maps of 256x256 the evaluator resizes, in two groups that have the normal ones in common.

Each line is a test run in a process of its own, because a process keeps its peak, with a model whose maps are made up:
noise, and bumps of varied strength where the masks are. Memory is all that the process has resident, libraries
included; the line "none" has no metrics. Seconds are those of the evaluation at the end of the run.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anomalib.metrics
import torch
from anomalib import LearningType
from anomalib.data import InferenceBatch
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.engine import Engine
from anomalib.metrics import AnomalibMetric
from anomalib.models import AnomalibModule
from lightning import LightningModule, Trainer
from pandas import DataFrame
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from anomalib_pack.data.grouped import GroupedImageBatch, GroupedImageItem
from anomalib_pack.data.masks import read_mask
from anomalib_pack.defect import Defect
from anomalib_pack.metrics import GroupEvaluator, default_test_metrics, pixel
from anomalib_pack.post_processing import RankPreservingPostProcessor

NUM_IMAGES, NUM_GROUPS, NUM_NORMAL = 1725, 15, 467  # MVTec AD's test images, categories and normal test images
SIZE = 256

# More images than a category of MVTec LOCO has for testing, of the size of its largest: 1600 pixels wide, 1280 high.
ORIGINAL_SIZE = (1280, 1600)
ORIGINAL_GROUPS = {"": 120, "logical_anomalies": 120, "structural_anomalies": 100}

ORIGINAL = "original "  # how the names of these lines begin
OURS = ["AUROC", "AUPRO"]  # AP and F1Max are read off the same curve.
STOCK = ["AUROC", "AUPR", "F1Max", "AUPRO"]


def main() -> None:
    """Run each part in a process and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", action="store_true", help="Anomalib's own classes too; they need up to 8 GB")
    parser.add_argument("--devices", type=int, default=1, help="processes of one run; memory is the first one's")
    parser.add_argument("--original", action="store_true", help="at the size of the image files, instead of the others")
    parser.add_argument("--part", help="run this part alone, in this process")
    arguments = parser.parse_args()
    if arguments.part:
        run(arguments.part, arguments.devices)
        return
    print(f"{'metrics':16}{'peak GB':>9}{'seconds':>9}   overall and mean over groups of the last metric")
    parts = ["none", *OURS, "all", *(f"stock {name}" for name in STOCK if arguments.stock)]
    for part in [f"{ORIGINAL}none", f"{ORIGINAL}all"] if arguments.original else parts:
        command = [sys.executable, __file__, "--part", part, "--devices", str(arguments.devices)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(process.stdout.splitlines()[-1])
        values = "  ".join(f"{value:.7f}" for value in figures["values"])
        print(f"{part:16}{figures['peak'] / 1e9:9.2f}{figures['seconds']:9.1f}   {values}", flush=True)


def metrics_of(part: str) -> list[AnomalibMetric]:
    """Metrics of a line of the result."""
    part = part.removeprefix(ORIGINAL)
    if part == "none":
        return []
    if part == "all":
        return default_test_metrics()
    module = anomalib.metrics if part.startswith("stock ") else pixel
    metric = getattr(module, part.removeprefix("stock "))
    return [metric(fields=["anomaly_map", "gt_mask"], prefix="pixel_")]


def run(part: str, devices: int) -> None:
    """Test, and print the figures as JSON in the last line."""
    is_original = part.startswith(ORIGINAL)
    evaluator = TimedEvaluator(test_metrics=metrics_of(part), map_size="original" if is_original else "input")
    with tempfile.TemporaryDirectory() as results:
        engine = Engine(
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            logger=False,
            enable_progress_bar=False,
            default_root_dir=Path(results),
        )
        dataset = MadeUpFiles(Path(results) / "data") if is_original else MadeUpMaps()
        loader = DataLoader(dataset, batch_size=32, collate_fn=GroupedImageBatch.collate)
        found = engine.test(MadeUpModel(evaluator), dataloaders=loader, verbose=False)[0]
    names = [metric.name for metric in evaluator.test_metrics if metric.name in found]
    values = [found[names[-1]], found[f"{names[-1]}_mean"]] if names else []
    if engine.trainer.is_global_zero:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        print(json.dumps({"peak": peak, "seconds": evaluator.seconds, "values": values}))


class TimedEvaluator(GroupEvaluator):
    """Evaluator that takes its time."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the metrics and keep the seconds that it took."""
        start = time.perf_counter()
        super().on_test_epoch_end(trainer, pl_module)
        self.seconds = time.perf_counter() - start


class MadeUpMaps(Dataset):
    """Images that are anomaly maps, with masks, group by group as a data set of several categories has them."""

    def __len__(self) -> int:
        """Return the number of images."""
        return NUM_IMAGES

    def __getitem__(self, index: int) -> GroupedImageItem:
        """Return an image, the same each time."""
        torch.manual_seed(index)
        per_group = NUM_IMAGES // NUM_GROUPS
        is_anomalous = index % per_group >= per_group * NUM_NORMAL // NUM_IMAGES
        mask = blobs() if is_anomalous else torch.zeros(SIZE, SIZE, dtype=torch.bool)
        return GroupedImageItem(
            image=scores(mask).expand(3, SIZE, SIZE),
            gt_label=torch.tensor(is_anomalous),
            gt_mask=mask,
            group=f"category {index // per_group:02}",
        )


class MadeUpFiles(AnomalibDataset):
    """The same with files of a larger size, and with one defect in each anomalous image, of which half is to be found.

    Only masks have contents: of the images, the evaluator reads the size.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        rows = [
            self._write(root / f"{group or 'good'}_{index:03}.png", index, group)
            for group, count in ORIGINAL_GROUPS.items()
            for index in range(count)
        ]
        samples = DataFrame(rows)
        samples.attrs["task"] = "segmentation"
        self.samples = samples
        self.category = "made_up"

    @staticmethod
    def _write(path: Path, index: int, group: str) -> dict:
        torch.manual_seed(index)
        path.parent.mkdir(exist_ok=True)
        black = torch.zeros(ORIGINAL_SIZE, dtype=torch.uint8)
        Image.fromarray(black.numpy()).save(path)
        mask_path = path.with_suffix(".mask.png")
        if group:
            mask = interpolate(blobs()[None, None].byte(), size=ORIGINAL_SIZE, mode="nearest")[0, 0]
            Image.fromarray((255 * mask).numpy()).save(mask_path)
        return {
            "image_path": str(path),
            "mask_path": str(mask_path) if group else "",
            "split": "test",
            "label": group or "good",
            "label_index": int(bool(group)),
            "group": group,
        }

    def __getitem__(self, index: int) -> GroupedImageItem:
        """Return an image, the same each time."""
        sample = self.samples.iloc[index]
        torch.manual_seed(index)
        mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        if sample.mask_path:
            mask = interpolate(read_mask(sample.mask_path)[None, None].byte(), size=(SIZE, SIZE))[0, 0].bool()
        return GroupedImageItem(
            image=scores(mask).expand(3, SIZE, SIZE),
            gt_label=torch.tensor(sample.label_index),
            gt_mask=mask,
            image_path=sample.image_path,
            group=sample.group,
        )

    def defects(self, image_path: str) -> list[Defect]:
        """Read the defect of an image, if it has one."""
        sample = self.samples[self.samples.image_path == image_path].iloc[0]
        if not sample.mask_path:
            return []
        mask = read_mask(sample.mask_path)
        return [Defect("blob", mask, int(mask.sum()) // 2)]


def scores(mask: Tensor) -> Tensor:
    """Make up a map: noise, and bumps where the mask is, of a strength of their own."""
    smooth = interpolate(torch.randn(1, 1, 16, 16), size=SIZE, mode="bicubic")[0, 0]
    bumps = interpolate(mask[None, None].float(), size=SIZE // 8, mode="area")
    bumps = interpolate(bumps, size=SIZE, mode="bilinear")[0, 0] * (0.5 + 3 * torch.rand(1))
    return torch.sigmoid(smooth + 0.1 * torch.randn(SIZE, SIZE) + bumps - 2)


def blobs() -> Tensor:
    """Draw a mask of one to three ellipses, which makes 4 % of all test pixels anomalous."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    axis = torch.arange(SIZE)
    for _ in range(int(torch.randint(1, 4, ()))):
        (top, left), (height, width) = torch.randint(0, SIZE, (2,)), torch.randint(8, 44, (2,))
        mask |= ((axis[:, None] - top) / height) ** 2 + ((axis - left) / width) ** 2 < 1
    return mask


class MadeUpNet(nn.Module):
    """Takes the first channel of the image for the anomaly map."""

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score the images."""
        anomaly_map = images[:, :1].contiguous()
        score = anomaly_map.amax(dim=(1, 2, 3))
        return InferenceBatch(score, pred_label=score > 0.5, anomaly_map=anomaly_map, pred_mask=anomaly_map > 0.5)


class MadeUpModel(AnomalibModule):
    """Model of that network; the post-processing of the pack, without thresholds, is there for masks of other sizes."""

    def __init__(self, evaluator: GroupEvaluator) -> None:
        post_processor = RankPreservingPostProcessor() if evaluator.map_size == "original" else False
        super().__init__(pre_processor=False, post_processor=post_processor, evaluator=evaluator, visualizer=False)
        self.model = MadeUpNet()

    @property
    def learning_type(self) -> LearningType:
        """Type of learning."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict:
        """Arguments of the trainer."""
        return {}


if __name__ == "__main__":
    main()
