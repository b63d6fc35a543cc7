"""Tables with the published number, the measured one and the difference in each cell."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from rich import box
from rich.table import Column, Table
from rich.text import Text

from anomalib_pack.sweep.papers.cells import Measured, difference, is_significant
from anomalib_pack.sweep.papers.settings import NOTHING, Cell, Number, PaperTable

NOTE = (
    "Cells: published, measured, difference; mean ± standard deviation over seeds. * not of all seeds. † of runs "
    "with other versions than those installed. A difference of more than two of its standard errors is bold: green "
    "where it is an improvement, red where not. Where a deviation is unknown, it stays as it is."
)
HEADER = [
    *("row", "column", "published", "published_deviation", "measured", "measured_deviation"),
    *("seeds", "expected_seeds", "difference", "significant", "versions"),
]
LABEL_WIDTH, COLUMN_WIDTH, GAP = 22, 15, 3  # on the console
OTHER, INCOMPLETE = "†", "*"


@dataclass(frozen=True)
class Entry:
    """A cell with what was measured.

    Attributes:
        cell: The cell.
        found: What was measured, if anything was.
        versions: Versions that it was measured with, as text.
        here: Whether all are those that are installed.
    """

    cell: Cell
    found: Measured | None
    versions: frozenset[str]
    here: bool

    @property
    def marks(self) -> str:
        """Signs behind the measured number."""
        if self.found is None:
            return ""
        signs = [INCOMPLETE] if self.found.seeds < self.found.expected else []
        return "".join(f" {sign}" for sign in signs + ([] if self.here else [OTHER]))

    @property
    def lines(self) -> list[str]:
        """Published, measured and difference as text."""
        apart = difference(self.cell, self.found)
        found = NOTHING if self.found is None else _text(Number(self.found.mean, self.found.deviation))
        published = NOTHING if self.cell.published is None else _text(self.cell.published)
        return [published, f"{found}{self.marks}", NOTHING if apart is None else f"{apart:+.2f}"]


Entries = dict[tuple[str, str], Entry]


def console_tables(table: PaperTable, entries: Entries, width: int) -> list[Table]:
    """Make tables for the console, with as many columns beside each other as fit."""
    texts = {place: _coloured(entry) for place, entry in entries.items()}
    label_width = min(LABEL_WIDTH, max(map(len, table.rows)))
    per_table = max(1, (width - label_width) // (COLUMN_WIDTH + GAP))
    parts = [table.columns[start : start + per_table] for start in range(0, len(table.columns), per_table)]
    shown = []
    for part in parts:
        columns = [Column(name, justify="right", vertical="bottom", overflow="fold") for name in part]
        label = Column("", width=label_width, overflow="fold")
        title = f"{table.name}: {table.title}"
        one = Table(label, *columns, title=title, box=box.HORIZONTALS, pad_edge=False, show_lines=True)
        for row in table.rows:
            one.add_row(row.replace("_", " "), *(texts[row, column] for column in part))
        shown.append(one)
    return shown


def markdown(table: PaperTable, entries: Entries, notes: list[str]) -> str:
    """The table with a line for each row, and what is to be said about it."""
    lines = [f"# {table.name}: {table.title}", "", NOTE, "", _line(["", *table.columns])]
    lines.append("|---|" + "---:|" * len(table.columns))
    for row in table.rows:
        cells = [_markdown_cell(entries[row, column]) for column in table.columns]
        lines.append(_line([row.replace("_", " "), *cells]))
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def csv_text(table: PaperTable, entries: Entries) -> str:
    """A line for each cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(HEADER)
    for row in table.rows:
        for column in table.columns:
            writer.writerow([row, column, *_csv_cells(entries[row, column])])
    return text.getvalue()


def _csv_cells(entry: Entry) -> list[str | float | int | bool | None]:
    published, found = entry.cell.published, entry.found
    return [
        *((published.mean, published.deviation) if published else (None, None)),
        *((found.mean, found.deviation, found.seeds, found.expected) if found else (None, None, 0, None)),
        difference(entry.cell, found),
        is_significant(entry.cell, found),
        "; ".join(sorted(entry.versions)),
    ]


def _coloured(entry: Entry) -> Text:
    lines = entry.lines
    style = ""
    if is_significant(entry.cell, entry.found):
        style = "bold red" if lines[-1].startswith("-") else "bold green"
    return Text("\n").join([Text(lines[0], style="dim"), Text(lines[1]), Text(lines[2], style=style)])


def _markdown_cell(entry: Entry) -> str:
    *others, apart = entry.lines
    bold = f"**{apart}**" if is_significant(entry.cell, entry.found) else apart
    return "<br>".join([*others, bold])


def _text(number: Number) -> str:
    spread = "" if number.deviation is None else f" ± {_rounded(number.deviation)}"
    return f"{_rounded(number.mean)}{spread}"


def _rounded(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
