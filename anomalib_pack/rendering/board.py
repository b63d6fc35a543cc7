"""The category ``board``: two terminal strips joined by four wires through a covered cable duct, and a row of fuses.

Six variants of the board are in production. In each of them every colour of wire comes once, a wire leaves the duct in
the row where it entered, and the fuses have their order. Between them the variants show nearly all neighbours that a
wire or a fuse can have, so that a defect is not given away by the wires or fuses next to it. A logical defect joins
other terminals, changes a colour, or leaves out or adds a piece, all with intact pieces; a structural one damages a
wire, a terminal or the panel.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from anomalib_pack.rendering.canvas import Canvas, blur, photograph, smooth_noise, smooth_step
from anomalib_pack.rendering.defects import DAMAGES, DefectKind, bezier, draw_structural, random_cut
from anomalib_pack.rendering.parts import FUSE_SOCKET, TERMINAL, fuse

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
WIRE_WIDTH = 0.021

DUCT_LEFT, DUCT_RIGHT, DUCT_TOP, DUCT_BOTTOM = 0.37, 0.63, 0.21, 0.96

FUSE_ROW, FUSE_COLUMNS = 0.11, tuple(0.12 + 0.115 * column for column in range(5))

# Per variant: the colour of the wire in each row of terminals, and of the fuse in each socket; None where it is free.
VARIANTS = (
    (("red", "blue", None, "yellow", "black", None), ("red", "yellow", "blue", None, "red")),
    ((None, "red", "yellow", None, "blue", "black"), ("yellow", "red", None, "blue", "red")),
    (("yellow", None, "black", "red", None, "blue"), ("blue", None, "red", "red", "yellow")),
    (("blue", "black", "red", None, "yellow", None), (None, "blue", "yellow", "red", "red")),
    (("black", "blue", None, None, "red", "yellow"), ("red", "red", "yellow", "blue", None)),
    ((None, "yellow", None, "black", "red", "blue"), ("red", "blue", "red", None, "yellow")),
)

LOGICAL_DEFECTS = (
    # Finding as much of the place where it belongs as the piece covers is finding all there is to find.
    DefectKind("missing_wire", WIRE_WIDTH * (RIGHT - LEFT - (DUCT_RIGHT - DUCT_LEFT)), relative=False),
    DefectKind("extra_wire"),
    DefectKind("wrong_color"),
    # One of the two gives the exchange away.
    DefectKind("swapped_wires", 0.5),
    DefectKind("missing_fuse"),
    DefectKind("swapped_fuses", 0.5),
)
STRUCTURAL_DEFECTS = (*(DefectKind(name) for name in DAMAGES), DefectKind("bare_wire"), DefectKind("broken_terminal"))


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
    return draw_structural(STRUCTURAL_DEFECTS, rng)


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
    variant = rng.integers(len(VARIANTS))
    wire_colors, fuse_colors = VARIANTS[variant]
    _draw_label(canvas, variant, rng)
    _draw_fuses(canvas, list(fuse_colors), masks, rng)
    wires = [Wire(row, row, color) for row, color in enumerate(wire_colors) if color]
    for name in defects:
        _rewire(canvas, wires, masks[name], name, rng)
    for index in rng.permutation(len(wires)):
        _draw_wire(canvas, wires[index], masks, rng)
    _draw_duct(canvas)
    _draw_terminals(canvas, masks, rng)
    for name in defects:
        if name in DAMAGES:
            masks[name] = DAMAGES[name](canvas, rng)
    return photograph(canvas, rng, [masks[name] for name in defects])


def _draw_label(canvas: Canvas, variant: int, rng: np.random.Generator) -> None:
    """Stick on the type label with variant and lot number."""
    left, top = np.array([0.71, 0.055]) + rng.normal(0, 0.004, 2)
    x, y = canvas.coordinates()
    plate = ((x > left) & (x < left + 0.23) & (y > top) & (y < top + 0.11)).astype(np.float32)
    canvas.paint(plate, (0.86, 0.86, 0.84))
    canvas.height += 0.0015 * plate
    print_ = np.zeros((canvas.size, canvas.size), np.uint8)
    for line, text in enumerate((f"X{variant + 1} 24V", f"LOT {rng.integers(1000, 10000)}")):
        place = np.int32(np.array([left + 0.018, top + 0.046 + 0.044 * line]) * canvas.size)
        scale = canvas.size / 512 * 0.52
        thickness = max(1, round(canvas.size / 400))
        cv2.putText(print_, text, place.tolist(), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness, cv2.LINE_AA)
    canvas.paint(0.9 * print_.astype(np.float32) / 255, (0.08, 0.08, 0.10))


def _draw_fuses(
    canvas: Canvas, colors: list[str | None], masks: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    changed = {}
    used = [slot for slot, color in enumerate(colors) if color]
    if "missing_fuse" in masks:
        slot = rng.choice(used)
        colors[slot], changed[slot] = None, "missing_fuse"
    if "swapped_fuses" in masks:
        first = rng.choice(used)
        second = rng.choice([slot for slot in used if colors[slot] != colors[first]])
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
        for end in _ends(wire):
            # Wires hang loosely: the missing one could have run through all of this band.
            mask |= canvas.stroke(np.array(end), 3 * WIRE_WIDTH)[0] > 0.5
    elif defect == "extra_wire":
        row = rng.choice(sorted(set(range(len(TERMINAL_ROWS))) - {wire.left for wire in wires}))
        wires.append(Wire(row, row, wires[first].color, defect))
    elif defect == "wrong_color":
        wires[first].color, wires[first].defect = wires[second].color, defect
    elif defect == "swapped_wires":
        wires[first].right, wires[second].right = wires[second].right, wires[first].right
        wires[first].defect = wires[second].defect = defect
    elif defect == "bare_wire":
        wires[first].defect = defect


def _ends(wire: Wire) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return where the left and the right visible piece of a wire leave their terminals and enter the duct."""
    left, right = TERMINAL_ROWS[wire.left], TERMINAL_ROWS[wire.right]
    return [
        (np.array([LEFT + 0.035, left]), np.array([DUCT_LEFT + 0.02, left])),
        (np.array([RIGHT - 0.035, right]), np.array([DUCT_RIGHT - 0.02, right])),
    ]


