"""Time and memory per image of one model over 1, 3, 10 and 30 categories.

    python benchmarks/multi_category_growth.py
    python benchmarks/multi_category_growth.py --category path/to/mvtec_ad/hazelnut

The categories are copies of one folder in the layout of MVTec AD, rendered if none is given. Each number of categories
is measured in a process of its own, because a process keeps its peak of memory, after a run over one category that is
not measured. Training is one epoch of Anomalib's Reverse Distillation, whose work per image does not depend on the
number of images, with a validation run over the test images; testing has the metrics of each category, and no pictures.

Memory per further image is the growth of the peak over that of the line above, divided by that of the number of images:
what is kept of an image until the metrics are computed. The last columns are ratios to one category.
"""

import argparse
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from anomalib.engine import Engine
from anomalib.models import ReverseDistillation
from lightning import seed_everything
from torchvision.utils import save_image

from anomalib_pack.data import MultiCategory, MVTecLocoDataset, SyntheticLoco

CATEGORIES = (1, 3, 10, 30)
IMAGE_SIZE = (64, 64)
BATCH_SIZE = 8


def main() -> None:
    """Measure each number of categories and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--category", type=Path, help="folder of a category in the layout of MVTec AD")
    parser.add_argument("--categories", type=int, nargs="+", default=CATEGORIES, help="numbers of categories")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source = arguments.category or render(Path(folder))
        rows = [measure_apart(source, Path(folder) / f"of_{number}", number) for number in arguments.categories]
    report(rows)


def render(folder: Path) -> Path:
    """Render trays in the layout of MVTec AD: 40 training images, 12 normal and 24 anomalous test images."""
    SyntheticLoco(folder / "loco", image_size=IMAGE_SIZE[0], num_train=40, num_val=1, num_test=12).prepare_data()
    category = folder / "tray"
    for split in ("train", "test"):
        for item in MVTecLocoDataset(folder / "loco", "tray", split=split):
            path = Path(item.image_path)
            write(item.image, category / split / path.parent.name / path.name)
            if item.group:
                write(item.gt_mask.float(), category / "ground_truth" / item.group / f"{path.stem}_mask.png")
    return category


def write(image: torch.Tensor, path: Path) -> None:
    """Write an image of shape (3, H, W), or a mask of shape (H, W), with values in [0, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(image, path)


def measure_apart(source: Path, root: Path, number: int) -> dict[str, float]:
    """Measure in a process of its own, on copies of a category."""
    for index in range(number):
        shutil.copytree(source, root / f"category_{index:02}")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, root).result()


def measure(root: Path) -> dict[str, float]:
    """Train and test on all categories; return numbers, seconds and bytes."""
    with tempfile.TemporaryDirectory() as results:
        run(root, ["category_00"], results)  # imports, and what libraries set up once
        return run(root, "all", results)


def run(root: Path, categories: list[str] | str, results: str) -> dict[str, float]:
    """Train and test; return numbers, seconds and bytes."""
    seed_everything(0)
    model = ReverseDistillation(
        backbone="resnet18",
        layers=["layer1", "layer2", "layer3"],
        pre_trained=False,
        pre_processor=ReverseDistillation.configure_pre_processor(IMAGE_SIZE),
        visualizer=False,
    )
    datamodule = MultiCategory(
        "MVTecAD",
        root,
        categories,
        train_batch_size=BATCH_SIZE,
        eval_batch_size=BATCH_SIZE,
        num_workers=0,
        val_split_mode="same_as_test",
    )
    engine = Engine(default_root_dir=results, accelerator="cpu", max_epochs=1, enable_progress_bar=False)
    start = time.perf_counter()
    engine.fit(model, datamodule=datamodule)
    fitted = time.perf_counter()
    engine.test(model, datamodule=datamodule, verbose=False)
    tested = time.perf_counter()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "categories": datamodule.train_data.samples.group.nunique(),
        "train": len(datamodule.train_data),
        "test": len(datamodule.test_data),
        "fit_seconds": fitted - start,
        "test_seconds": tested - fitted,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def report(rows: list[dict[str, float]]) -> None:
    """Print the measurements as a Markdown table."""
    header = ["categories", "training images", "test images", "fit, ms/image", "test, ms/image", "peak, MiB"]
    header += ["KiB per further image", "fit", "test"]
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for index, row in enumerate(rows):
        row["fit"] = 1000 * row["fit_seconds"] / row["train"]
        row["evaluation"] = 1000 * row["test_seconds"] / row["test"]
        before = rows[max(index - 1, 0)]
        images = row["test"] - before["test"]
        cells = [row["categories"], row["train"], row["test"], f"{row['fit']:.1f}", f"{row['evaluation']:.1f}"]
        cells += [
            f"{row['peak'] / 2**20:.0f}",
            f"{(row['peak'] - before['peak']) / images / 1024:.0f}" if images else "",
        ]
        cells += [f"{row[name] / rows[0][name]:.2f}" for name in ("fit", "evaluation")]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
