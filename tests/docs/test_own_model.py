"""The page "Write your own model" shows the distribution that the tests of plugins install, and it works."""

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from anomalib.engine import Engine
from documents import CHECKOUT, blocks

from anomalib_pack.data import SyntheticLoco

FOLDER = CHECKOUT / "tests/plugins/third_party/acme_detectors"
PAGE = [block for block in blocks("python", "toml") if block.document == "docs/own_model.md" and block.file]


def without_blank_lines(code: str) -> list[str]:
    return [line for line in code.splitlines() if line.strip()]


def test_page_shows_every_line() -> None:
    """Block by block; methods are shown without their indentation."""
    rest = {path.relative_to(FOLDER).as_posix(): without_blank_lines(path.read_text()) for path in FOLDER.rglob("*.py")}
    for block in PAGE:
        if block.language == "python":
            shown = without_blank_lines(block.code)
            part, rest[block.file] = rest[block.file][: len(shown)], rest[block.file][len(shown) :]
            assert dedent("\n".join(part)).splitlines() == shown
    assert not any(rest.values())


def test_page_shows_the_entry_points() -> None:
    [block] = [block for block in PAGE if block.language == "toml"]
    tables = re.findall(r'^\[project\.entry-points\."([\w.]+)"\]\n(\S+) = "(.+)"$', block.code, re.MULTILINE)
    parser = configparser.ConfigParser()
    parser.optionxform = str
    parser.read(FOLDER / block.file)
    assert tables == [(group, *entry) for group in parser.sections() for entry in parser.items(group)]


def test_package_of_the_page_is_built(tmp_path: Path) -> None:
    """By the shown `pyproject.toml`, with all files and entry points."""
    [block] = [block for block in PAGE if block.language == "toml"]
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_text(block.code)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "--target", "wheel"], check=True, cwd=tmp_path)
    [wheel] = tmp_path.glob("dist/*.whl")
    modules = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == modules
        parsers = [configparser.ConfigParser() for _ in range(2)]
        parsers[0].read_string(archive.read("acme_detectors-1.2.dist-info/entry_points.txt").decode())
        parsers[1].read(FOLDER / block.file)
        assert parsers[0] == parsers[1]


@pytest.fixture(scope="module")
def acme() -> object:
    """The package, imported from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import acme.torch_model

        yield acme
    for name in [name for name in sys.modules if name.split(".")[0] in {"acme", "acme_common"}]:
        del sys.modules[name]


def test_network_learns_ranges(acme: object) -> None:
    torch.manual_seed(0)
    # Eighths, which sum exactly: convolutions of batches of another size may round otherwise.
    images, others = torch.randint(8, (4, 3, 8, 8)) / 8, torch.randint(8, (2, 3, 8, 8)) / 8 + 1
    at_once, in_parts = acme.torch_model.AcmeTorchModel(5, 2.0), acme.torch_model.AcmeTorchModel(5, 2.0)
    at_once.load_state_dict({name: (8 * value).round() / 8 for name, value in at_once.state_dict().items()})
    in_parts.load_state_dict(at_once.state_dict())
    at_once.learn(images)
    for part in images.split(3):
        in_parts.learn(part)
    assert torch.equal(at_once(others).anomaly_map, in_parts(others).anomaly_map)
    assert not at_once(images).anomaly_map.any()
    assert (at_once(others).pred_score > 0).all()


def test_model_runs_and_resumes(acme: object, tmp_path: Path) -> None:
    """As far as scores: fit, test, and the same scores from the checkpoint."""
    datamodule = SyntheticLoco(
        tmp_path / "data", image_size=64, num_train=4, num_val=2, num_test=2, train_batch_size=2, num_workers=0
    )
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    model = acme.AcmeModel(width=4)
    engine.fit(model, datamodule=datamodule)
    metrics = engine.test(model, datamodule=datamodule)
    assert 0 <= metrics[0]["image_AUROC"] <= 1
    again = acme.AcmeModel(width=4)
    assert engine.test(again, datamodule=datamodule, ckpt_path=engine.best_model_path) == metrics
