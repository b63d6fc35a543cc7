"""Python in the documents runs, or names what there is."""

import ast
import inspect
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from documents import Block, blocks, walks

PYTHON = [block for block in blocks("python") if not block.file and block.document not in walks()]
PAGES = sorted({block.document for block in PYTHON})
SLOW_PAGES = sorted({block.document for block in PYTHON if block.slow})
NEEDY = [block for block in PYTHON if block.needs]


def of(page: str) -> list[Block]:
    return [block for block in PYTHON if block.document == page]


def run(block: Block, names: dict[str, Any]) -> None:
    for code in filter(None, (block.setup, block.code)):
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * block.line + code, block.document, "exec"), names)
    if block.output:
        assert printed.getvalue() == block.output, str(block)


def test_every_comment_is_known() -> None:
    """A misspelt one would make a block run, or not."""
    for block in blocks("python", "bash", "console", "yaml", "toml"):
        assert re.match(r"$|needs |code of |save as |slow$|(slow, )?setup:", block.comment), str(block)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page one after another, as a reader would."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in of(page):
        if not (block.needs or block.slow):
            run(block, names)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_PAGES)
def test_slow_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in of(page):
        if not block.needs:
            run(block, names)


@pytest.mark.parametrize("block", NEEDY, ids=str)
def test_blocks_that_need_something_call_what_there_is(block: Block) -> None:
    """What they import exists, and takes the arguments that they give."""
    names: dict[str, Any] = {}
    for earlier in of(block.document)[: of(block.document).index(block) + 1]:
        for statement in ast.parse(earlier.code).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([statement], []), str(earlier), "exec"), names)
    for call in ast.walk(ast.parse(block.code)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names:
            keywords = {keyword.arg: None for keyword in call.keywords}
            inspect.signature(names[call.func.id]).bind(*call.args, **keywords)
