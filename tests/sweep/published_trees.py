"""Tiny data sets in the layouts in which the papers' are published, at the places where Anomalib looks for them."""

import hashlib
import json
import pickle
from pathlib import Path
from zlib import crc32

import numpy as np
from anomalib.data.datasets.image import btech, mpdd, mvtec_loco, mvtecad, realiad, visa
from PIL import Image
from torchvision.datasets import CIFAR10

from anomalib_pack.data import goods_ad

SIZE = 32
TRAIN, GOOD, BAD = 12, 3, 3  # images of each kind
DOMAINS = ("background", "illumination", "same", "view")
DEFECTS = [
    {"defect_name": "any", "pixel_value": 255, "saturation_threshold": 1.0, "relative_saturation": True},
]


def write_trees(folder: Path, monkeypatch) -> None:
    """Write all data sets below ``folder / "datasets"``; torchvision gets the checksums of this CIFAR-10."""
    root = folder / "datasets"
    for category in mvtecad.CATEGORIES:
        _category(root / "MVTecAD" / category)
    for category in mpdd.CATEGORIES:
        _category(root / "MPDD" / category)
    for category in visa.CATEGORIES:
        _category(root / "visa" / "visa_pytorch" / category, bad="bad", mask="{}.png")
    for category in btech.CATEGORIES:
        _category(root / "BTech" / category, good="ok", bad="ko", mask="{}.png")
    for category in goods_ad.CATEGORIES:
        _category(root / "GoodsAD" / category, mask="{}.png")
    for category in mvtec_loco.CATEGORIES:
        _loco(root / "MVTec_LOCO" / category)
    for category in realiad.CATEGORIES:
        _real_iad(root / "Real-IAD", category)
    _aebad(root / "AeBAD" / "AeBAD_S")
    _cifar10(root / "CIFAR10", monkeypatch)


def _images(folder: Path, count: int, masks: Path | None = None, mask: str = "{}_mask.png") -> None:
    """Noise, in which a defect is bright."""
    rng = np.random.default_rng(crc32("/".join(folder.parts[-4:]).encode()))  # hash() differs from process to process
    for index in range(count):
        pixels = rng.integers(0, 128, (SIZE, SIZE, 3), dtype=np.uint8)
        defect = np.zeros((SIZE, SIZE), np.uint8)
        if masks is not None:
            defect[12:20, 10 + index : 20] = 255
            pixels[defect > 0] += 120
            _save(masks / mask.format(f"{index:03}"), defect)
        _save(folder / f"{index:03}.png", pixels)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _category(folder: Path, good: str = "good", bad: str = "broken", mask: str = "{}_mask.png") -> None:
    _images(folder / "train" / good, TRAIN)
    _images(folder / "test" / good, GOOD)
    _images(folder / "test" / bad, BAD, folder / "ground_truth" / bad, mask)


def _loco(folder: Path) -> None:
    _images(folder / "train" / "good", TRAIN)
    _images(folder / "validation" / "good", GOOD)
    _images(folder / "test" / "good", GOOD)
    for kind in ("logical_anomalies", "structural_anomalies"):
        _images(folder / "test" / kind, BAD, folder / "ground_truth" / kind, "{}/000.png")
    (folder / "defects_config.json").write_text(json.dumps(DEFECTS))


def _real_iad(root: Path, category: str) -> None:
    folder = root / "realiad_512" / category
    metadata: dict[str, list] = {"train": [], "test": []}
    for split, kind, count in (("train", "OK", TRAIN), ("test", "OK", GOOD), ("test", "AK", BAD)):
        masks = folder / split / kind / "masks" if kind != "OK" else None
        _images(folder / split / kind, count, masks)
        for index in range(count):
            mask = None if masks is None else f"{split}/{kind}/masks/{index:03}_mask.png"
            image = f"{split}/{kind}/{index:03}.png"
            metadata[split].append({"image_path": image, "mask_path": mask, "anomaly_class": kind})
    path = root / "realiad_jsons" / "realiad_jsons" / f"{category}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metadata))


def _aebad(root: Path) -> None:
    for domain in DOMAINS:
        if domain != "same":
            _images(root / "train" / "good" / domain, TRAIN)
        _images(root / "test" / "good" / domain, GOOD)
        _images(root / "test" / "groove" / domain, BAD, root / "ground_truth" / "groove" / domain, "{}.png")


def _cifar10(folder: Path, monkeypatch) -> None:
    files = folder / CIFAR10.base_folder
    files.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict) -> list[str]:
        (files / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((files / name).read_bytes()).hexdigest()]

    def batch(name: str) -> list[str]:
        labels = [label for label in range(10) for _ in range(2)]
        return write(name, {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": labels})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{number}") for number in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta[1]})
