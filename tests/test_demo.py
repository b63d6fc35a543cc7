"""What `make demo` prints is true."""

import re
import subprocess
from pathlib import Path

import pytest
from anomalib.cli.cli import AnomalibCLI
from PIL import Image

ROOT = Path(__file__).parents[1]
SMALL = {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1}
SMALL |= {"data.num_train": 4, "data.num_val": 2, "data.num_test": 2}


def test_the_demo_names_its_pictures_and_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    config = ROOT / re.search(r"anomalib train --config (\S+)", commands)[1]
    folder, names = re.search(r'echo "Heat maps: (\S+) \(folders (.+)\)"', commands).groups()
    monkeypatch.chdir(tmp_path)
    small = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    AnomalibCLI(["train", "--config", str(config), *small])
    pictures = sorted(Path(folder).glob("*/*.png"))
    assert {picture.parent.name for picture in pictures} == set(names.split(", "))
    for picture in pictures:
        with Image.open(picture) as image:
            image.verify()

    AnomalibCLI(["report", re.search(r"anomalib report (\S+)", commands)[1]])
    report = Path(re.search(r'echo "Open in a browser: (\S+)"', commands)[1]).relative_to(ROOT)
    assert all(f"{picture.parent.name}/{picture.name}" in report.read_text() for picture in pictures)
    assert report.read_text().count('"UklGR') == len(pictures)  # WebP in base 64
