"""What a file says when it is read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from anomalib_pack.data.image_files import (
    Header,
    check_as_anomalib_reads,
    check_upright,
    decode,
    header_of,
    is_constant,
    read,
)
from anomalib_pack.data.masks import count_values, gray_values

if TYPE_CHECKING:
    from .listing import Listed


@dataclass(frozen=True)
class Facts:
    """Facts of a file; what comes after ``error`` is missing where it could not be read."""

    error: str | None = None
    digest: bytes = b""  # of the bytes of the file
    header: Header | None = None
    is_constant: bool = False
    values: int = 0  # of a mask: how many different ones
    is_empty: bool = False  # of a mask: zero everywhere


def image_facts(image: Listed) -> Facts:
    """Read an image, and try what its datamodule will do with it."""

    def facts(path: str) -> Facts:
        data = Path(path).read_bytes()
        with Image.open(BytesIO(data)) as opened:
            found = Facts(digest=_digest(data), header=header_of(opened), is_constant=is_constant(opened))
        return replace(found, error=_reading_error(image, found.header, data))

    return _facts_or_error(facts, image.path)


def _reading_error(image: Listed, header: Header, data: bytes) -> str | None:
    """What keeps the datamodule from reading an image that can be decoded."""

    def facts(_path: str) -> Facts:
        if not image.by_pack:
            check_as_anomalib_reads(header)
        check_upright(header)
        if header.bits > 8:
            decode(data, image.white_level)
        return Facts()

    return _facts_or_error(facts, image.path).error


def mask_facts(path: str) -> Facts:
    """Read a mask."""

    def facts(path: str) -> Facts:
        data = Path(path).read_bytes()
        with Image.open(BytesIO(data)) as opened:
            header, values = header_of(opened), gray_values(opened)
        return Facts(digest=_digest(data), header=header, values=count_values(values), is_empty=not (values > 0).any())

    return _facts_or_error(facts, path)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _facts_or_error(facts: Callable[[str], Facts], path: str) -> Facts:
    try:
        return read(facts, path)
    except OSError as error:
        return Facts(error=str(error))
