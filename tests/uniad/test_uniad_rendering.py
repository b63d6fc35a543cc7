"""Pictures of reconstructed features: the decoder learns, the commands write one picture for each test image."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from PIL import Image
from torch.nn import functional as F  # noqa: N812

from anomalib_pack.data import MVTecLoco
from anomalib_uniad import Uniad
from anomalib_uniad.rendering import FeatureRenderer, load_renderer, train_renderer

SMALL = {
    "backbone": "resnet18",
    "layers": ["layer1", "layer2"],
    "weights": None,
    "feature_size": 4,
    "neighbor_size": 3,
    "hidden_dim": 16,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}


def test_renderer_learns_what_features_tell() -> None:
    """Images of one colour each, features that are that colour: the picture comes back."""
    torch.manual_seed(0)
    renderer = FeatureRenderer(3, width=4)
    optimizer = torch.optim.Adam(renderer.parameters(), lr=1e-2)
    colours = torch.rand(16, 3, 1, 1)
    features, images = colours.expand(-1, -1, 4, 4), colours.expand(-1, -1, 64, 64)
    for _ in range(100):
        loss = F.mse_loss(renderer(features, (64, 64)), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * images.var()


def test_architecture() -> None:
    """ResNet-34 backwards: 16 blocks, four doublings from 14 to 224."""
    renderer = FeatureRenderer(272, width=8).eval()
    assert sum(type(layer).__name__ == "UpBlock" for layer in renderer.layers) == 16
    with torch.no_grad():
        assert renderer.layers(torch.rand(1, 272, 14, 14)).shape == (1, 3, 224, 224)
        assert renderer(torch.rand(1, 272, 8, 8), (130, 120)).shape == (1, 3, 130, 120)


@pytest.fixture(scope="module")
def checkpoint(loco_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("uniad")
    datamodule = MVTecLoco(root=loco_root, category="tray", train_batch_size=4, eval_batch_size=4, num_workers=0)
    engine = Engine(default_root_dir=root, accelerator="cpu", max_epochs=1, enable_progress_bar=False, logger=False)
    engine.fit(Uniad(**SMALL), datamodule=datamodule)
    return Path(engine.best_model_path)


def test_commands(checkpoint: Path, loco: MVTecLoco, loco_root: Path, tmp_path: Path) -> None:
    train_renderer(checkpoint, loco, tmp_path / "renderer.pt", max_epochs=1, width=2, device="cpu")
    data = ["--data", "MVTecLoco", "--data.root", loco_root, "--data.category", "tray", "--data.num_workers", "0"]
    files = ["--ckpt_path", checkpoint, "--renderer_path", tmp_path / "renderer.pt", "--output", tmp_path / "pictures"]
    command = [sys.executable, "-m", "anomalib_uniad", "render", *files, *data, "--device", "cpu"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    pictures = sorted((tmp_path / "pictures").rglob("*.png"))
    assert len(pictures) == len(loco.test_data)
    for picture in pictures:
        panels = np.asarray(Image.open(picture))
        assert panels.shape == (224, 5 * 224, 3)
        masked = panels[:, 3 * 224 : 4 * 224]
        assert (masked[40:] > 0).any() == ("anomalies" in str(picture))  # below the panel's title


def test_renderer_of_another_backbone(checkpoint: Path, loco: MVTecLoco, tmp_path: Path) -> None:
    train_renderer(checkpoint, loco, tmp_path / "renderer.pt", max_epochs=1, width=2, device="cpu")
    with pytest.raises(ValueError, match=r"renderer\.pt was trained for another backbone"):
        load_renderer(tmp_path / "renderer.pt", channels=7)
