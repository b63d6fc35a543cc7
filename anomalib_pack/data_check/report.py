"""What is printed: errors first, then warnings, then the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from anomalib_pack.data.image_files import Header, names
from anomalib_pack.tables import aligned

from .facts import Facts
from .findings import Findings
from .listing import Listed

COLUMNS = ("category", "split", "group", "images", "anomalous", "masks", "height x width", "bits", "bands")


def as_text(images: Sequence[Listed], facts: Mapping[str, Facts], findings: Findings) -> str:
    """The report."""
    lines = [f"ERROR    {message}" for message in findings.errors]
    for kind, found in findings.warnings.items():
        lines.append(f"WARNING  {kind} ({len(found)}): {names(found, 3)}")
    table = aligned([COLUMNS, *_rows(images, facts)]) if images else []
    files = {image.path for image in images} | {str(path) for image in images for path in image.masks}
    summary = f"files: {len(files)}, errors: {len(findings.errors)}, warnings: {len(findings.warnings)}"
    return "\n".join([*lines, *([""] if lines else []), *table, *([""] if table else []), summary])


def _rows(images: Sequence[Listed], facts: Mapping[str, Facts]) -> Iterator[tuple[str, ...]]:
    splits = ("train", "val", "test")

    def place(image: Listed) -> tuple:
        return image.category, splits.index(image.split), image.group

    for (category, split, group), members in groupby(sorted(images, key=place), place):
        rows = list(members)
        headers = [facts[image.path].header for image in rows if facts[image.path].header]
        yield (
            category,
            splits[split],
            group,
            str(len(rows)),
            str(sum(image.anomalous for image in rows)),
            str(sum(len(image.masks) for image in rows)),
            _sizes(headers),
            _values(header.bits for header in headers),
            _values(header.bands for header in headers),
        )


def _sizes(headers: Sequence[Header]) -> str:
    sizes = sorted({header.size for header in headers}, key=lambda size: (size[0] * size[1], size))
    shown = [f"{height} x {width}" for height, width in sizes]
    return " and ".join(shown) if len(shown) <= 2 else f"{len(shown)} sizes, {shown[0]} to {shown[-1]}"


def _values(values: Iterable[int | str]) -> str:
    return ", ".join(map(str, sorted(set(values))))
