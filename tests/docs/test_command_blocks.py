"""Commands and configurations in the documents are understood by the programs that they are for."""

import argparse
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI
from documents import CHECKOUT, Block, blocks, walks

from anomalib_pack.sweep.papers.files import is_table, locate
from anomalib_pack.sweep.settings import read_plan

SHELL = [block for block in blocks("bash", "console", "") if not block.needs and list(block.commands())]
CONFIGURATIONS = [block for block in blocks("yaml") if not (block.needs or block.saved_as)]
TARGETS = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
OPTIONAL = (
    (CHECKOUT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
)
EXTRAS = set(re.findall(r"^(\w+) = \[", OPTIONAL, re.MULTILINE))


class Parsed(BaseException):
    """Raised where a program has parsed its arguments and would begin."""


@pytest.fixture(scope="module")
def anomalib() -> AnomalibCLI:
    """Anomalib's command with its parsers, which runs nothing."""
    command = AnomalibCLI.__new__(AnomalibCLI)
    command.parser = command.init_parser()
    command.subcommand_parsers, command.subcommand_method_arguments = {}, {}
    command.add_subcommands()
    return command


@contextmanager
def saying_why(what: str) -> Iterator[None]:
    """Turn a program's message and exit into a failure."""
    said = StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit:
        pytest.fail(f"{what}\n{said.getvalue()}")


def run_until_parsed(run: Callable[[], Any], arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(parse: Callable) -> Callable:
        def parse_args(*given: Any, **keywords: Any) -> None:
            parse(*given, **keywords)
            raise Parsed

        return parse_args

    with monkeypatch.context() as patch:
        for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            patch.setattr(parser, "parse_args", stopping(parser.parse_args))
        patch.setattr(sys, "argv", list(arguments))
        with pytest.raises(Parsed):
            run()


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A module or a script with its arguments."""
    if words[0] == "-m":
        module = words[1]
        if module.split(".")[0].startswith("anomalib_"):
            run_until_parsed(lambda: runpy.run_module(module, run_name="__main__"), words[1:], monkeypatch)
        return
    script = CHECKOUT / words[0]
    if "parse_args" not in script.read_text():
        assert words == words[:1]
        return
    monkeypatch.syspath_prepend(script.parent)
    run_until_parsed(lambda: runpy.run_path(str(script), run_name="__main__"), words, monkeypatch)


def check_anomalib(words: list[str], anomalib: AnomalibCLI) -> None:
    """A subcommand; a configuration that a run writes stands for any."""
    words = list(words)
    if "--config" in words:
        position = words.index("--config") + 1
        if words[0] == "sweep":
            locate(words[position])
        elif not words[position].startswith("configs/") and not Path(words[position]).exists():
            words[position] = "configs/demo.yaml"
    anomalib.parser.parse_args(words)


def check(words: list[str], anomalib: AnomalibCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = words
    if program == "anomalib":
        check_anomalib(arguments, anomalib)
    elif program == "python":
        check_python(arguments, monkeypatch)
    elif program == "make":
        assert set(arguments) <= TARGETS, arguments
    elif program == "pip":
        wanted = re.findall(r"anomalib-pack\[([\w,]+)\]", " ".join(arguments))
        assert set(",".join(wanted).split(",")) <= {"", *EXTRAS}, wanted
    elif program == "pytest":
        for word in arguments:
            assert "/" not in word or (CHECKOUT / word).exists(), word
    else:
        pytest.fail(f"no parser is known for `{program}`; say above the block what it needs")


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_understood(
    block: Block, anomalib: AnomalibCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [each for each in walks().get(block.document, []) if each.saved_as]
    for file in files:
        (tmp_path / file.saved_as).write_text(file.code)
    monkeypatch.chdir(tmp_path if files else CHECKOUT)
    for words in block.commands():
        with saying_why(" ".join(words)):
            check(words, anomalib, monkeypatch)


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=str)
def test_configurations_are_understood(block: Block, anomalib: AnomalibCLI) -> None:
    config = yaml.safe_load(block.code)
    with saying_why(str(block)):
        if is_table(config):
            assert {"title", "select", "columns"} <= set(config)
        elif "device" in config:
            anomalib.subcommand_parsers["efficiency"].parse_object(config)
        elif {"models", "benchmark"} & set(config):
            if "models" in config:
                config["data"] = [data for data in config["data"] if not data["class_path"].startswith("my_package.")]
            read_plan(config)
        else:
            anomalib.subcommand_parsers["train"].parse_object({"model": {"class_path": "Padim"}, **config})
