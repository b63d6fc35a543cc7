"""Pictures of reconstructed features: the decoder learns, the commands write one picture for each test image."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from PIL import Image
from torch import nn
from torch.nn import functional as F  # noqa: N812
from waiting import TIMEOUT

from anomalib_pack.data import MultiCategory, MVTecLoco
from anomalib_uniad import Uniad, rendering
from anomalib_uniad.rendering import FeatureRenderer, UpBlock, load_renderer, render, train_renderer

SIDE = 128  # of the images

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
    colours = torch.randn(8, 3, 1, 1)
    features, images = colours.expand(-1, -1, 2, 2), colours.expand(-1, -1, 32, 32)
    for _ in range(60):
        loss = F.mse_loss(renderer(features, (32, 32)), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * images.var()


def test_architecture() -> None:
    """ResNet-34 backwards: 16 blocks, four doublings from 14 to 224."""
    renderer = FeatureRenderer(272, width=8).eval()
    blocks = [layer for layer in renderer.layers if isinstance(layer, UpBlock)]
    assert [block.conv2.out_channels for block in blocks] == 3 * [64] + 6 * [32] + 4 * [16] + 3 * [16]
    with torch.no_grad():
        assert renderer.layers(torch.rand(1, 272, 14, 14)).shape == (1, 3, 224, 224)
        assert renderer(torch.rand(1, 272, 8, 8), (130, 120)).shape == (1, 3, 130, 120)


def test_block_keeps_what_is_plain() -> None:
    """Where the convolutions add nothing, the shortcut alone enlarges: a plane of one value stays one."""
    block = UpBlock(2, 2, scale=2).eval()
    nn.init.zeros_(block.conv2.weight)
    nn.init.dirac_(block.shortcut[0].weight)
    plane = torch.tensor([3.0, 0.5]).view(1, 2, 1, 1)
    torch.testing.assert_close(
        block(plane.expand(1, 2, 3, 5)), plane.expand(1, 2, 6, 10), rtol=1e-4, atol=0
    )  # BatchNorm's eps


@pytest.fixture(scope="module")
def checkpoint(loco_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("uniad")
    datamodule = MVTecLoco(root=loco_root, category="tray", train_batch_size=4, eval_batch_size=4, num_workers=0)
    engine = Engine(default_root_dir=root, accelerator="cpu", max_epochs=1, enable_progress_bar=False, logger=False)
    engine.fit(Uniad(**SMALL, pre_processor=Uniad.configure_pre_processor((SIDE, SIDE))), datamodule=datamodule)
    return Path(engine.best_model_path)


def test_commands(checkpoint: Path, loco: MVTecLoco, loco_root: Path, tmp_path: Path) -> None:
    train_renderer(checkpoint, loco, tmp_path / "renderers", max_epochs=1, width=2, device="cpu")
    data = ["--data", "MVTecLoco", "--data.root", loco_root, "--data.category", "tray", "--data.num_workers", "0"]
    files = ["--ckpt_path", checkpoint, "--renderers", tmp_path / "renderers", "--output", tmp_path / "pictures"]
    command = [sys.executable, "-m", "anomalib_uniad", "render", *files, *data, "--device", "cpu"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    pictures = sorted((tmp_path / "pictures").rglob("*.png"))
    assert len(pictures) == len(loco.test_data)
    for picture in pictures:
        panels = np.asarray(Image.open(picture))
        assert panels.shape == (SIDE, 5 * SIDE, 3)  # the checkpoint's pre-processor, not the default one
        masked = panels[:, 3 * SIDE : 4 * SIDE]
        assert (masked[40:] > 0).any() == ("anomalies" in str(picture))  # below the panel's title


def test_published_training(checkpoint: Path, loco: MVTecLoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW at 1e-4 with weight decay 1e-4, a tenth of the rate after four fifths, gradients clipped to 0.1."""
    rates, norms = [], []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None) -> None:
            [group] = self.param_groups
            rates.append(group["lr"])
            assert group["weight_decay"] == 1e-4
            norms.append(torch.stack([parameter.grad.norm() for parameter in group["params"]]).norm().item())
            super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    train_renderer(checkpoint, loco, tmp_path, max_epochs=5, width=1, device="cpu")
    steps = len(rates) // 5
    assert rates == pytest.approx(4 * steps * [1e-4] + steps * [1e-5])
    assert max(norms) <= 0.1 + 1e-5
    assert inspect.signature(train_renderer).parameters["max_epochs"].default == 1000


@pytest.mark.parametrize("joint", [False, True])
def test_decoder_of_each_category(checkpoint: Path, tmp_path: Path, joint: bool) -> None:
    sizes = {"image_size": 64, "num_train": 2, "num_val": 2, "num_test": 2}
    data = MultiCategory("SyntheticLoco", tmp_path / "data", dataset_args=sizes, train_batch_size=4, num_workers=0)
    folder = tmp_path / "renderers"
    train_renderer(checkpoint, data, folder, joint=joint, max_epochs=1, width=1, device="cpu")
    names = {"all.pt"} if joint else {"tray.pt", "board.pt"}
    assert {file.name for file in folder.iterdir()} == names
    render(checkpoint, data, folder, tmp_path / "pictures", device="cpu")
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == len(data.test_data)
    if not joint:
        (folder / "board.pt").unlink()
        with pytest.raises(FileNotFoundError, match=r"no decoder for board: neither board\.pt nor all\.pt"):
            render(checkpoint, data, folder, tmp_path / "pictures", device="cpu")


def test_interrupted_training_leaves_its_decoder(
    checkpoint: Path, loco: MVTecLoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rendering, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_renderer(checkpoint, loco, tmp_path, width=1, device="cpu")
    assert load_renderer(tmp_path / "tray.pt", channels=192).layers[0].conv1.out_channels == 8


def test_renderer_of_another_backbone(tmp_path: Path) -> None:
    torch.save({"width": 1, "state_dict": FeatureRenderer(192, 1).state_dict()}, tmp_path / "tray.pt")
    with pytest.raises(ValueError, match=r"tray\.pt was trained for another backbone"):
        load_renderer(tmp_path / "tray.pt", channels=7)
