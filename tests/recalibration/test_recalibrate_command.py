"""The command on real checkpoints: what it writes, what the new file's model says of images, what it refuses."""

import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from PIL import Image
from recalibration_cases import Folders
from torch import Tensor
from waiting import TIMEOUT

from anomalib_pack.__main__ import main
from anomalib_pack.recalibration.command import run
from anomalib_pack.restoring import model_from_checkpoint, read_checkpoint


def recalibrated(checkpoint: Path, out: Path, *arguments: Any) -> str:
    """Recalibrate a Patchcore; the report."""
    command = ("--ckpt_path", checkpoint, "--model", "Patchcore", "--out", out, *arguments)
    with redirect_stdout(StringIO()) as printed:
        assert run([str(one) for one in command]) == 0
    return printed.getvalue()


def predicted(checkpoint: Path, folder: Path, root: Path, *, raw: bool = False) -> list:
    """What Anomalib's engine predicts for the images of a folder."""
    model = model_from_checkpoint(checkpoint, "Patchcore")
    if raw:
        model.post_processor = None
    engine = Engine(default_root_dir=root, accelerator="cpu", enable_progress_bar=False, logger=False)
    return engine.predict(model, dataset=PredictDataset(folder), ckpt_path=None if raw else checkpoint)


def labels(checkpoint: Path, folder: Path, root: Path) -> Tensor:
    return torch.cat([batch.pred_label.flatten() for batch in predicted(checkpoint, folder, root)])


def differing(first: Any, second: Any, place: str = "") -> list[str]:
    """Places at which two contents of checkpoints are not bit-equal."""
    if isinstance(first, dict):
        assert list(first) == list(second), place
        return [each for key in first for each in differing(first[key], second[key], f"{place}.{key}".lstrip("."))]
    if isinstance(first, list | tuple):
        assert len(first) == len(second), place
        return [
            each
            for index, pair in enumerate(zip(first, second, strict=True))
            for each in differing(*pair, f"{place}.{index}")
        ]
    if isinstance(first, Tensor):
        assert (first.dtype, first.shape) == (second.dtype, second.shape), place
        same = torch.equal(first, second) or bool(first.isnan().all() and second.isnan().all())
    else:
        same = type(first) is type(second) and first == second
    return [] if same else [place]


BUFFERS = [f"_{kind}_threshold" for kind in ("image", "pixel")] + [
    f"{kind}_{end}" for kind in ("image", "pixel") for end in ("min", "max")
]
PLACES = ("state_dict.post_processor", "callbacks.PostProcessor", "callbacks.RankPreservingPostProcessor")


