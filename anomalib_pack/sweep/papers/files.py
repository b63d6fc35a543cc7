"""Where the files of the papers are, and what they say.

``configs/papers/<paper>/<table>.yaml`` in a checkout, the same below the package in a wheel. A table names files of
trainings with ``runs``, or has its trainings itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

SUFFIX = ".yaml"
RUN_KEYS = ("models", "data", "seeds", "trainer", "map_size")  # of a file of trainings
RUNS = "runs"  # folder of the trainings that several tables read
_PACKAGE = Path(__file__).parents[2] / "configs"
CONFIGS = _PACKAGE if _PACKAGE.is_dir() else Path(__file__).parents[3] / "configs"

Config = dict[str, Any]


def locate(name: str | Path) -> Path:
    """Find a file or a folder: a path, with or without its suffix, or one below the configurations of the pack.

    Raises:
        FileNotFoundError: If it is none of these.
    """
    candidates = [Path(name), Path(f"{name}{SUFFIX}"), CONFIGS / name, CONFIGS / f"{name}{SUFFIX}"]
    for path in candidates:
        if path.exists():
            return path
    msg = f"config must be a file or a folder, got {name}; there is no {' and no '.join(map(str, candidates))} either."
    raise FileNotFoundError(msg)


def is_table(config: Any) -> bool:
    """Whether a file's content is that of a table."""
    return isinstance(config, dict) and "rows" in config


def table_files(folder: Path) -> list[Path]:
    """Files of all tables of a paper, or of all papers, in the order of their numbers.

    Raises:
        ValueError: If there are none.
    """
    found = [path for path in folder.rglob(f"*{SUFFIX}") if path.parent.name != RUNS]
    if not found:
        msg = f"config must be a table or a folder with tables, got {folder}."
        raise ValueError(msg)
    return sorted(found, key=lambda path: (path.parent, _numbers_apart(path.stem)))


def runs_of(table: Path, config: Config) -> list[Path]:
    """Files of the trainings that a table names."""
    names = config.get(RUNS, [])
    return [table.parent / f"{name}{SUFFIX}" for name in (names if isinstance(names, list) else [names])]


def load(path: Path) -> Config:
    """Read a file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it does not hold a mapping.
    """
    with path.open(encoding="utf-8") as file:  # whose name is in YAML's errors
        content = yaml.safe_load(file)
    if not isinstance(content, dict):
        msg = f"{path} must hold a mapping, got {content!r}."
        raise ValueError(msg)  # noqa: TRY004  # of a configuration, not of a call
    return content


def _numbers_apart(name: str) -> tuple[Any, ...]:
    """Table_2 comes before table_10, and table_10 before table_a1."""
    kind, _, number = name.rpartition("_")
    return (kind, not number.isdigit(), int(number) if number.isdigit() else 0, number)
