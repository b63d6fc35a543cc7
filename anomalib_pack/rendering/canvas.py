"""A small renderer for inspection scenes seen from above.

Parts are stamped onto a canvas that stores, per pixel, a height, a colour and how metallic the surface is. One shading
pass then lights the whole canvas: the slope of the height gives bevels and highlights, height differences give ambient
occlusion and soft shadows, so that all parts sit in the same light. Lengths, heights included, are fractions of the
image's side; the origin is the upper left corner, x runs right and y down.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

# Samples per pixel and axis. Outlines are anti-aliased by their distance, so that two are enough for the highlights.
SUPERSAMPLING = 2


@dataclass
class Surface:
    """A part over a window of the canvas, all arrays of the window's shape (H, W).

    ``distance`` is the signed distance to the outline, negative inside; ``height`` is above the ground that the part
    lies on; ``color`` is RGB in [0, 1], shape (3,) or (H, W, 3); ``metal`` is 0 for plastic and 1 for bare metal,
    one number or an array.
    """

    distance: np.ndarray
    height: np.ndarray
    color: np.ndarray
    metal: float | np.ndarray


class Canvas:
    """Height, colour and material of a square scene.

    Args:
        image_size: Side of the final image in pixels; the canvas is finer.
        color: RGB of the ground, in [0, 1].
    """

    def __init__(self, image_size: int, color: tuple[float, float, float]) -> None:
        self.image_size = image_size
        self.size = image_size * SUPERSAMPLING
        self.height = np.zeros((self.size, self.size), np.float32)
        self.color = np.tile(np.float32(color), (self.size, self.size, 1))
        self.metal = np.zeros((self.size, self.size), np.float32)

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y of every canvas pixel, each of shape (size, size)."""
        axis = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size
        return np.meshgrid(axis, axis)

    def stamp(
        self,
        part: Callable[[np.ndarray, np.ndarray], Surface],
        center: tuple[float, float],
        angle: float,
        reach: float,
        cut: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lay a part onto the canvas.

        Args:
            part: Maps the part's own coordinates, centred and along its axes, to its surface.
            center: Position of the part.
            angle: Rotation in radians.
            reach: Radius of a circle around ``center`` that holds the part.
            cut: Signed distance, in the part's coordinates, of a region that is broken off.

        Returns:
            Two Boolean arrays of shape (size, size): what the part covers, and what is broken off.
        """
        rows, columns = (self._window(center[1], reach), self._window(center[0], reach))
        y, x = np.mgrid[rows, columns].astype(np.float32)
        x, y = (x + 0.5) / self.size - center[0], (y + 0.5) / self.size - center[1]
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        surface = part(u, v)
        outline = surface.distance
        if cut is not None:
            _break_off(surface, cut(u, v))
        coverage = np.clip(0.5 - surface.distance * self.size, 0, 1)

        self.height[rows, columns] += coverage * surface.height
        self.color[rows, columns] += coverage[..., None] * (surface.color - self.color[rows, columns])
        self.metal[rows, columns] += coverage * (surface.metal - self.metal[rows, columns])

        covered, broken = np.zeros((2, self.size, self.size), bool)
        covered[rows, columns] = coverage > 0.5
        broken[rows, columns] = (outline < 0) & (coverage <= 0.5)
        return covered, broken

    def _window(self, middle: float, reach: float) -> slice:
        first, last = int((middle - reach) * self.size), int((middle + reach) * self.size) + 1
        return slice(max(first, 0), min(last, self.size))

    def stroke(self, points: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
        """Draw a smooth line without changing the canvas.

        Args:
            points: Polyline, shape (N, 2), columns x and y.
            width: Width of the line.

        Returns:
            Coverage in [0, 1] and the distance of a covered pixel to the line's edge, both of shape (size, size).
        """
        line = np.zeros((self.size, self.size), np.uint8)
        thickness = max(1, round(width * self.size))
        cv2.polylines(line, [np.round(points * self.size * 16).astype(np.int32)], False, 255, thickness, cv2.LINE_AA, 4)
        depth = cv2.distanceTransform((line > 127).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) / self.size
        return line.astype(np.float32) / 255, depth

    def paint(self, coverage: np.ndarray, color: np.ndarray | tuple[float, float, float], metal: float = 0) -> None:
        """Replace colour and material where ``coverage``, shape (size, size) in [0, 1], is not zero."""
        self.color += coverage[..., None] * (np.float32(color) - self.color)
        self.metal += coverage * (metal - self.metal)


def _break_off(surface: Surface, gone: np.ndarray) -> None:
    """Take the region where ``gone`` is negative off a part, and leave the rough pale edge of fresh material."""
    fresh = smooth_step(1 - gone / 0.014)
    surface.distance = np.maximum(surface.distance, -gone)
    surface.height = surface.height * (1 - 0.5 * fresh)
    surface.color = surface.color + 0.8 * fresh[..., None] * (0.9 - surface.color)
    surface.metal = surface.metal * (1 - fresh)


def blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Blur an array of shape (H, W) or (H, W, C) with a Gaussian of ``sigma`` pixels."""
    return cv2.GaussianBlur(values, (0, 0), sigma)


def smooth_step(values: np.ndarray) -> np.ndarray:
    """Rise smoothly from 0, at 0 and below, to 1, at 1 and above."""
    values = np.clip(values, 0, 1)
    return values * values * (3 - 2 * values)


def smooth_noise(rng: np.random.Generator, size: int, grain: float) -> np.ndarray:
    """Return noise of shape (size, size) with mean 0, standard deviation 1 and spots of about ``grain`` of the side."""
    cells = max(4, round(1 / grain))
    noise = cv2.resize(rng.standard_normal((cells, cells), np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return (noise - noise.mean()) / noise.std()


def photograph(
    canvas: Canvas, rng: np.random.Generator, masks: list[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Light the canvas and take a picture of it, with what differs between two shots of a production camera.

    Args:
        canvas: The scene.
        rng: Draws light direction, brightness, colour temperature, camera shift and sensor noise.
        masks: Boolean arrays of shape (size, size), which move with the camera.

    Returns:
        The image, uint8 of shape (image_size, image_size, 3), and the masks, Boolean of shape (image_size, image_size).
    """
    image = _illuminate(canvas, _shade(canvas, rng), rng)
    motion = _camera_motion(canvas.size, rng)
    image = _resample(image, motion, canvas.image_size)
    image += rng.normal(0, 0.007, image.shape).astype(np.float32) * np.sqrt(0.3 + image)
    masks = [_resample(mask.astype(np.float32), motion, canvas.image_size) > 0.5 for mask in masks]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), masks


def _shade(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Return the lit colours, shape (size, size, 3), of a scene under one large soft light."""
    azimuth = rng.uniform(-2.4, -2.0)  # upper left
    light = np.float32([np.cos(azimuth) * 0.55, np.sin(azimuth) * 0.55, 0.835])
    # Slopes are limited by the pixel grid: without the blur a vertical wall would be one line of noise.
    height = blur(canvas.height, 0.004 * canvas.size)
    slope_y, slope_x = np.gradient(height * canvas.size)
    length = np.sqrt(slope_x**2 + slope_y**2 + 1)
    normal_x, normal_y, normal_z = -slope_x / length, -slope_y / length, 1 / length
    diffuse = np.maximum(normal_x * light[0] + normal_y * light[1] + normal_z * light[2], 0)
    # The direction in which the camera, straight above, sees the surroundings mirrored, against the light's.
    mirrored = 2 * normal_z * diffuse - light[2]
    open_sky = np.clip(1 - 14 * np.maximum(blur(height, 0.02 * canvas.size) - height, 0), 0.35, 1)
    light_share = (0.30 + 0.85 * diffuse * (1 - 0.55 * _shadow(canvas, height, light))) * open_sky
    plastic = canvas.color * light_share[..., None] + 0.35 * smooth_step((mirrored - 0.86) / 0.12)[..., None]
    surroundings = 0.22 + 0.45 * smooth_step((mirrored + 0.1) / 0.9) + 0.75 * smooth_step((mirrored - 0.72) / 0.22)
    metallic = canvas.color * (surroundings * (0.45 + 0.55 * light_share))[..., None]
    return plastic + canvas.metal[..., None] * (metallic - plastic)


def _shadow(canvas: Canvas, height: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Return the share of the light, shape (size, size), that higher things keep from a pixel."""
    shadow = np.zeros_like(height)
    for step in np.float32([0.008, 0.016, 0.026, 0.038]):
        shift = np.float32([[1, 0, -light[0] * step * canvas.size], [0, 1, -light[1] * step * canvas.size]])
        higher = cv2.warpAffine(height, shift, None, borderMode=cv2.BORDER_REPLICATE) - height - light[2] * step
        shadow = np.maximum(shadow, smooth_step(higher / 0.006))
    return blur(shadow, 0.004 * canvas.size)


def _illuminate(canvas: Canvas, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply uneven brightness, colour temperature and exposure."""
    x, y = canvas.coordinates()
    tilt_x, tilt_y = rng.normal(0, 0.06, 2)
    temperature = rng.normal(0, 0.018)
    gain = rng.normal(1, 0.035) * (1 + tilt_x * (x - 0.5) + tilt_y * (y - 0.5))
    return image * gain[..., None].astype(np.float32) * np.float32([1 + temperature, 1, 1 - temperature])


def _camera_motion(size: int, rng: np.random.Generator) -> np.ndarray:
    motion = cv2.getRotationMatrix2D((size / 2, size / 2), rng.normal(0, 0.35), rng.normal(1.0, 0.003))
    motion[:, 2] += rng.normal(0, 0.0035 * size, 2)
    return motion


def _resample(image: np.ndarray, motion: np.ndarray, image_size: int) -> np.ndarray:
    moved = cv2.warpAffine(image, motion, None, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(moved, (image_size, image_size), interpolation=cv2.INTER_AREA)
