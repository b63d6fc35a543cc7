"""Peak memory and time of test metrics at the size of MVTec AD: 1 725 maps of 256x256, in 15 groups.

    python benchmarks/metrics_memory.py
    python benchmarks/metrics_memory.py --stock
    python benchmarks/metrics_memory.py --devices 2

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
from anomalib.engine import Engine
from anomalib.metrics import AnomalibMetric
from anomalib.models import AnomalibModule
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from anomalib_pack.data.grouped import GroupedImageBatch, GroupedImageItem
from anomalib_pack.metrics import GroupEvaluator, default_test_metrics, pixel

NUM_IMAGES, NUM_GROUPS, NUM_NORMAL = 1725, 15, 467  # MVTec AD's test images, categories and normal test images
SIZE = 256

OURS = ["AUROC", "AUPRO"]  # AP and F1Max are read off the same curve.
STOCK = ["AUROC", "AUPR", "F1Max", "AUPRO"]


def main() -> None:
    """Run each part in a process and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", action="store_true", help="Anomalib's own classes too; they need up to 8 GB")
    parser.add_argument("--devices", type=int, default=1, help="processes of one run; memory is the first one's")
    parser.add_argument("--part", help="run this part alone, in this process")
    arguments = parser.parse_args()
    if arguments.part:
        run(arguments.part, arguments.devices)
        return
    print(f"{'metrics':16}{'peak GB':>9}{'seconds':>9}   overall and mean over groups of the last metric")
    for part in ["none", *OURS, "all", *(f"stock {name}" for name in STOCK if arguments.stock)]:
        command = [sys.executable, __file__, "--part", part, "--devices", str(arguments.devices)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(process.stdout.splitlines()[-1])
        values = "  ".join(f"{value:.7f}" for value in figures["values"])
        print(f"{part:16}{figures['peak'] / 1e9:9.2f}{figures['seconds']:9.1f}   {values}", flush=True)


def metrics_of(part: str) -> list[AnomalibMetric]:
    """Metrics of a line of the result."""
    if part == "none":
        return []
    if part == "all":
        return default_test_metrics()
    module = anomalib.metrics if part.startswith("stock ") else pixel
    metric = getattr(module, part.removeprefix("stock "))
    return [metric(fields=["anomaly_map", "gt_mask"], prefix="pixel_")]


def run(part: str, devices: int) -> None:
    """Test, and print the figures as JSON in the last line."""
    evaluator = TimedEvaluator(test_metrics=metrics_of(part))
    with tempfile.TemporaryDirectory() as results:
        engine = Engine(
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            logger=False,
            enable_progress_bar=False,
            default_root_dir=Path(results),
        )
        loader = DataLoader(MadeUpMaps(), batch_size=32, collate_fn=GroupedImageBatch.collate)
        found = engine.test(MadeUpModel(evaluator), dataloaders=loader, verbose=False)[0]
    name = evaluator.test_metrics[-1].name if evaluator.test_metrics else None
    values = [found[name], found[f"{name}_mean"]] if name else []
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
        smooth = interpolate(torch.randn(1, 1, 16, 16), size=SIZE, mode="bicubic")[0, 0]
        bumps = interpolate(mask[None, None].float(), size=SIZE // 8, mode="area")
        bumps = interpolate(bumps, size=SIZE, mode="bilinear")[0, 0] * (0.5 + 3 * torch.rand(1))
        scores = torch.sigmoid(smooth + 0.1 * torch.randn(SIZE, SIZE) + bumps - 2)
        return GroupedImageItem(
            image=scores.expand(3, SIZE, SIZE),
            gt_label=torch.tensor(is_anomalous),
            gt_mask=mask,
            group=f"category {index // per_group:02}",
        )


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
    """Model of that network, without post-processing."""

    def __init__(self, evaluator: GroupEvaluator) -> None:
        super().__init__(pre_processor=False, post_processor=False, evaluator=evaluator, visualizer=False)
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
