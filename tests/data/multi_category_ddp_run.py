"""Script: python multi_category_ddp_run.py IMAGES RESULTS DEVICES. Trains and tests on the CPU; writes the metrics."""

import json
import sys
from pathlib import Path

import torch
from anomalib import LearningType
from anomalib.data import InferenceBatch
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Resize

from anomalib_pack.data import MultiCategory


class Brightness(torch.nn.Module):
    """The anomaly map is how bright a pixel is."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        anomaly_map = self.gain * images.mean(dim=1, keepdim=True)
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=anomaly_map.amax(dim=(1, 2, 3)))


class TinyModel(AnomalibModule):
    """A stock model, as far as its evaluator is concerned, which training leaves as it is."""

    def __init__(self):
        super().__init__(visualizer=False)
        self.model = Brightness()

    @staticmethod
    def configure_pre_processor(image_size=None):
        return PreProcessor(transform=Resize(image_size or (32, 32), antialias=True))

    @property
    def learning_type(self):
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self):
        return {"num_sanity_val_steps": 0}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch, _batch_idx):
        return self.model(batch.image).anomaly_map.mean()

    def validation_step(self, batch, _batch_idx):
        return batch.update(**self.model(batch.image)._asdict())


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
    model = TinyModel()
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
