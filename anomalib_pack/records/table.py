"""Tables as files that grow batch by batch."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from anomalib_pack.files import replace_file, unwritable

Row = dict[str, Any]


class Table:
    """A file of rows, all of which are in it as soon as they are known: when the process is killed, they are there.

    What cannot be written, as the disk is full, is kept for the next time; the file always ends with a whole row.

    Args:
        path: The file; its suffix ``.csv`` or ``.jsonl`` tells its format. An earlier one is replaced.
        columns: Keys of the rows.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self._is_csv = path.suffix == ".csv"
        self._header = _csv([columns]) if self._is_csv else b""
        self._length = 0  # of what is in the file, in bytes
        self._pending = self._header

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows, and those that could not be written before.

        Raises:
            OSError: If they cannot be written; the message names the file.
        """
        self._pending += self._lines(rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self._length)
                file.write(self._pending)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, self._length)
            raise unwritable(self.path, error) from error
        self._length += len(self._pending)
        self._pending = b""

    def replace(self, rows: Sequence[Row]) -> None:
        """Write a whole file with other rows.

        Raises:
            OSError: If it cannot be written; the message names the file, which is as it was.
        """
        replace_file(self.path, self._header + self._lines(rows))

    def _lines(self, rows: Sequence[Row]) -> bytes:
        return _csv(row.values() for row in rows) if self._is_csv else _json_lines(rows)


def _csv(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return _encoded(text.getvalue())


def _json_lines(rows: Iterable[Row]) -> bytes:
    return _encoded("".join(json.dumps({key: _json(value) for key, value in row.items()}) + "\n" for row in rows))


def _json(value: Any) -> Any:
    """The value; JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # names of files may be no text
