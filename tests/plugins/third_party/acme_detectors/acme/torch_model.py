from anomalib.data import InferenceBatch
from torch import Tensor, nn


class AcmeTorchModel(nn.Module):
    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, width, 1)
        self.scale = scale

    def forward(self, images: Tensor) -> InferenceBatch:
        return InferenceBatch(pred_score=self.scale * self.layer(images).amax((1, 2, 3)))
