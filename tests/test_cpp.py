"""The C++ program of docs/cpp.md."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import openvino
import pytest
from pack_model import PackModel

from anomalib_pack.inspector import Inspector

PAGE = Path(__file__).parents[1] / "docs" / "cpp.md"


@pytest.mark.slow
def test_the_program_finds_what_the_inspector_finds(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    package = Path(openvino.__file__).parent
    source = tmp_path / "inspect.cpp"
    source.write_text(re.search(r"```cpp\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    library = next((package / "libs").glob("libopenvino.so.*"))
    options = ["-std=c++17", f"-I{package / 'include'}", str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run([compiler, str(source), *options, "-o", str(tmp_path / "inspect")], check=True)
    model = PackModel().to_openvino(tmp_path)
    frame = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    frame.tofile(tmp_path / "frame")
    command = [tmp_path / "inspect", model, tmp_path / "frame", "50", "70"]
    label, score, *size = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    found = Inspector(model).predict(frame)
    assert bool(int(label)) == found.pred_label
    assert float(score) == pytest.approx(found.pred_score, abs=1e-6)
    assert size == ["32", "x", "32"]
