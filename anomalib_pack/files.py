"""Files and folders that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write beside the file, then put it in its place.

    Raises:
        OSError: If it cannot be written; the message names it. An earlier file is still there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise unwritable(path, error) from error
    except BaseException:  # Ctrl+C
        part.unlink(missing_ok=True)
        raise


def replace_tensors(path: Path, content: Any) -> None:
    """Write what ``torch.save`` takes, as :func:`replace_file` does.

    Raises:
        OSError: If it cannot be written; the message names it. An earlier file is still there.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_file(path, buffer.getbuffer())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, which then gets its name.

    It is a hidden one beside, ``.writing-*``, which stays if the process is killed, and may be deleted. If another
    process was faster, its folder stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
        written = Path(temporary) / folder.name
        written.mkdir()
        yield written
        try:
            written.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def dated_folder(parent: Path) -> Path:
    """Make a folder with the time as its name, as `anomalib benchmark` has them.

    Returns:
        The folder; the second one of the same second ends in ``_2``.

    Raises:
        OSError: If it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.now():%Y-%m-%d-%H_%M_%S}"
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def unwritable(path: Path, error: OSError) -> OSError:
    """The error of a file that cannot be written, with its name."""
    return OSError(error.errno, f"Cannot write {path}: {error.strerror or error}.")
