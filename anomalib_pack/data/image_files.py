"""Image files of a data set: listing them, and the one way in which the pack reads them.

Anomalib's reader clips gray images of more than 8 bits and images of floats, so that they become white or black, and
like its pictures and inferencers it leaves the EXIF orientation aside. Here the first are scaled by what is white in
all images, and an image with an orientation is refused, because not all places where it is read again would turn it.
Images of 8 bits are read as Anomalib reads them. Errors name the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_dtype, to_image
from torchvision.tv_tensors import Image as ImageTensor

Result = TypeVar("Result")

# Bits of Pillow's modes that Anomalib's reader clips to 8.
CLIPPED_MODES = {"I;16": 16, "I;16L": 16, "I;16B": 16, "I;16N": 16, "I": 32, "F": 32}

# Of these formats, mode "I" holds 16 bits: 0 to 65535.
FORMATS_OF_16_BITS = {"PNG", "PPM"}

ORIENTATION = 0x0112  # the tag of EXIF

CONVERT = (
    "convert the images to 8 bits, or read them with a datamodule of anomalib_pack (MultiCategory takes Anomalib's "
    "Folder), and for a prediction with anomalib_pack.data.PredictImages"
)

REPLACE = "Replace the file, or remove it from the data set."


class ReadsImages:
    """Mixin for datasets whose images are read by :func:`read_image`.

    Attributes:
        white_level: See there.
    """

    white_level: float | None = None


@dataclass(frozen=True)
class Header:
    """What a file says of its image before it is decoded."""

    size: tuple[int, int]  # (height, width), as stored
    bands: str  # e.g. RGB
    bits: int  # of a channel
    clipped: bool  # whether Anomalib's reader loses all above 8 bits, or what is behind the point
    orientation: int  # of EXIF, 1 to 8; 1 is upright


def check_white_level(white_level: float | None) -> float | None:
    """Check the argument.

    Raises:
        ValueError: If it is not above 0.
    """
    if white_level is not None and not white_level > 0:
        msg = f"white_level must be above 0, got {white_level!r}."
        raise ValueError(msg)
    return white_level


def read_image(path: str | Path, white_level: float | None = None, remedy: str = REPLACE) -> ImageTensor:
    """Read an image as RGB.

    Args:
        path: The file.
        white_level: The value that is white in images of more than 8 bits, e.g. 4095 for 12 bits in 16. Without it,
            65535 for 16 bits, of which those of colour images are cut to 8 as by Anomalib's reader; 1 for floats.
        remedy: What to do if it cannot be read, a sentence.

    Returns:
        Values in [0, 1], (3, H, W).

    Raises:
        OSError: If the image cannot be read, has an EXIF orientation or values beyond what is white; the message names
            the file and ends with the remedy.
    """
    return read(lambda path: decode(Path(path).read_bytes(), white_level), path, remedy)


def decode(data: bytes, white_level: float | None = None) -> ImageTensor:
    """Decode the bytes of a file; see :func:`read_image`. The messages of errors do not name the file."""
    with Image.open(BytesIO(data)) as image:
        header = header_of(image)
        check_upright(header)
        if header.bits <= 8 or (white_level is None and not header.clipped):
            return ImageTensor(to_dtype(to_image(image.convert("RGB")), torch.float32, scale=True))
        values = np.array(image) if header.clipped else _colours(data)  # (H, W) or (H, W, 3)
        is_float = image.mode == "F"
    if white_level is None and header.bits > 16 and not is_float:
        msg = "what is white among its 32-bit numbers is not known: give it as white_level"
        raise ValueError(msg)
    return scaled(values, white_level or (1 if is_float else 65535))


def _colours(data: bytes) -> np.ndarray:
    """All bits of a colour image, of which Pillow gives 8."""
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.ndim != 3:
        msg = "OpenCV, which reads colours of more than 8 bits, does not know its format"
        raise ValueError(msg)
    return values[..., 2::-1]  # from BGR or BGRA


def scaled(values: np.ndarray, white: float) -> ImageTensor:
    """Values (H, W) or (H, W, 3) as RGB in [0, 1], (3, H, W).

    Raises:
        ValueError: If one is not from 0 to ``white``.
    """
    image = torch.from_numpy(values.astype(np.float32)) / white
    low, high = image.aminmax()
    if not (low >= 0 and high <= 1):  # also for NaN
        found = f"{values.min():g} to {values.max():g}"
        msg = f"its values are {found}, not 0 to {white:g}: give what is white as white_level"
        raise ValueError(msg)
    if image.ndim == 2:
        image = image[..., None].expand(-1, -1, 3)
    return ImageTensor(image.permute(2, 0, 1).contiguous())  # (H, W, 3) -> (3, H, W)


def read_header(path: str | Path, remedy: str = REPLACE) -> Header:
    """Read what a file says of its image, without decoding it.

    Raises:
        OSError: If there is no image in the file; the message names the file and ends with the remedy.
    """
    return read(_open_header, path, remedy)


def _open_header(path: str | Path) -> Header:
    with Image.open(path) as image:
        return header_of(image)


def header_of(image: Image.Image) -> Header:
    """Header of an image that is not yet decoded."""
    return Header(
        size=(image.height, image.width),
        bands="".join(image.getbands()),
        bits=_bits(image),
        clipped=image.mode in CLIPPED_MODES,
        # Not its own getexif, for which PNG files are decoded.
        orientation=Image.Image.getexif(image).get(ORIENTATION, 1),
    )


def _bits(image: Image.Image) -> int:
    if image.mode == "I" and image.format in FORMATS_OF_16_BITS:
        return 16
    if image.mode in CLIPPED_MODES:
        return CLIPPED_MODES[image.mode]
    raw_mode = str(image.tile[0][3]) if image.tile else ""  # e.g. RGB;16B, of which Pillow keeps 8 bits
    return 16 if ";16" in raw_mode else 8


def check_upright(header: Header) -> None:
    """Check that an image needs not be turned to be upright.

    Raises:
        ValueError: If it does; the message does not name the file.
    """
    if header.orientation in range(2, 9):
        msg = (
            f"its EXIF orientation is {header.orientation}, by which viewers turn it, but Anomalib's readers and "
            "pictures do not; store it upright, e.g. by Pillow's ImageOps.exif_transpose"
        )
        raise ValueError(msg)


def is_constant(image: Image.Image) -> bool:
    """Whether all pixels of an image, which is decoded for it, are equal."""
    bands = (image.getextrema(),) if len(image.getbands()) == 1 else image.getextrema()
    return all(low == high for low, high in bands)


def check_as_anomalib_reads(header: Header, remedy: str = CONVERT) -> None:
    """Check that Anomalib's own reader gives what :func:`read_image` gives.

    Args:
        header: The header of the image.
        remedy: What to do if the reader clips it.

    Raises:
        ValueError: If it does not; the message does not name the file.
    """
    check_upright(header)
    if header.clipped:
        msg = (
            f"it has {header.bits} bits per channel, which Anomalib's reader clips, so that it becomes white or black; "
            f"{remedy}"
        )
        raise ValueError(msg)


def map_files(function: Callable[[str], Result], paths: Iterable[str]) -> Iterable[Result]:
    """Apply a function to files, several at a time, and yield the results in order."""
    with ThreadPoolExecutor() as pool:  # Pillow reads and decodes outside the interpreter lock
        yield from pool.map(function, paths)


def left_out(paths: Iterable[str], mask_paths: Iterable[str] = ()) -> list[Path]:
    """List files beside images that are images too, but of a kind that is not read, e.g. ``.gif``.

    Args:
        paths: The images that are read.
        mask_paths: Masks, which may lie beside them.
    """
    read_paths = [Path(path) for path in paths]
    known = {path.suffix.lower() for path in [*read_paths, *map(Path, mask_paths)]}
    kinds = Image.registered_extensions().keys() - known
    folders = sorted({path.parent for path in read_paths})
    return [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix.lower() in kinds]


def names(paths: Iterable[str | Path], limit: int = 10) -> str:
    """The first paths, for a message."""
    paths = [str(path) for path in paths]
    return ", ".join(paths[:limit]) + (f" and {len(paths) - limit} more" if len(paths) > limit else "")


def require_folder(folder: Path, remedy: str) -> None:
    """Check that a folder is there.

    Raises:
        FileNotFoundError: If it is not; the message names it and ends with the remedy.
    """
    if not folder.is_dir():
        msg = f"There is no folder {folder}. {remedy}"
        raise FileNotFoundError(msg)


def list_split(folder: Path, extensions: tuple[str, ...], remedy: str, levels: str = "*") -> list[Path]:
    """List the images of a split, in order.

    Args:
        folder: Folder of the split.
        extensions: File name extensions of images, with the dot.
        remedy: What to do if the folder is missing, a sentence.
        levels: Pattern of the folders that hold the images, relative to the split's.

    Raises:
        FileNotFoundError: If the folder is missing.
        RuntimeError: If it has no images.
    """
    require_folder(folder, remedy)
    paths = sorted(path for path in folder.glob(f"{levels}/*") if path.suffix in extensions)
    if not paths:
        msg = f"There are no images in {folder}/{levels}/: files named *{' or *'.join(extensions)} are expected there."
        raise RuntimeError(msg)
    return paths


def list_images(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    """List the images in a folder, in order."""
    return sorted(path for path in folder.iterdir() if path.suffix in extensions)


def read(reader: Callable[[str | Path], Result], path: str | Path, remedy: str = REPLACE) -> Result:
    """Read an image or a mask.

    Raises:
        OSError: If it cannot be read; the message names the file and ends with the remedy.
    """
    # Pillow raises SyntaxError for a broken chunk and ValueError for a broken header, and names no file.
    try:
        return reader(path)
    except (OSError, SyntaxError, ValueError) as error:
        is_empty = Path(path).is_file() and Path(path).stat().st_size == 0
        msg = f"Cannot read {path}: {'the file has 0 bytes' if is_empty else error}. {remedy}"
        raise OSError(msg) from error
