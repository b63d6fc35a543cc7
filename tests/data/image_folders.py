"""Small folders of images in several layouts."""

import cv2
import numpy as np
from anomalib.data import Folder
from PIL import Image

from anomalib_pack.data import GoodsAD


def write(path, pixels, **options):
    """Write an image; OpenCV knows colours of 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels.dtype == np.uint16 and pixels.ndim == 3:
        cv2.imwrite(str(path), pixels[..., ::-1])
    else:
        Image.fromarray(pixels).save(path, **options)
    return path


def turned(path, pixels, orientation):
    """Write an image with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return write(path, pixels, exif=exif)


def write_folder(root, scale=16, dtype=np.uint16, defects=3):
    """Noise of 12 bits, with a spot in the anomalous images."""
    rng = np.random.default_rng(0)
    for kind, count in (("good", 6), ("bad", defects), ("fine", 3)):
        for index in range(count):
            pixels = np.clip(rng.normal(100, 20, (32, 32)), 0, 255)
            mask = np.zeros((32, 32), np.uint8)
            if kind == "bad":
                mask[4:14, 6:14] = 255
                pixels[mask > 0] = rng.uniform(200, 255)
                write(root / "masks" / f"{index}.png", mask)
            write(root / kind / f"{index}.png", (pixels * scale).astype(dtype))
    return root


def folder(root, name="part", **arguments):
    """Anomalib's datamodule of these folders."""
    folders = {"normal_dir": "good", "abnormal_dir": "bad", "normal_test_dir": "fine", "mask_dir": "masks"}
    return Folder(name, root=root, **({**folders, "num_workers": 0} | arguments))


def write_goods(root, mask):
    """A category in GoodsAD's layout whose anomalous images all have one mask."""
    for kind in ("train/good", "test/good", "test/opened"):
        for index in range(3):
            pixels = np.random.default_rng([len(kind), index]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            write(root / "can" / kind / f"{index}.png", pixels)
            if "opened" in kind:
                write(root / "can" / "ground_truth" / "opened" / f"{index}.png", mask)
    return GoodsAD(root, "can", num_workers=0, train_batch_size=2, eval_batch_size=2)
