"""Script: python multi_category_ddp_run.py IMAGES RESULTS DEVICES. Trains and tests on the CPU; writes the metrics."""

import json
import sys
from pathlib import Path

import torch
from anomalib.engine import Engine
from tiny_model import TinyModel

from anomalib_pack.data import MultiCategory


def run(images, results, devices):
    """Test metrics, and whether this is the first process."""
    engine = Engine(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        default_root_dir=results,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    model = TinyModel()  # its evaluator is Anomalib's own
    # No step changes the weights, so that one and two processes evaluate the same model.
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    # 17 test images: an odd number, so that the distributed sampler repeats one.
    datamodule = MultiCategory("MVTecAD", images, train_batch_size=4, eval_batch_size=2, num_workers=0)
    engine.fit(model, datamodule=datamodule)
    return engine.test(model, datamodule=datamodule)[0], engine.trainer.is_global_zero


def main():
    images, results, devices = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    metrics, is_first = run(images, results, devices)
    if is_first:
        (results / "results.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
