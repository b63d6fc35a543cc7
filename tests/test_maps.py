"""What a newcomer looks for: maps name each file of their folder, and the commands are listed."""

import re
from pathlib import Path

import pytest

from anomalib_pack import __main__ as program

CHECKOUT = Path(__file__).parents[1]
# Lines as "    tray.py, board.py   what the categories show".
ENTRY = re.compile(r"^ {4,8}((?:[\w/]+(?:\.py|/)(?:, )?)+) {2,}\S", re.MULTILINE)
MAPS = [path for path in sorted(CHECKOUT.glob("anomalib_*/**/__init__.py")) if ENTRY.search(path.read_text())]


def test_maps_are_found():
    folders = {path.parent.relative_to(CHECKOUT).as_posix() for path in MAPS}
    assert folders >= {"anomalib_pack", "anomalib_pack/data", "anomalib_pack/metrics", "anomalib_pack/sweep"}


@pytest.mark.parametrize("path", MAPS, ids=lambda path: path.parent.relative_to(CHECKOUT).as_posix())
def test_map_names_each_file(path):
    named = [name for names in ENTRY.findall(path.read_text()) for name in names.split(", ")]
    modules = {file.name for file in path.parent.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{folder.name}/" for folder in path.parent.iterdir() if any(folder.glob("[!_.]*"))}
    assert sorted(named) == sorted(modules | folders)


def test_help_lists_the_commands(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["anomalib_pack", "--help"])
    with pytest.raises(SystemExit, match="0"):
        program.main()
    shown = " ".join(capsys.readouterr().out.split())
    for name, (_, purpose) in program.COMMANDS.items():
        assert f" {name} {purpose}" in shown


def test_unknown_command_is_refused_with_those_that_there_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["anomalib_pack", "chek"])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    error = capsys.readouterr().err
    assert "'chek'" in error
    assert all(name in error for name in program.COMMANDS)
