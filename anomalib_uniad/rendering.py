"""Pictures of reconstructed features (You et al., NeurIPS 2022, Fig. 6 and appendix B.3).

Decoders, one for each category, learn to turn the backbone's features back into images. Applied to reconstructed
features they show what UniAD takes an image for. They are for pictures only: no score depends on them.

Status: architecture and training as in the published configuration.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
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
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from tqdm import tqdm

from anomalib_pack.data.joined import MultiCategoryDataset
from anomalib_pack.files import replace_file, replace_tensors
from anomalib_pack.progress import progress_bar
from anomalib_uniad import Uniad

from .components.baselines import RESNET34_BLOCKS

LR_DROP = 0.8  # share of the training after which the learning rate drops to a tenth: epoch 800 of 1000
GRADIENT_NORM = 0.1
JOINT = "all"  # name of a decoder for all categories


class UpBlock(nn.Module):
    """ResNet's basic block backwards: it enlarges the grid between its convolutions."""

    def __init__(self, in_channels: int, out_channels: int, scale: int) -> None:
        super().__init__()
        self.enlarge = _enlarge(scale) if scale > 1 else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if scale > 1 or in_channels != out_channels:
            narrow = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
            self.shortcut = nn.Sequential(narrow, self.enlarge, nn.BatchNorm2d(out_channels))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C', scale h, scale w)."""
        hidden = self.enlarge(F.relu(self.bn1(self.conv1(maps))))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(maps))


def _enlarge(scale: int) -> nn.Module:
    # Differs from the paper: appendix B.3 has transposed convolutions, the published code interpolates.
    return nn.Upsample(scale_factor=scale, mode="bilinear")


class FeatureRenderer(nn.Module):
    """Features to image: ResNet-34 backwards (appendix B.3), with four doublings, e.g. from 14 x 14 to 224 x 224.

    Args:
        channels: C of the features.
        width: An eighth of the channels of the deepest stage; 64 in ResNet-34.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        widths = [8 * width, 4 * width, 2 * width, 2 * width]  # the last stage too has twice the width
        layers: list[nn.Module] = []
        for blocks, out_channels, scale in zip(reversed(RESNET34_BLOCKS), widths, (1, 2, 2, 1), strict=True):
            layers.append(UpBlock(channels, out_channels, scale))
            layers += [UpBlock(out_channels, out_channels, scale=1) for _ in range(blocks - 1)]
            channels = out_channels
        layers += [
            _enlarge(2),
            nn.Conv2d(channels, channels, kernel_size=7, padding=3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            _enlarge(2),
            nn.Conv2d(channels, 3, kernel_size=1, bias=False),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Render features (B, C, h, w) as normalised RGB, (B, 3, H, W), for ``size`` (H, W)."""
        return F.interpolate(self.layers(features), size=size, mode="bilinear")


def train_renderer(
    ckpt_path: Path,
    data: AnomalibDataModule,
    output: Path = Path("renderers"),
    joint: bool = False,
    max_epochs: int = 1000,
    lr: float = 1e-4,
    weight_decay: float = 1e-4,
    width: int = 64,
    device: str | None = None,
) -> None:
    """Train the decoders of the pictures for a trained Uniad, one for each category.

    They learn from the test images, normal and anomalous, without labels, as the published ones do. The batch size is
    the data's ``train_batch_size``, in Anomalib as there 32. A file is written when its training ends or is
    interrupted.

    Args:
        ckpt_path: Checkpoint of the trained Uniad.
        data: Any datamodule of Anomalib, or ``MultiCategory`` for many categories.
        output: Folder for the files, one for each category.
        joint: Whether to train one decoder for all categories together.
        max_epochs: Passes over the images.
        lr: Learning rate of AdamW, a tenth of it in the last fifth of the training.
        weight_decay: Weight decay of AdamW.
        width: 64 for a decoder like ResNet-34, less for a faster, blurred one.
        device: Such as ``cuda`` or ``cpu``; by default a GPU if there is one.
    """
    uniad = _load(ckpt_path, device)
    parts = _categories(data, uniad)
    if joint:
        parts = {JOINT: ConcatDataset(parts.values())}
    for name, images in parts.items():
        renderer = FeatureRenderer(sum(uniad.model.backbone.channels), width).to(uniad.device)
        loader = _loader(data, images, data.train_batch_size, shuffle=True)
        try:
            _train(renderer, uniad, loader, progress_bar(range(max_epochs), desc=name), lr, weight_decay)
        finally:
            replace_tensors(output / f"{name}.pt", {"width": width, "state_dict": renderer.state_dict()})