def test_only_buffers_of_the_post_processor_change(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    recalibrated(checkpoint, tmp_path / "new.ckpt", "--normal", folders.normal, "--anomalous", folders.anomalous)
    changed = differing(read_checkpoint(checkpoint), read_checkpoint(tmp_path / "new.ckpt"))
    assert set(changed) <= {f"{place}.{name}" for place in PLACES for name in BUFFERS}
    assert len(changed) >= 8  # the trainer restores the post-processor twice
    model: AnomalibModule = model_from_checkpoint(tmp_path / "new.ckpt", "Patchcore")
    assert not any(value.isnan() for value in model.post_processor.state_dict().values())


def test_counts_are_those_of_the_engine(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    """Images and their labels as `anomalib predict` has them; scores and maps as the network gives them."""
    out = tmp_path / "new.ckpt"
    report = recalibrated(checkpoint, out, "--normal", folders.normal, "--anomalous", folders.anomalous)
    for row, folder, wrong in (("false alarms", folders.normal, 1), ("misses", folders.anomalous, 0)):
        [line] = [line for line in report.splitlines() if line.startswith(row)]
        expected = [int((labels(file, folder, tmp_path) == wrong).sum()) for file in (checkpoint, out)]
        assert [int(count) for count in re.findall(r"(\d+) of", line)] == expected
    batches = [
        *predicted(out, folders.normal, tmp_path, raw=True),
        *predicted(out, folders.anomalous, tmp_path, raw=True),
    ]
    scores = torch.cat([batch.pred_score.flatten() for batch in batches])
    maps = torch.cat([batch.anomaly_map.flatten() for batch in batches])
    post_processor = model_from_checkpoint(out, "Patchcore").post_processor
    for kind, values in (("image", scores), ("pixel", maps)):
        for end, value in zip(("min", "max"), values.aminmax(), strict=True):  # batches of other sizes round otherwise
            torch.testing.assert_close(getattr(post_processor, f"{kind}_{end}"), value, atol=2e-4, rtol=0)


def test_masks_have_the_share_that_is_asked_for(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    """Of the pixels of the normal images, by the engine's own masks."""
    for share, arguments in ((0.05, ["--false_alarms", 0.05]), (0.01, []), (0.01, ["--threshold", 1])):
        out = tmp_path / f"{len(arguments)}{share}{arguments}.ckpt"
        recalibrated(checkpoint, out, "--normal", folders.normal, *arguments)
        masks = torch.cat([batch.pred_mask.flatten() for batch in predicted(out, folders.normal, tmp_path)])
        assert masks.float().mean().item() == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_share_of_false_alarms(checkpoint: Path, folders: Folders, tmp_path: Path, share: float) -> None:
    recalibrated(checkpoint, tmp_path / "new.ckpt", "--normal", folders.normal, "--false_alarms", share)
    alarms = labels(tmp_path / "new.ckpt", folders.normal, tmp_path)
    assert alarms.sum() == round(share * len(alarms))


def test_a_raw_threshold(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    """Labels change where it says, whatever the sensitivity is."""
    scores = torch.cat(
        [batch.pred_score.flatten() for batch in predicted(checkpoint, folders.anomalous, tmp_path, raw=True)]
    )
    ordered = scores.sort().values
    threshold = float(ordered[2] + ordered[3]) / 2
    report = recalibrated(checkpoint, tmp_path / "new.ckpt", "--normal", folders.normal, "--threshold", threshold)
    assert torch.equal(labels(tmp_path / "new.ckpt", folders.anomalous, tmp_path).bool(), scores > threshold)
    assert f"{threshold:.6g}" in report


def test_images_of_any_kind(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    """Other formats, sizes and depths in one folder; 16 bits as in training."""
    images = tmp_path / "images"
    images.mkdir()
    source = sorted(folders.normal.glob("*.png"))
    Image.open(source[0]).resize((80, 50)).save(images / "a.JPG")
    Image.open(source[1]).convert("L").save(images / "b.bmp")
    Image.fromarray(np.full((64, 64), 2048, np.uint16)).save(images / "c.png")
    Image.open(source[2]).save(images / "d.tiff")
    (images / "notes.txt").write_text("no image")
    report = recalibrated(checkpoint, tmp_path / "new.ckpt", "--normal", images, "--white_level", 4095)
    assert " of 4 (" in report
    assert "4 normal images cannot resolve 1 % of false alarms, which takes at least 100" in report.replace("\n", " ")
    with pytest.raises(OSError, match=r"c\.png.*not 0 to 2047"):
        recalibrated(checkpoint, tmp_path / "other.ckpt", "--normal", images, "--white_level", 2047)


def test_what_is_refused(
    checkpoint: Path, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Each with an exit status and a message that names what is wrong; nothing is written."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no image")
    out, old = tmp_path / "new.ckpt", tmp_path / "old.ckpt"
    shutil.copy(checkpoint, old)
    good = {"--ckpt_path": old, "--model": "Patchcore", "--normal": folders.normal, "--out": out}
    cases = {
        r"--out must be a new file, but .*old\.ckpt exists": {"--out": old},
        r"there is none at .*empty": {"--normal": tmp_path / "empty"},
        r"there is none at .*nowhere": {"--anomalous": tmp_path / "nowhere"},
        r"Cannot read .*x\.png": {"--anomalous": tmp_path / "broken"},
        r"Images are both in .*, 2 in all: .*below": {"--anomalous": folders.normal / "below"},
        r"threshold must be None with false_alarms": {"--threshold": 1, "--false_alarms": 0.1},
        r"threshold must be a finite number": {"--threshold": "nan"},
        r"false_alarms must be above 0 and below 1, got 1\.0": {"--false_alarms": 1},
        r"does not say its class: name the model": {"--model": None},
        r"There is no model Nothing": {"--model": "Nothing"},
        r"There is no checkpoint .*nowhere": {"--ckpt_path": tmp_path / "nowhere"},
        r"--weights needs --anomalous": {"--weights": ""},
        r"--weights is for models that weigh several scores.*; Patchcore does not": {
            "--weights": "",
            "--anomalous": folders.anomalous,
        },
    }
    for message, change in cases.items():
        arguments = {name: value for name, value in (good | change).items() if value is not None}
        words = [str(word) for pair in arguments.items() for word in pair if word != ""]
        monkeypatch.setattr(sys, "argv", ["anomalib_pack", "recalibrate", *words])
        assert main() == 1
        error = capsys.readouterr().err
        assert re.search(f"error: .*{message}", error), error
    assert not out.exists()


def test_post_processors_that_have_no_threshold(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    content = read_checkpoint(checkpoint)
    settings, enabled = content["anomalib_post_processor_config"], content["anomalib_components_enabled"]
    changes = {
        "enable_thresholding is False": (settings | {"enable_thresholding": False}, enabled),
        "post-processor must be PostProcessor or RankPreservingPostProcessor, got none": (
            settings,
            enabled | {"post_processor": False},
        ),
        "image_sensitivity must be above 0 and below 1 in the checkpoint": (
            settings | {"image_sensitivity": 1.0},
            enabled,
        ),
        "of a class that is not known": (settings | {"sample_rate": 4}, enabled),
    }
    if settings.keys() == PostProcessor().checkpoint_config().keys():
        changes["where enable_normalization is False"] = (settings | {"enable_normalization": False}, enabled)
    for message, (post_processor, components) in changes.items():
        content["anomalib_post_processor_config"] = post_processor
        content["anomalib_components_enabled"] = components
        if not components["post_processor"]:
            kept = {name: value for name, value in content["state_dict"].items() if "post_processor" not in name}
        torch.save(content | ({} if components["post_processor"] else {"state_dict": kept}), tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match=message):
            recalibrated(tmp_path / "x.ckpt", tmp_path / "new.ckpt", "--normal", folders.normal)


@pytest.mark.parametrize("checkpoint", ["stock"], indirect=True)
def test_the_command(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    """As a process of its own, which prints the table."""
    words = ["--model", "Patchcore", "--normal", folders.normal, "--out", tmp_path / "new.ckpt"]
    command = [sys.executable, "-m", "anomalib_pack", "recalibrate", "--ckpt_path", checkpoint, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    names = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert names[:6] == [names[0], "", "image threshold", "false alarms", "pixel threshold", "false pixels"]
    assert done.stdout.rstrip().endswith(f"Written to {tmp_path / 'new.ckpt'}.")
    assert "Normal images" in done.stderr
