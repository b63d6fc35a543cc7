"""Small assembly parts as surfaces: each function maps coordinates of the part to its outline, height and colour.

Lengths are fractions of the image's side. Every part lies along its u axis, centred on (0, 0).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from anomalib_pack.rendering.canvas import Surface, smooth_step

STEEL = np.float32([0.80, 0.81, 0.83])
BRASS = np.float32([0.86, 0.70, 0.40])


@dataclass(frozen=True)
class Part:
    """A kind of part and the room it takes: all points within ``radius`` of a segment of ``half_length`` to each side.

    ``draw`` maps coordinates u and v, and a random generator for what differs between two pieces, to a surface.
    """

    name: str
    draw: Callable[[np.ndarray, np.ndarray, np.random.Generator], Surface]
    radius: float
    half_length: float = 0.0

    @property
    def reach(self) -> float:
        """Radius of a circle that holds the part."""
        return self.radius + self.half_length + 0.01

    @property
    def area(self) -> float:
        """Area of the room it takes, as a fraction of the image."""
        return np.pi * self.radius**2 + 4 * self.radius * self.half_length


def _vary(color: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the colour as it comes out of another production batch."""
    return np.float32(color) * (1 + rng.normal(0, 0.025, 3).astype(np.float32)) * np.float32(rng.normal(1, 0.03))


def _bevel(distance: np.ndarray, width: float) -> np.ndarray:
    return smooth_step(-distance / width)


