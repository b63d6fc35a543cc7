"""What a defect is called and how it is scored, and the structural damage that any scene can suffer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from anomalib_pack.rendering.canvas import Canvas, smooth_noise, smooth_step
from anomalib_pack.rendering.parts import Part


@dataclass(frozen=True)
class DefectKind:
    """A kind of defect, as ``defects_config.json`` lists it.

    ``saturation`` is how much of the mask a detector has to find to have found all: a share of the mask's area if
    ``relative``, and a share of the image's area otherwise.
    """

    name: str
    saturation: float = 1.0
    relative: bool = True


def draw_structural(defects: Sequence[DefectKind], rng: np.random.Generator) -> list[str]:
    """Draw the names of the structural defects of one image: one, or in three of ten images two different ones."""
    names = [defect.name for defect in defects]
    return rng.choice(names, size=rng.choice([1, 2], p=[0.7, 0.3]), replace=False).tolist()


def scratch(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Draw a scratch across whatever lies there; return its mask, Boolean of the canvas' shape."""
    start = rng.uniform(0.15, 0.85, 2)
    end = start + rng.uniform(0.20, 0.34) * _direction(rng)
    bend = (start + end) / 2 + rng.normal(0, 0.025, 2)
    coverage, _ = canvas.stroke(bezier(start, bend, end), rng.uniform(0.008, 0.012))
    # A scratch does not cut with the same force all along.
    coverage = coverage * np.clip(0.8 + 0.3 * smooth_noise(rng, canvas.size, 0.04), 0.3, 1)
    canvas.height -= 0.004 * coverage
    canvas.paint(0.75 * coverage, np.clip(canvas.color * 1.8 + 0.12, 0, 1))
    return coverage > 0.25


def dent(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Press a dent into whatever lies there; return its mask, Boolean of the canvas' shape."""
    x, y = canvas.coordinates()
    center, radii, angle = rng.uniform(0.12, 0.88, 2), rng.uniform(0.034, 0.055, 2), rng.uniform(0, np.pi)
    u = ((x - center[0]) * np.cos(angle) + (y - center[1]) * np.sin(angle)) / radii[0]
    v = ((y - center[1]) * np.cos(angle) - (x - center[0]) * np.sin(angle)) / radii[1]
    radius = np.hypot(u, v)
    # Pushed-in material rises as a rim around the dent.
    canvas.height += 0.016 * np.exp(-(((radius - 0.95) / 0.25) ** 2)) - 0.042 * smooth_step(1.05 - radius)
    return radius < 1.2


def contaminate(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Drop dirt onto the scene: a rusty stain or a fibre; return its mask, Boolean of the canvas' shape."""
    return _stain(canvas, rng) if rng.random() < 0.6 else _fibre(canvas, rng)


def _stain(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    x, y = canvas.coordinates()
    center, size = rng.uniform(0.12, 0.88, 2), rng.uniform(0.034, 0.055)
    outline = np.hypot(x - center[0], y - center[1]) - size * (1 + 0.35 * smooth_noise(rng, canvas.size, 0.05))
    coverage = smooth_step(0.5 - outline / 0.006)
    canvas.paint(0.85 * coverage, (0.25, 0.13, 0.05))
    canvas.height += 0.003 * coverage
    return coverage > 0.5


def _fibre(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    start = rng.uniform(0.15, 0.85, 2)
    end = start + rng.uniform(0.10, 0.18) * _direction(rng)
    coverage, depth = canvas.stroke(bezier(start, start + rng.normal(0, 0.12, 2), end), rng.uniform(0.008, 0.011))
    canvas.paint(coverage, rng.choice([(0.75, 0.72, 0.66), (0.12, 0.10, 0.10)]))
    canvas.height += depth + 0.004 * coverage
    return coverage > 0.25


DAMAGES: dict[str, Callable[[Canvas, np.random.Generator], np.ndarray]] = {
    "scratch": scratch,
    "dent": dent,
    "contamination": contaminate,
}


def random_cut(part: Part, rng: np.random.Generator) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return the signed distance of a piece that is broken off a part, negative where the part is gone."""
    side = rng.choice([-1, 1])
    angle = rng.uniform(-0.9, 0.9) + (np.pi if side < 0 else 0)
    depth = 0.4 * part.half_length + part.radius * rng.uniform(-0.2, 0.2)
    waves, phase = rng.uniform(150, 260), rng.uniform(0, 6)

    def cut(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        along, across = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
        return depth * np.abs(np.cos(angle)) + 0.004 * np.sin(across * waves + phase) - along

    return cut


def bezier(*controls: np.ndarray) -> np.ndarray:
    """Return 40 points, shape (40, 2), of the Bezier curve with these control points, each of shape (2,)."""
    t = np.linspace(0, 1, 40)[:, None]
    points = list(controls)
    while len(points) > 1:
        points = [(1 - t) * first + t * second for first, second in pairwise(points)]
    return points[0]


def _direction(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)])
