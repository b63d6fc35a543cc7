# SPDX-License-Identifier: Apache-2.0

"""The category ``board``: two terminal strips joined by four wires, and a row of fuses.

A logical defect joins other terminals, changes a colour or leaves out a piece, all with intact pieces; a structural one
damages a wire, a terminal or the panel.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from anomalib_pack.data.defects import DAMAGES, Defect, bezier, random_cut
from anomalib_pack.data.parts import FUSE_SOCKET, TERMINAL, fuse
from anomalib_pack.data.rendering import Canvas, blur, photograph, smooth_noise

PANEL = (0.52, 0.53, 0.50)
COLORS = {
    "red": (0.66, 0.10, 0.09),
    "blue": (0.10, 0.22, 0.60),
    "yellow": (0.80, 0.63, 0.10),
    "black": (0.06, 0.06, 0.07),
}
COPPER = (0.86, 0.52, 0.32)

LEFT, RIGHT = 0.11, 0.89
TERMINAL_ROWS = tuple(0.28 + 0.122 * row for row in range(6))
# Left terminal, right terminal and colour of each wire; terminals 2 and 5 on the left, 1 and 4 on the right stay free.
WIRING = ((0, 2, "red"), (1, 0, "blue"), (3, 5, "yellow"), (4, 3, "black"))
FREE_LEFT, FREE_RIGHT = (2, 5), (1, 4)
WIRE_WIDTH = 0.021

FUSE_ROW, FUSE_COLUMNS = 0.11, tuple(0.12 + 0.115 * column for column in range(5))
FUSES = ("red", "yellow", "blue", None, "red")

LOGICAL_DEFECTS = (
    # Finding as much of the place where it belongs as the piece covers is finding all there is to find.
    Defect("missing_wire", WIRE_WIDTH * (RIGHT - LEFT), relative=False),
    Defect("extra_wire"),
    Defect("wrong_color"),
    # One of the two gives the exchange away.
    Defect("swapped_wires", 0.5),
    Defect("missing_fuse"),
    Defect("swapped_fuses", 0.5),
)
STRUCTURAL_DEFECTS = (*(Defect(name) for name in DAMAGES), Defect("bare_wire"), Defect("broken_terminal"))


@dataclass
class Wire:
    """A wire from a left to a right terminal, and the name of the defect that it is, if any."""

    left: int
    right: int
    color: str
    defect: str = ""


def draw_defects(group: str, rng: np.random.Generator) -> list[str]:
    """Draw the names of the defects of one anomalous image."""
    if group == "logical_anomalies":
        return [rng.choice([defect.name for defect in LOGICAL_DEFECTS]).item()]
    names = [defect.name for defect in STRUCTURAL_DEFECTS]
    return rng.choice(names, size=rng.choice([1, 2], p=[0.7, 0.3]), replace=False).tolist()


def render(image_size: int, defects: list[str], rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """Render a board.

    Args:
        image_size: Side of the image in pixels.
        defects: Names of the defects; none for a normal board.
        rng: Draws everything that varies.

    Returns:
        The image, uint8 of shape (image_size, image_size, 3), and for each defect its mask, Boolean of shape
        (image_size, image_size).
    """
    canvas = Canvas(image_size, PANEL)
    canvas.height += 0.0002 * smooth_noise(rng, canvas.size, 0.008)
    canvas.color *= 1 + 0.02 * smooth_noise(rng, canvas.size, 0.15)[..., None]
    masks = {name: np.zeros((canvas.size, canvas.size), bool) for name in defects}
    _draw_label(canvas, rng)
    _draw_fuses(canvas, masks, rng)
    wires = [Wire(*connection) for connection in WIRING]
    for name in defects:
        _rewire(canvas, wires, masks[name], name, rng)
    for index in rng.permutation(len(wires)):
        _draw_wire(canvas, wires[index], masks, rng)
    _draw_terminals(canvas, masks, rng)
    for name in defects:
        if name in DAMAGES:
            masks[name] = DAMAGES[name](canvas, rng)
    return photograph(canvas, rng, [masks[name] for name in defects])


def _draw_label(canvas: Canvas, rng: np.random.Generator) -> None:
    """Stick on the type label; its lot number differs from board to board."""
    left, top = np.array([0.71, 0.055]) + rng.normal(0, 0.004, 2)
    x, y = canvas.coordinates()
    plate = ((x > left) & (x < left + 0.23) & (y > top) & (y < top + 0.11)).astype(np.float32)
    canvas.paint(plate, (0.86, 0.86, 0.84))
    canvas.height += 0.0015 * plate
    print_ = np.zeros((canvas.size, canvas.size), np.uint8)
    for line, text in enumerate(("X4 24V", f"LOT {rng.integers(1000, 10000)}")):
        place = np.int32(np.array([left + 0.018, top + 0.046 + 0.044 * line]) * canvas.size)
        scale = canvas.size / 512 * 0.52
        thickness = max(1, round(canvas.size / 400))
        cv2.putText(print_, text, place.tolist(), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness, cv2.LINE_AA)
    canvas.paint(0.9 * print_.astype(np.float32) / 255, (0.08, 0.08, 0.10))


def _draw_fuses(canvas: Canvas, masks: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    colors, changed = list(FUSES), {}
    used = [slot for slot, color in enumerate(FUSES) if color]
    if "missing_fuse" in masks:
        slot = rng.choice(used)
        colors[slot], changed[slot] = None, "missing_fuse"
    if "swapped_fuses" in masks:
        first, second = ((0, 1), (0, 2), (1, 2), (1, 4), (2, 4))[rng.integers(5)]
        colors[first], colors[second] = colors[second], colors[first]
        changed |= {first: "swapped_fuses", second: "swapped_fuses"}
    for slot, (x, color) in enumerate(zip(FUSE_COLUMNS, colors, strict=True)):
        center = np.array([x, FUSE_ROW]) + rng.normal(0, 0.0015, 2)
        angle = rng.normal(0, 0.02)
        socket, _ = canvas.stamp(lambda u, v: FUSE_SOCKET.draw(u, v, rng), center, angle, FUSE_SOCKET.reach)
        if color:
            rgb = COLORS[color]
            canvas.stamp(lambda u, v, rgb=rgb: fuse(u, v, rng, rgb), center, angle, FUSE_SOCKET.reach)
        if slot in changed:
            masks[changed[slot]] |= socket


def _rewire(canvas: Canvas, wires: list[Wire], mask: np.ndarray, defect: str, rng: np.random.Generator) -> None:
    """Apply a defect to the wiring, and mark in the mask what no wire will show."""
    first, second = rng.choice(len(wires), 2, replace=False).tolist()
    if defect == "missing_wire":
        wire = wires.pop(first)
        ends = np.array([[LEFT, TERMINAL_ROWS[wire.left]], [RIGHT, TERMINAL_ROWS[wire.right]]])
        # Wires hang loosely: the missing one could have run through all of this band.
        mask |= canvas.stroke(ends, 4 * WIRE_WIDTH)[0] > 0.5
    elif defect == "extra_wire":
        wires.append(Wire(rng.choice(FREE_LEFT), rng.choice(FREE_RIGHT), wires[first].color, defect))
    elif defect == "wrong_color":
        wires[first].color, wires[first].defect = wires[second].color, defect
    elif defect == "swapped_wires":
        wires[first].right, wires[second].right = wires[second].right, wires[first].right
        wires[first].defect = wires[second].defect = defect
    elif defect == "bare_wire":
        wires[first].defect = defect


def _draw_wire(canvas: Canvas, wire: Wire, masks: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    start = np.array([LEFT + 0.035, TERMINAL_ROWS[wire.left]])
    end = np.array([RIGHT - 0.035, TERMINAL_ROWS[wire.right]])
    bends = [start + [0.25, 0] + rng.normal(0, 0.045, 2), end - [0.25, 0] + rng.normal(0, 0.045, 2)]
    points = bezier(start, *bends, end)
    color = np.float32(COLORS[wire.color]) * rng.normal(1, 0.04)
    covered = _draw_strand(canvas, points, WIRE_WIDTH, color, 0)
    if wire.defect == "bare_wire":
        first = rng.integers(8, 26)
        covered = _draw_strand(canvas, points[first : first + rng.integers(4, 8)], WIRE_WIDTH * 0.9, COPPER, 1)
    if wire.defect:
        masks[wire.defect] |= covered


def _draw_strand(
    canvas: Canvas, points: np.ndarray, width: float, color: np.ndarray | tuple[float, float, float], metal: float
) -> np.ndarray:
    """Lay a round strand over whatever is there; return what it covers, Boolean of the canvas' shape."""
    coverage, depth = canvas.stroke(points, width)
    radius = width / 2
    arch = np.sqrt(np.maximum(radius**2 - np.maximum(radius - depth, 0) ** 2, 0))
    # A wire bends smoothly over the wires that it crosses.
    canvas.height += coverage * (0.5 * blur(canvas.height, 0.012 * canvas.size) + arch - canvas.height)
    canvas.paint(coverage, color, metal)
    return coverage > 0.5


def _draw_terminals(canvas: Canvas, masks: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    broken = (rng.integers(2), rng.integers(6)) if "broken_terminal" in masks else None
    for side, x in enumerate((LEFT, RIGHT)):
        for row, y in enumerate(TERMINAL_ROWS):
            cut = random_cut(TERMINAL, rng) if (side, row) == broken else None
            center = np.array([x, y]) + rng.normal(0, 0.0015, 2)
            angle = np.pi * side + rng.normal(0, 0.015)
            _, gone = canvas.stamp(lambda u, v: TERMINAL.draw(u, v, rng), center, angle, TERMINAL.reach, cut)
            if cut:
                masks["broken_terminal"] |= gone
