"""Pictures of reconstructed features (You et al., NeurIPS 2022, Fig. 6 and appendix B.3).

A decoder learns to turn the backbone's features back into images. Applied to reconstructed features it shows what UniAD
takes the image for. It is for pictures only: no score depends on it.

Status: the paper gives the architecture in two sentences and no training settings; widths and training are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.pre_processing import PreProcessor
from anomalib.utils.path import generate_output_filename
from anomalib.visualization.image.functional import (
    add_text_to_image,
    create_image_grid,
    visualize_anomaly_map,
    visualize_image,
    visualize_mask,
)
from PIL import Image
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import ConcatDataset, DataLoader
from tqdm.auto import tqdm

from anomalib_uniad import Uniad

logger = logging.getLogger(__name__)

RESNET34_BLOCKS = (3, 6, 4, 3)  # of its four stages, the deepest first


class UpBlock(nn.Module):
    """ResNet's basic block backwards: the second convolution changes channels and, with stride 2, doubles the grid."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = _convolution(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C', stride h, stride w)."""
        hidden = F.relu(self.bn1(self.conv1(maps)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(maps))


def _convolution(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1:
        return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1, bias=False)


class FeatureRenderer(nn.Module):
    """Features to image: ResNet-34 backwards, with transposed convolutions where it shrinks (appendix B.3).

    ResNet-34's pooling has no counterpart: from 14 x 14 features to 224 x 224 pixels there are four doublings.

    Args:
        channels: C of the features.
        width: Channels of the shallowest stage; 64 in ResNet-34.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        widths = [8 * width, 4 * width, 2 * width, width, width]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], kernel_size=1), nn.ReLU()]
        for stage, blocks in enumerate(RESNET34_BLOCKS):
            layers += [UpBlock(widths[stage], widths[stage], stride=1) for _ in range(blocks - 1)]
            # ResNet's shallowest stage does not shrink.
            layers.append(UpBlock(widths[stage], widths[stage + 1], stride=2 if stage < 3 else 1))
        layers.append(nn.ConvTranspose2d(width, 3, kernel_size=7, stride=2, padding=3, output_padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Render features (B, C, h, w) as RGB in [0, 1], (B, 3, H, W), for ``size`` (H, W)."""
        images = self.layers(features).sigmoid()
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def train_renderer(
    ckpt_path: Path,
    data: AnomalibDataModule,
    output: Path = Path("renderer.pt"),
    max_epochs: int = 100,
    lr: float = 1e-3,
    width: int = 64,
    pre_processor: PreProcessor | None = None,
    device: str | None = None,
) -> None:
    """Train the decoder of the pictures for a trained Uniad.

    It learns from the training and the test images of the data, normal and anomalous, without labels (appendix B.3).
    The file is written after each epoch.

    Args:
        ckpt_path: Checkpoint of the trained Uniad.
        data: Any datamodule of Anomalib.
        output: File to write.
        max_epochs: Passes over the images. Ours; the paper does not say.
        lr: Learning rate of Adam. Ours.
        width: Channels of the decoder's last stage; 64 for the paper's ResNet-34, less for a faster, blurred one.
        pre_processor: That of the trained Uniad, if it was not the default; checkpoints do not hold it.
        device: Such as ``cuda`` or ``cpu``; by default a GPU if there is one.
    """
    uniad = _load(ckpt_path, pre_processor, device)
    _prepare(data, uniad)
    images = ConcatDataset([data.train_data, data.test_data])
    loader = DataLoader(
        images, data.train_batch_size, shuffle=True, num_workers=data.num_workers, collate_fn=data.train_data.collate_fn
    )
    renderer = FeatureRenderer(sum(uniad.model.backbone.channels), width).to(uniad.device)
    optimizer = torch.optim.Adam(renderer.parameters(), lr=lr)
    for epoch in range(max_epochs):
        batches = tqdm(loader, desc=f"Epoch {epoch + 1}/{max_epochs}")
        for batch in batches:
            target = batch.image.to(uniad.device)
            loss = F.mse_loss(renderer(uniad.model.features(target), target.shape[-2:]), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            batches.set_postfix(loss=f"{loss.item():.4f}")
        torch.save({"width": width, "state_dict": renderer.state_dict()}, output)


def render(
    ckpt_path: Path,
    renderer_path: Path,
    data: AnomalibDataModule,
    output: Path = Path("renderings"),
    pre_processor: PreProcessor | None = None,
    device: str | None = None,
) -> None:
    """Write a picture for each test image: what it shows, what UniAD makes of it, ground truth and anomaly map.

    The second panel renders the image's own features: what differs between it and the image is the decoder's fault.

    Args:
        ckpt_path: Checkpoint of the trained Uniad.
        renderer_path: File of ``train_renderer``.
        data: Any datamodule of Anomalib.
        output: Folder for the pictures, which are sorted as in Anomalib's results.
        pre_processor: That of the trained Uniad, if it was not the default; checkpoints do not hold it.
        device: Such as ``cuda`` or ``cpu``; by default a GPU if there is one.
    """
    uniad = _load(ckpt_path, pre_processor, device)
    renderer = load_renderer(renderer_path, sum(uniad.model.backbone.channels)).to(uniad.device)
    _prepare(data, uniad)
    for batch in tqdm(data.test_dataloader(), desc="Rendering"):
        for path, picture in zip(batch.image_path, _pictures(uniad, renderer, batch), strict=True):
            picture.save(generate_output_filename(path, output, data.name, data.category).with_suffix(".png"))


def load_renderer(path: Path, channels: int) -> FeatureRenderer:
    """Load a file of :func:`train_renderer` for features of so many channels.

    Raises:
        ValueError: If it was trained for another backbone or other layers.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    renderer = FeatureRenderer(channels, content["width"])
    try:
        renderer.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        msg = f"{path} was trained for another backbone or other layers than those of the checkpoint: {error}"
        raise ValueError(msg) from error
    return renderer.eval()


@torch.no_grad()
def _pictures(uniad: Uniad, renderer: FeatureRenderer, batch: ImageBatch) -> Iterator[Image.Image]:
    images = batch.image.to(uniad.device)
    size = images.shape[-2:]
    features = uniad.model.features(images)
    reconstruction = uniad.model.reconstruction(features)
    own, reconstructed = renderer(features, size), renderer(reconstruction, size)
    maps = uniad.post_processor(uniad.model(images)).anomaly_map  # normalised as in all results
    for index in range(len(images)):
        panels = {
            "Image": visualize_image(images[index].cpu()),
            "Features": visualize_image(own[index].cpu()),
            "Reconstruction": visualize_image(reconstructed[index].cpu()),
        }
        if batch.gt_mask is not None:
            panels["GT Mask"] = visualize_mask(batch.gt_mask[index]).convert("RGB")
        panels["Anomaly Map"] = visualize_anomaly_map(maps[index].float().cpu())
        yield create_image_grid([add_text_to_image(panel, name) for name, panel in panels.items()], nrow=len(panels))


def _load(ckpt_path: Path, pre_processor: PreProcessor | None, device: str | None) -> Uniad:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    uniad = Uniad.load_from_checkpoint(ckpt_path, map_location=device, pre_processor=pre_processor or True)
    return uniad.eval()


def _prepare(data: AnomalibDataModule, uniad: Uniad) -> None:
    """Read the data; images are pre-processed where they are read, so that any of them can share a batch."""
    data.prepare_data()
    data.setup()
    for subset in (data.train_data, data.test_data):
        subset.augmentations = uniad.pre_processor.transform