def _draw_wire(canvas: Canvas, wire: Wire, masks: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    color = np.float32(COLORS[wire.color]) * rng.normal(1, 0.04)
    bare_side = rng.integers(2)
    for side, (start, end) in enumerate(_ends(wire)):
        loose_end = end + np.array([0, rng.normal(0, 0.022)])
        points = bezier(start, (start + end) / 2 + rng.normal(0, 0.022, 2), loose_end)
        covered = _draw_strand(canvas, points, WIRE_WIDTH, color, 0)
        if wire.defect == "bare_wire":
            if side != bare_side:
                continue
            first, length = rng.integers(4, 16), rng.integers(10, 17)
            covered = _draw_strand(canvas, points[first : first + length], WIRE_WIDTH * 0.8, COPPER, 1)
        # Two wires were swapped at their right ends.
        if wire.defect and not (wire.defect == "swapped_wires" and side == 0):
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


def _draw_duct(canvas: Canvas) -> None:
    """Lay the slotted duct and its cover over the wires."""
    x, y = canvas.coordinates()
    middle_x, middle_y = (DUCT_LEFT + DUCT_RIGHT) / 2, (DUCT_TOP + DUCT_BOTTOM) / 2
    outside_x = np.abs(x - middle_x) - (DUCT_RIGHT - DUCT_LEFT) / 2
    outside_y = np.abs(y - middle_y) - (DUCT_BOTTOM - DUCT_TOP) / 2
    distance = np.maximum(outside_x, outside_y)
    # Beside the cover, the fingers of the side walls are seen from above.
    finger = (outside_x > -0.022) & (np.sin(y * 2 * np.pi / 0.0203) > 0.2)
    cover = np.where(outside_x > -0.022, 0.020, 0.036) - 0.008 * finger
    coverage = np.clip(0.5 - distance * canvas.size, 0, 1)
    canvas.height += coverage * (cover * smooth_step(-distance / 0.006) - canvas.height)
    canvas.paint(coverage, np.float32([0.36, 0.38, 0.41]))


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
