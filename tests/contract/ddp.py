"""Script: python ddp.py MODEL DATA CHECKPOINT OUTPUT DEVICES. Saves what training and validation measure."""

import sys
from pathlib import Path

import anomalib.models
import torch
from anomalib.engine import Engine
from cases import CASES
from lightning import seed_everything

from anomalib_pack.data import MVTecLoco


def main() -> None:
    name, root, checkpoint, output = sys.argv[1:5]
    devices = int(sys.argv[5])
    case, model_class = CASES[name], getattr(anomalib.models, name)

    def engine() -> Engine:
        return Engine(
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            max_epochs=1,
            default_root_dir=Path(output).with_suffix(""),
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def datamodule() -> MVTecLoco:
        return MVTecLoco(root=root, category="tray", train_batch_size=4, eval_batch_size=3, num_workers=0)

    seed_everything(0)
    model = model_class(**case.arguments)
    trainer = engine()
    trainer.fit(model, datamodule=datamodule())
    trained = {key: value.clone() for key, value in model.state_dict().items() if key in case.statistics}

    model = model_class.load_from_checkpoint(checkpoint)
    engine().validate(model, datamodule=datamodule())
    if trainer.trainer.is_global_zero:
        torch.save({"trained": trained, "validated": model.state_dict()}, output)


if __name__ == "__main__":
    main()
