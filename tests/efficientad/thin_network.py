"""Networks with the shapes of the real ones, in a module of its own so that they can be pickled."""

from anomalib.models.image.efficient_ad import torch_model
from torch import nn


class ThinPatchDescriptionNetwork(torch_model.SmallPatchDescriptionNetwork):
    """A fiftieth of the channels: a step takes a tenth of a second instead of seconds."""

    def __init__(self, out_channels: int, padding: bool = False) -> None:
        super().__init__(out_channels, padding)
        self.conv1 = nn.Conv2d(3, 3, kernel_size=4, padding=3 * padding)
        self.conv2 = nn.Conv2d(3, 5, kernel_size=4, padding=3 * padding)
        self.conv3 = nn.Conv2d(5, 5, kernel_size=3, padding=1 * padding)
        self.conv4 = nn.Conv2d(5, out_channels, kernel_size=4)


class ThinMediumPatchDescriptionNetwork(torch_model.MediumPatchDescriptionNetwork):
    """Likewise."""

    def __init__(self, out_channels: int, padding: bool = False) -> None:
        super().__init__(out_channels, padding)
        self.conv1 = nn.Conv2d(3, 3, kernel_size=4, padding=3 * padding)
        self.conv2 = nn.Conv2d(3, 5, kernel_size=4, padding=3 * padding)
        self.conv3 = nn.Conv2d(5, 5, kernel_size=1)
        self.conv4 = nn.Conv2d(5, 5, kernel_size=3, padding=1 * padding)
        self.conv5 = nn.Conv2d(5, out_channels, kernel_size=4)


class ThinAutoEncoder(torch_model.AutoEncoder):
    """Three channels instead of 32 and 64."""

    def __init__(self, out_channels: int, padding: bool) -> None:
        super().__init__(out_channels, padding)
        for part in (self.encoder, self.decoder):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Conv2d):
                    outputs = out_channels if name == "deconv8" else 3
                    setattr(part, name, nn.Conv2d(3, outputs, layer.kernel_size, layer.stride, layer.padding))
