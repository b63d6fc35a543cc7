"""Frames of a camera, read as the engine reads image files."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torchvision.transforms.v2.functional import to_dtype, to_image

from .data.image_files import read_header, read_image, scaled

Frame: TypeAlias = np.ndarray | str | Path

DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16))


def size_of(frame: Frame) -> tuple[int, int]:
    """Height and width of a frame, or of the image in a file, of which no more is read.

    Raises:
        OSError: If a file cannot be read; the message names it.
        TypeError: If the frame is neither uint8 nor uint16, nor a path.
        ValueError: If it has no shape of a frame.
    """
    if isinstance(frame, str | Path):
        return read_header(frame).size
    _check(frame)
    return frame.shape[:2]


def image_of(frame: Frame, white_level: float | None = None) -> torch.Tensor:
    """A frame as the image (3, H, W), RGB in [0, 1], that a file with the same pixels would be.

    Args:
        frame: uint8 or uint16, H x W x 3 in the order RGB, or gray, H x W or H x W x 1; or the path of an image file.
        white_level: The value that is white in frames and files of more than 8 bits.

    Raises:
        OSError: If a file cannot be read; the message names it.
        ValueError: If there are values beyond what is white, or 16 bits without a ``white_level``.
    """
    if isinstance(frame, str | Path):
        return read_image(frame, white_level)
    if frame.dtype == np.uint8:
        image = to_dtype(to_image(np.ascontiguousarray(frame)), torch.float32, scale=True)
        return image.expand(3, -1, -1).contiguous()
    if white_level is None:
        msg = (
            f"a frame of 16 bits needs white_level, the value that is white, e.g. 4095 for a camera of 12 bits; this "
            f"frame's largest is {frame.max()}."
        )
        raise ValueError(msg)
    try:
        return scaled(frame[..., 0] if frame.ndim == 3 and frame.shape[2] == 1 else frame, white_level)
    except ValueError as error:
        msg = f"a frame cannot be read: {error}."
        raise ValueError(msg) from error


def _check(frame: np.ndarray) -> None:
    if not isinstance(frame, np.ndarray):
        msg = f"a frame must be a NumPy array or the path of an image, got {type(frame).__name__}: see numpy.asarray."
        raise TypeError(msg)
    if frame.dtype.kind == "f":
        msg = (
            f"a frame must be uint8 or uint16, as cameras give it, got {frame.dtype}: whether 1 or 255 is white cannot "
            "be told. For values in [0, 1]: np.round(255 * frame).astype(np.uint8)."
        )
        raise TypeError(msg)
    if frame.dtype not in DTYPES:
        msg = f"a frame must be uint8 or uint16, got {frame.dtype}."
        raise TypeError(msg)
    is_image = frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] in {1, 3})
    if not is_image or frame.size == 0:
        hint = ""
        if frame.ndim == 4:
            hint = " Give several as a list."
        elif frame.ndim == 3 and frame.shape[0] in {1, 3}:
            hint = " Channels come last: frame.transpose(1, 2, 0)."
        elif frame.ndim == 3 and frame.shape[2] == 4:
            hint = " Leave the fourth channel out: frame[:, :, :3]."
        msg = f"a frame must be H x W x 3, or H x W for gray, got the shape {frame.shape}.{hint}"
        raise ValueError(msg)
