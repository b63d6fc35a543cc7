"""Rendered images to distil from, and thin networks with the shapes of the real ones."""

from pathlib import Path

import pytest
import torch
from anomalib.models.image.efficient_ad import torch_model
from thin_network import ThinAutoEncoder, ThinMediumPatchDescriptionNetwork, ThinPatchDescriptionNetwork


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anomalib's EfficientAD of both sizes, with thin networks."""
    monkeypatch.setattr(torch_model, "SmallPatchDescriptionNetwork", ThinPatchDescriptionNetwork)
    monkeypatch.setattr(torch_model, "MediumPatchDescriptionNetwork", ThinMediumPatchDescriptionNetwork)
    monkeypatch.setattr(torch_model, "AutoEncoder", ThinAutoEncoder)


@pytest.fixture
def photos(loco_root: Path) -> Path:
    """Folder of rendered images, in folders of their own."""
    return loco_root / "tray" / "train"


@pytest.fixture
def teacher_file(thin, tmp_path: Path) -> Path:
    """A random, thin teacher with 8 channels."""
    torch.manual_seed(0)
    file = tmp_path / "pretrained_teacher_small.pth"
    torch.save(torch_model.SmallPatchDescriptionNetwork(8).state_dict(), file)
    return file
