"""Script: python feature_cache_ddp_run.py DATA RESULTS. Trains in two processes, without a cache and with each kind."""

import os
import sys
from pathlib import Path

import torch
from anomalib.engine import Engine
from cached_model import Cached
from lightning import seed_everything

from anomalib_pack.data import MVTecLoco


def main() -> None:
    root, results = Path(sys.argv[1]), Path(sys.argv[2])
    for cache in (None, "ram", "disk"):
        seed_everything(0, workers=True)
        model = Cached(cache)
        engine = Engine(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=3,
            limit_val_batches=0,
            # A folder for each process: where they start a run at the same time, Anomalib makes one twice.
            default_root_dir=results / f"{cache}_{os.environ.get('LOCAL_RANK', '0')}",
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        engine.fit(model, datamodule=MVTecLoco(root=root, category="tray", train_batch_size=2, num_workers=0))
        state = {**model.state_dict(), "calls": torch.tensor(model.model.calls), "drawn": torch.get_rng_state()}
        torch.save(state, results / f"{cache}_{engine.trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
