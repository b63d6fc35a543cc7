"""Script: python resuming_ddp_run.py DATA RESULTS RANK; two processes, of which one fails in the second epoch."""

import sys
from pathlib import Path

from anomalib.engine import Engine
from test_resuming import EVERY_STEP, Tiny, Within, data, fail

from anomalib_pack.resuming import KeepTraining


def main() -> None:
    root, results, rank = sys.argv[1:]

    def fail_there(module: Tiny) -> None:
        if module.global_rank == int(rank):
            fail(module)

    engine = Engine(
        [KeepTraining(save_minutes=EVERY_STEP), Within(fail_there)],
        default_root_dir=results,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    engine.fit(Tiny(), datamodule=data(Path(root)))


if __name__ == "__main__":
    main()