def _train(
    renderer: FeatureRenderer, uniad: Uniad, loader: DataLoader, epochs: tqdm, lr: float, weight_decay: float
) -> None:
    backbone = uniad.model.backbone
    optimizer = torch.optim.AdamW(renderer.parameters(), lr=lr, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(LR_DROP * epochs.total)], gamma=0.1)
    for _ in epochs:
        for batch in loader:
            images = batch.image.to(uniad.device)
            with torch.no_grad():
                features = uniad.model.features(images)
            loss = F.mse_loss(renderer(features, images.shape[-2:]), (images - backbone.mean) / backbone.std)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(renderer.parameters(), GRADIENT_NORM)
            optimizer.step()
        scheduler.step()
        epochs.set_postfix(loss=f"{loss.item():.4f}")


def render(
    ckpt_path: Path,
    data: AnomalibDataModule,
    renderers: Path = Path("renderers"),
    output: Path = Path("renderings"),
    device: str | None = None,
) -> None:
    """Write a picture for each test image: what it shows, what UniAD makes of it, ground truth and anomaly map.

    The second panel renders the image's own features: what differs between it and the image is the decoder's fault.

    Args:
        ckpt_path: Checkpoint of the trained Uniad.
        data: Any datamodule of Anomalib, or ``MultiCategory`` for many categories.
        renderers: Folder that ``train_renderer`` wrote.
        output: Folder for the pictures, which are sorted as in Anomalib's results.
        device: Such as ``cuda`` or ``cpu``; by default a GPU if there is one.
    """
    uniad = _load(ckpt_path, device)
    channels = sum(uniad.model.backbone.channels)
    for name, images in _categories(data, uniad).items():
        renderer = load_renderer(_file(renderers, name), channels).to(uniad.device)
        for batch in progress_bar(_loader(data, images, data.eval_batch_size), desc=f"Rendering {name}"):
            for path, picture in zip(batch.image_path, _pictures(uniad, renderer, batch), strict=True):
                _save(picture, generate_output_filename(path, output, data.name, data.category).with_suffix(".png"))


def _save(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    replace_file(path, buffer.getbuffer())


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


def _file(renderers: Path, category: str) -> Path:
    own, joint = renderers / f"{category}.pt", renderers / f"{JOINT}.pt"
    if not own.is_file() and not joint.is_file():
        msg = f"{renderers} has no decoder for {category}: neither {own.name} nor {joint.name}. Train it first."
        raise FileNotFoundError(msg)
    return own if own.is_file() else joint


@torch.no_grad()
def _pictures(uniad: Uniad, renderer: FeatureRenderer, batch: ImageBatch) -> Iterator[Image.Image]:
    images, backbone = batch.image.to(uniad.device), uniad.model.backbone
    size = images.shape[-2:]
    features = uniad.model.features(images)
    reconstruction = uniad.model.reconstruction(features)
    own, reconstructed = (
        (renderer(maps, size) * backbone.std + backbone.mean).clamp(0, 1) for maps in (features, reconstruction)
    )
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


def _load(ckpt_path: Path, device: str | None) -> Uniad:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Uniad.load_from_checkpoint(ckpt_path, map_location=device).eval()  # pyrefly: ignore [bad-return]


def _categories(data: AnomalibDataModule, uniad: Uniad) -> dict[str, Dataset]:
    """Test images of each category; they are pre-processed where they are read, so that any can share a batch."""
    data.prepare_data()
    data.setup()
    images = data.test_data
    images.augmentations = uniad.pre_processor.transform
    if not isinstance(images, MultiCategoryDataset):
        return {data.category or data.name: images}
    return {str(name): Subset(images, rows.tolist()) for name, rows in images.samples.groupby("group").indices.items()}


def _loader(data: AnomalibDataModule, images: Dataset, batch_size: int, shuffle: bool = False) -> DataLoader:
    collate = data.test_data.collate_fn
    return DataLoader(images, batch_size, shuffle=shuffle, num_workers=data.num_workers, collate_fn=collate)
