"""Pages that a reader follows from the first block to the last one do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import Block, walks
from waiting import TIMEOUT

PROGRAMS = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


def words(text: str) -> list[str]:
    """Without numbers, which differ a little from machine to machine."""
    return re.findall(r"[^\W\d]+", text)


def follow(block: Block, folder: Path) -> None:
    """Save a file, or run a program, whose last words must be those that the page shows."""
    if block.saved_as:
        (folder / block.saved_as).write_text(block.code)
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        [*PROGRAMS[block.language], block.code],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert ran.returncode == 0, f"{block}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    shown = words(block.output)
    assert words(ran.stdout)[-len(shown) :] == shown or not shown, f"{block}\n{ran.stdout}"


@pytest.mark.slow
@pytest.mark.parametrize("page", walks())
def test_page_can_be_followed(page: str, tmp_path: Path) -> None:
    for block in walks()[page]:
        if not block.needs:
            follow(block, tmp_path)