def washer(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    """A flat steel ring with turning marks."""
    radius = np.hypot(u, v)
    distance = np.maximum(radius - 0.043, 0.021 - radius)
    marks = 0.00012 * np.sin(radius * rng.uniform(2200, 2800) + rng.uniform(0, 6))
    return Surface(distance, 0.010 * _bevel(distance, 0.005) + marks, _vary(STEEL, rng), 1.0)


def nut(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    """A brass hexagon nut with chamfered corners and a thread in its hole."""
    radius = np.hypot(u, v)
    hexagon = np.maximum(np.abs(u) * 0.866 + np.abs(v) * 0.5, np.abs(v)) - 0.042
    distance = np.maximum(hexagon, 0.0195 - radius)
    chamfer = np.clip(1 - (radius - 0.041) / 0.012, 0.6, 1)
    thread = 1 - 0.5 * np.clip((0.0255 - radius) / 0.006, 0, 1)
    return Surface(distance, 0.024 * _bevel(distance, 0.004) * chamfer * thread, _vary(BRASS, rng), 1.0)


def screw(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    """A steel screw lying on its side."""
    half_width = np.interp(
        u, [-0.112, -0.106, -0.084, -0.080, 0.085, 0.112], [0.024, 0.030, 0.030, 0.0135, 0.0135, 0.002]
    )
    pitch = np.sin((u + 0.25 * v) * 2 * np.pi / 0.0115 + rng.uniform(0, 6))
    half_width = half_width + 0.0022 * pitch * ((u > -0.055) & (u < 0.1))
    distance = np.maximum(np.abs(v) - half_width, np.abs(u) - 0.112)
    height = np.sqrt(np.maximum(half_width**2 - v**2, 0))
    return Surface(distance, height.astype(np.float32), _vary(STEEL * 0.93, rng), 1.0)


def cap(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    """A domed plastic cover cap with a flange."""
    radius = np.hypot(u, v)
    distance = radius - 0.043
    dome = 0.026 * np.sqrt(np.maximum(1 - (radius / 0.034) ** 2, 0))
    return Surface(distance, 0.006 * _bevel(distance, 0.004) + dome, _vary([0.13, 0.32, 0.66], rng), 0.0)


def plug(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    """A ribbed plastic wall plug with a slit."""
    half_width = np.interp(u, [-0.085, -0.079, -0.070, -0.066, 0.06, 0.085], [0.020, 0.027, 0.027, 0.020, 0.020, 0.011])
    ribs = smooth_step(np.sin(u * 2 * np.pi / 0.021 + rng.uniform(0, 6)) * 2) * (np.abs(u) < 0.06)
    half_width = half_width - 0.003 * ribs
    distance = np.maximum(np.abs(v) - half_width, np.abs(u) - 0.085)
    height = np.sqrt(np.maximum(half_width**2 - v**2, 0))
    slit = (np.abs(v) < 0.003) & (u > -0.03)
    color = _vary([0.72, 0.16, 0.13], rng)
    return Surface(distance, np.where(slit, height * 0.45, height).astype(np.float32), color, 0.0)


def clip(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    """A plastic cable clip: a rounded frame with a bridge."""
    outer = _rounded_box(u, v, 0.056, 0.034, 0.016)
    inner = np.minimum(_rounded_box(u - 0.024, v, 0.022, 0.022, 0.01), _rounded_box(u + 0.027, v, 0.016, 0.022, 0.007))
    distance = np.maximum(outer, -inner)
    return Surface(distance, 0.016 * _bevel(distance, 0.007), _vary([0.85, 0.66, 0.14], rng), 0.0)


def terminal(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    """A terminal block with a clamping screw; the wire enters at positive u."""
    distance = _rounded_box(u, v, 0.062, 0.046, 0.010)
    screw_u, slot_angle = u + 0.016, rng.uniform(0, np.pi)
    radius = np.hypot(screw_u, v)
    head = radius < 0.024
    slot = head & (np.abs(screw_u * np.sin(slot_angle) - v * np.cos(slot_angle)) < 0.0035)
    entry = _rounded_box(u - 0.042, v, 0.012, 0.016, 0.004) < 0
    height = 0.030 * _bevel(distance, 0.008)
    height = np.where(radius < 0.028, 0.016, height) + np.where(head, 0.006 * _bevel(radius - 0.024, 0.004), 0)
    height = np.where(slot, 0.014, np.where(entry, 0.012, height))
    color = np.where(head[..., None], _vary(STEEL * 0.95, rng), _vary([0.20, 0.33, 0.27], rng))
    color = np.where(entry[..., None], color * 0.35, color)
    return Surface(distance, height.astype(np.float32), color.astype(np.float32), head.astype(np.float32))


def fuse_socket(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    """A black socket with two contacts."""
    distance = _rounded_box(u, v, 0.046, 0.036, 0.006)
    contact = (np.abs(np.abs(u) - 0.021) < 0.004) & (np.abs(v) < 0.017)
    color = np.where(contact[..., None], STEEL * 0.7, _vary([0.09, 0.09, 0.10], rng))
    height = 0.012 * _bevel(distance, 0.004) - 0.006 * contact
    return Surface(distance, height.astype(np.float32), color.astype(np.float32), contact.astype(np.float32))


def fuse(u: np.ndarray, v: np.ndarray, rng: np.random.Generator, color: tuple[float, float, float]) -> Surface:
    """A blade fuse with a raised middle and two test points."""
    distance = _rounded_box(u, v, 0.039, 0.024, 0.006)
    middle = _rounded_box(u, v, 0.020, 0.024, 0.003)
    point = np.hypot(np.abs(u) - 0.030, v) < 0.0045
    height = 0.016 * _bevel(distance, 0.005) + 0.008 * _bevel(middle, 0.005) - 0.004 * point
    rgb = np.where(point[..., None], STEEL * 0.8, _vary(np.float32(color), rng))
    return Surface(distance, height.astype(np.float32), rgb.astype(np.float32), point.astype(np.float32))


def _rounded_box(u: np.ndarray, v: np.ndarray, half_u: float, half_v: float, corner: float) -> np.ndarray:
    """Return the signed distance to a rectangle with rounded corners."""
    past_u, past_v = np.abs(u) - half_u + corner, np.abs(v) - half_v + corner
    return np.hypot(np.maximum(past_u, 0), np.maximum(past_v, 0)) + np.minimum(np.maximum(past_u, past_v), 0) - corner


WASHER = Part("washer", washer, 0.043)
NUT = Part("nut", nut, 0.049)
SCREW = Part("screw", screw, 0.031, 0.085)
CAP = Part("cap", cap, 0.043)
PLUG = Part("plug", plug, 0.028, 0.06)
CLIP = Part("clip", clip, 0.035, 0.024)

TERMINAL = Part("terminal", terminal, 0.046, 0.030)
FUSE_SOCKET = Part("fuse_socket", fuse_socket, 0.036, 0.022)
