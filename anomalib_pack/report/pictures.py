"""Pictures small enough to lie in the page, as many as fit."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from heapq import merge
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from anomalib_pack.data.image_files import CLIPPED_MODES
from anomalib_pack.progress import progress_bar
from anomalib_pack.report.interest import by_interest, is_mistake
from anomalib_pack.report.runs import Image, Run

LARGE = 4  # times the height of a thumbnail
WIDEST = 8  # times the height: a row of eight pictures
QUALITY = 75  # of WebP: no artefacts at the size at which a gallery shows them
BESIDE = 40  # bytes in the page beside the content of a picture: its size and its place
AT_ONCE = 64  # pictures that are made before their size is looked at


@dataclass(frozen=True)
class Limits:
    """How many pictures there may be, and how large.

    Attributes:
        number: Of pictures.
        height: In pixels.
        worst: How many of the worst mistakes have pictures four times as high.
        size: Of all pictures in the page, bytes.
    """

    number: int
    height: int
    worst: int
    size: int


@dataclass
class Pictures:
    """The pictures in the page.

    Attributes:
        files: Width, height and content, a WebP file in base 64.
        of_images: For each run, for each image: position in `files`, or None.
        beyond_limits: Images that have a file, but no place in the page.
        unreadable: Files that cannot be read.
    """

    files: list[tuple[int, int, str]] = field(default_factory=list)
    of_images: list[list[int | None]] = field(default_factory=list)
    beyond_limits: int = 0
    unreadable: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class _Asked:
    """A picture that somebody would like to see."""

    source: Path
    run: int
    image: int
    large: bool


def make_pictures(runs: Sequence[Run], limits: Limits) -> Pictures:
    """Make pictures of the images that matter most, from the visualizer's files or else from the image files."""
    asked = list(_ask(runs, limits.worst))
    first: dict[Path, _Asked] = {}  # runs on the same images may share their files
    for each in asked:
        first.setdefault(each.source, each)
    made = Pictures(of_images=[[None] * len(run.images) for run in runs])
    places: dict[Path, int] = {}
    free = limits.size
    for each, picture in _encode_all(list(first.values())[: limits.number], limits.height):
        if picture is None:
            made.unreadable.append(each.source)
            continue
        free -= len(picture[2]) + BESIDE
        if free < 0:
            break
        places[each.source] = len(made.files)
        made.files.append(picture)
    for each in asked:
        made.of_images[each.run][each.image] = places.get(each.source)
    tried = {*places, *made.unreadable}
    made.beyond_limits = sum(each.source not in tried for each in asked)
    return made


def _ask(runs: Sequence[Run], worst: int) -> Iterator[_Asked]:
    ranked = merge(*([(rank, index, number) for rank, index in by_interest(run)] for number, run in enumerate(runs)))
    for position, (rank, index, number) in enumerate(ranked):
        source = _source(runs[number].images[index])
        if source is not None:
            yield _Asked(source, number, index, large=position < worst and is_mistake(rank))


def _source(image: Image) -> Path | None:
    candidates = (image.picture, Path(image.path))
    return next((path for path in candidates if path is not None and path.is_file()), None)


def _encode_all(asked: list[_Asked], height: int) -> Iterator[tuple[_Asked, tuple[int, int, str] | None]]:
    """Make pictures on several cores, not many more than are taken."""
    with ThreadPoolExecutor() as pool, progress_bar(total=len(asked), desc="Pictures", leave=False) as bar:
        for start in range(0, len(asked), AT_ONCE):
            part = asked[start : start + AT_ONCE]
            yield from zip(part, pool.map(lambda each: _encode(each, height), part), strict=True)
            bar.update(len(part))


def _encode(asked: _Asked, height: int) -> tuple[int, int, str] | None:
    """Width, height and content of a small picture; None if the file cannot be read."""
    height *= LARGE if asked.large else 1
    try:
        with PillowImage.open(asked.source) as image:
            image.draft("RGB", (WIDEST * height, height))  # JPEG files are decoded at about that size
            small = _as_rgb(image)
            small.thumbnail((WIDEST * height, height), PillowImage.Resampling.LANCZOS, reducing_gap=3)
            content = BytesIO()
            small.save(content, "WEBP", quality=QUALITY)
    # Pillow raises SyntaxError for a broken chunk and ValueError for a broken header.
    except (OSError, SyntaxError, ValueError, PillowImage.DecompressionBombError):
        return None
    return small.width, small.height, b64encode(content.getvalue()).decode()


def _as_rgb(image: PillowImage.Image) -> PillowImage.Image:
    """Pillow makes white of images of more than 8 bits; here they span what is black and white."""
    if image.mode not in CLIPPED_MODES:
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    extent = values.max() - values.min() or 1.0
    return PillowImage.fromarray((255 * (values - values.min()) / extent).astype(np.uint8)).convert("RGB")
