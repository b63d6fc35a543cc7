"""A real but tiny model, whose scores are in the tens as distances in feature space often are."""

import torch
from anomalib import LearningType
from anomalib.data import InferenceBatch
from anomalib.models import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from torch import nn
from torchvision.transforms.v2 import Resize


class TinyNet(nn.Module):
    """Autoencoder with the reconstruction error, scaled and shifted, as score."""

    def __init__(self, width=4):
        super().__init__()
        self.encode = nn.Conv2d(3, width, 4, stride=4)
        self.decode = nn.ConvTranspose2d(width, 3, 4, stride=4)

    def forward(self, images):
        error = (images - self.decode(self.encode(images))).square().mean(dim=1, keepdim=True)
        if self.training:
            return error
        anomaly_map = 20 + 100 * error
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=anomaly_map.amax(dim=(1, 2, 3)))


class TinyModel(AnomalibModule):
    """Trained for an epoch in a moment."""

    def __init__(self, pre_processor=True, post_processor=True, evaluator=True, visualizer=False):
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.model = TinyNet()

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
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def training_step(self, batch, _batch_idx):
        return self.model(batch.image).mean()

    def validation_step(self, batch, _batch_idx):
        return batch.update(**self.model(batch.image)._asdict())


class RawScores(Callback):
    """Keeps test scores as the model gave them: callbacks of the trainer run before the model's post-processor."""

    def __init__(self):
        self.paths, self.scores, self.maps, self.labels, self.masks = [], [], [], [], []

    def on_test_batch_end(self, _trainer, _pl_module, outputs, *_):
        self.paths += outputs.image_path
        self.scores.append(outputs.pred_score.clone())
        self.maps.append(outputs.anomaly_map.clone())
        self.labels.append(outputs.gt_label.clone())
        if outputs.gt_mask is not None:
            self.masks.append(torch.Tensor(outputs.gt_mask.clone()))

    def arrays(self):
        """Paths, and NumPy arrays: scores (N,), maps (N, H, W), labels (N,), masks (N, H, W)."""
        return self.paths, *(
            torch.cat(parts).reshape(len(self.paths), *shape).numpy()
            for parts, shape in (
                (self.scores, ()),
                (self.maps, self.maps[0].shape[-2:]),
                (self.labels, ()),
                (self.masks, self.maps[0].shape[-2:]),
            )
        )
