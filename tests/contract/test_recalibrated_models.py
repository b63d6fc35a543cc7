"""Recalibration of each model: on its own validation images it finds what the validation found."""

from pathlib import Path

import pytest
import torch
from runs import Trained

from anomalib_pack.recalibration.command import run
from anomalib_pack.restoring import read_checkpoint


def test_recalibrated_on_the_validation_images(
    trained: Trained, loco_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = loco_root / "tray" / "validation" / "good"
    run(["--ckpt_path", str(trained.checkpoint), "--normal", str(folder), "--out", str(tmp_path / "new.ckpt")])
    assert "1 of 5 (20.0%)  1 of 5 (20.0%)" in capsys.readouterr().out
    old, new = read_checkpoint(trained.checkpoint), read_checkpoint(tmp_path / "new.ckpt")
    assert list(old) == list(new)
    for name, value in old.pop("state_dict").items():
        # A batch of another size is rounded in another way.
        tolerance = 1e-4 if name.startswith("post_processor.") else 0
        torch.testing.assert_close(new["state_dict"][name], value, atol=0, rtol=tolerance)
    new.pop("state_dict")
    # The trainer's copy of the post-processor, which it restores after the model's.
    [key] = [key for key in old["callbacks"] if "PostProcessor" in key]
    torch.testing.assert_close(new["callbacks"].pop(key), old["callbacks"].pop(key), atol=0, rtol=1e-4)
    assert str(old) == str(new)


def test_other_images_change_the_post_processor_alone(trained: Trained, loco_root: Path, tmp_path: Path) -> None:
    """Thresholds, ranges, and nothing that the validation of the model itself measures."""
    test = loco_root / "tray" / "test"
    folders = ["--normal", str(test / "good"), "--anomalous", str(test / "structural_anomalies")]
    run(["--ckpt_path", str(trained.checkpoint), *folders, "--out", str(tmp_path / "new.ckpt")])
    old, new = read_checkpoint(trained.checkpoint)["state_dict"], read_checkpoint(tmp_path / "new.ckpt")["state_dict"]
    changed = [name for name, value in old.items() if not torch.equal(value, new[name])]
    assert {name.partition(".")[0] for name in changed} == {"post_processor"}
    assert len(changed) >= 4
