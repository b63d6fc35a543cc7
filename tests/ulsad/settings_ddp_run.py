"""Script: python settings_ddp_run.py IMAGES CHECKPOINT RESULTS DEVICES. Tests a checkpoint with another alpha."""

import sys
from pathlib import Path

import torch
from anomalib.engine import Engine

from anomalib_pack.data import MVTecLoco
from anomalib_ulsad import Ulsad

SMALL = {"backbone": "resnet18", "weights": None, "feature_dim": 8}


def run(images: Path, checkpoint: Path, results: Path, devices: int) -> tuple[dict, bool]:
    """State and metrics of the test, and whether this is the first process."""
    engine = Engine(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        default_root_dir=results,
        enable_progress_bar=False,
    )
    datamodule = MVTecLoco(root=images, category="tray", eval_batch_size=3, num_workers=0)
    model = Ulsad(**SMALL, alpha=0.3)
    [metrics] = engine.test(model, datamodule=datamodule, ckpt_path=checkpoint)
    return {"state": model.state_dict(), "metrics": metrics}, engine.trainer.is_global_zero


def main() -> None:
    images, checkpoint, results = map(Path, sys.argv[1:4])
    found, is_first = run(images, checkpoint, results, int(sys.argv[4]))
    if is_first:
        torch.save(found, results / "found.pt")


if __name__ == "__main__":
    main()
