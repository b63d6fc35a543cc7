"""Folders of runs as a test leaves them."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from anomalib_pack.records.rows import PREDICTION_COLUMNS

THRESHOLD = 0.5
MALICIOUS = "<img src=x onerror=window.ran=1>.png"


def row(path: str, score: float, label: int | None, **values) -> dict:
    """Records of an image, whose normalised score is its raw one."""
    scores = {"raw_score": score, "pred_score": score, "raw_threshold": THRESHOLD, "threshold": THRESHOLD}
    group = "" if label is None else ("good", "scratch")[label]
    labels = {"gt_label": label, "pred_label": int(score > THRESHOLD)}
    return {"image_path": path, "category": "screw", "group": group, **labels, **scores} | values


def write_run(folder: Path, rows: list[dict], metrics: dict[str, float] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "test_predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, PREDICTION_COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    if metrics is not None:
        (folder / "test_metrics.json").write_text(json.dumps(metrics))
    return folder


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (64, 256)) -> Path:
    """A file of noise, which does not get much smaller: of four squares beside each other, as a visualizer's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def small_run(folder: Path) -> Path:
    """Two misses, one false alarm, one hit, two that pass, and one without label; the second miss has a picture."""
    picture(folder / "images" / "scratch" / "2.png")
    rows = [
        row("good/0.png", 0.1, 0),
        row("good/1.png", 0.2, 0),
        row(f"good/{MALICIOUS}", 0.62, 0, explanation="</script><b>bold</b>"),
        row("scratch/0.png", 0.9, 1),
        row("scratch/1.png", 0.4, 1),
        row("dent/2.png", 0.15, 1, group="dent", picture="images/scratch/2.png"),
        row("new/0.png", 0.3, None),
    ]
    names = ("image_AUROC", "image_AUROC_scratch", "image_AUROC_dent", "image_AUROC_mean", "pixel_AUPRO")
    return write_run(folder, rows, {name: 0.5 + 0.1 * index for index, name in enumerate(names)})
