"""Recalibration of a model that inspects a region: the pixels outside count for nothing, as in its validation."""

from pathlib import Path

import torch
from anomalib.engine import Engine

from anomalib_pack.data import MVTecLoco
from anomalib_pack.recalibration.command import run
from anomalib_pack.restoring import read_checkpoint
from anomalib_unislad import Unislad


def test_pixels_outside_a_region(loco: MVTecLoco, loco_root: Path, tmp_path: Path) -> None:
    """On the validation images the command finds what the validation found."""
    torch.manual_seed(0)
    model = Unislad(
        "resnet18",
        ["layer1.0", "layer2.1"],
        weights=None,
        use_vit=False,
        local_dim=16,
        index="flat",
        region=[[[0.0, 0.0], [0.5, 0.0], [0.5, 0.5], [0.0, 0.5]]],
        pre_processor=Unislad.configure_pre_processor((64, 64)),
        visualizer=False,
    )
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(model, datamodule=loco)
    images, new = loco_root / "tray" / "validation" / "good", tmp_path / "new.ckpt"
    run(["--ckpt_path", engine.best_model_path, "--normal", str(images), "--out", str(new)])
    old, state = (read_checkpoint(path)["state_dict"] for path in (engine.best_model_path, new))
    assert old["post_processor.pixel_min"] > 0  # which is what maps are outside
    for name, value in old.items():
        torch.testing.assert_close(state[name], value, atol=0, rtol=1e-4)
