"""The category ``tray``: an assembly kit in a tray of six compartments, each with its own kind and number of parts.

A logical defect changes which parts lie where and leaves every part intact; a structural one damages a part or the
tray.
"""

from dataclasses import dataclass

import numpy as np

from anomalib_pack.rendering.canvas import Canvas, photograph, smooth_noise, smooth_step
from anomalib_pack.rendering.defects import DAMAGES, DefectKind, draw_structural, random_cut
from anomalib_pack.rendering.parts import CAP, CLIP, NUT, PLUG, SCREW, WASHER, Part

COLUMNS, ROWS = 3, 2
RIM, WALL = 0.035, 0.03
CELL_WIDTH = (1 - 2 * RIM - (COLUMNS - 1) * WALL) / COLUMNS
CELL_HEIGHT = (1 - 2 * RIM - (ROWS - 1) * WALL) / ROWS
WALL_HEIGHT = 0.03
PLASTIC = (0.33, 0.35, 0.37)
GAP = 0.006  # between two parts, and between a part and a wall

# The kind and the number of the parts in each compartment, row by row from the upper left.
KIT = ((WASHER, 4), (SCREW, 2), (CAP, 4), (PLUG, 3), (NUT, 4), (CLIP, 3))

LOGICAL_DEFECTS = (
    # Finding as much of the empty floor as one part covers is finding all there is to find.
    *(DefectKind(f"missing_{part.name}", part.area, relative=False) for part, _ in KIT),
    *(DefectKind(f"extra_{part.name}") for part, _ in KIT),
    *(DefectKind(f"wrong_{part.name}") for part, _ in KIT),
    # One of the two compartments gives the swap away.
    DefectKind("swapped_compartments", 0.5),
)
STRUCTURAL_DEFECTS = (*(DefectKind(name) for name in DAMAGES), DefectKind("broken_part"))


@dataclass
class Piece:
    """One part of the kit, the compartment it lies in, and the name of the defect that it is, if any."""

    part: Part
    cell: int
    defect: str = ""


def draw_defects(group: str, rng: np.random.Generator) -> list[str]:
    """Draw the names of the defects of one anomalous image."""
    if group == "structural_anomalies":
        return draw_structural(STRUCTURAL_DEFECTS, rng)
    part = KIT[rng.integers(len(KIT))][0].name
    return [rng.choice([f"missing_{part}", f"extra_{part}", f"wrong_{part}", "swapped_compartments"]).item()]


def render(image_size: int, defects: list[str], rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """Render a tray.

    Args:
        image_size: Side of the image in pixels.
        defects: Names of the defects; none for a normal tray.
        rng: Draws everything that varies.

    Returns:
        The image, uint8 of shape (image_size, image_size, 3), and for each defect its mask, Boolean of shape
        (image_size, image_size).
    """
    canvas = Canvas(image_size, PLASTIC)
    _draw_tray(canvas, rng)
    pieces = make_kit()
    masks = {name: np.zeros((canvas.size, canvas.size), bool) for name in defects}
    for name in defects:
        for cell in repack(pieces, name, rng):
            masks[name] |= _floor(canvas, cell)
    for piece, center, angle in _arrange(pieces, rng):
        _lay(canvas, piece, center, angle, masks, rng)
    for name in defects:
        if name in DAMAGES:
            masks[name] = DAMAGES[name](canvas, rng)
    return photograph(canvas, rng, [masks[name] for name in defects])


def _draw_tray(canvas: Canvas, rng: np.random.Generator) -> None:
    """Raise the walls and give the plastic its grain."""
    x, y = canvas.coordinates()
    to_wall = np.full_like(x, np.inf)
    for cell in range(len(KIT)):
        left, top = _corner(cell)
        outside_x = np.abs(x - left - CELL_WIDTH / 2) - CELL_WIDTH / 2
        outside_y = np.abs(y - top - CELL_HEIGHT / 2) - CELL_HEIGHT / 2
        to_wall = np.minimum(to_wall, np.maximum(outside_x, outside_y))
    canvas.height += WALL_HEIGHT * smooth_step(to_wall / 0.012)
    canvas.height += 0.00025 * smooth_noise(rng, canvas.size, 0.006)
    canvas.color *= 1 + 0.025 * smooth_noise(rng, canvas.size, 0.2)[..., None]


def _corner(cell: int) -> tuple[float, float]:
    """Return left and top of a compartment's floor."""
    row, column = divmod(cell, COLUMNS)
    return RIM + column * (CELL_WIDTH + WALL), RIM + row * (CELL_HEIGHT + WALL)


def _floor(canvas: Canvas, cell: int) -> np.ndarray:
    left, top = _corner(cell)
    x, y = canvas.coordinates()
    return (np.abs(x - left - CELL_WIDTH / 2) < CELL_WIDTH / 2) & (np.abs(y - top - CELL_HEIGHT / 2) < CELL_HEIGHT / 2)


def make_kit() -> list[Piece]:
    """Return the pieces of a normal tray."""
    return [Piece(part, cell) for cell, (part, count) in enumerate(KIT) for _ in range(count)]


def repack(pieces: list[Piece], defect: str, rng: np.random.Generator) -> list[int]:
    """Apply a defect to the contents of the tray, and return the compartments whose floor it marks."""
    action, _, name = defect.partition("_")
    if defect == "swapped_compartments":
        first, second = rng.choice(len(KIT), 2, replace=False).tolist()
        for piece in pieces:
            piece.cell = {first: second, second: first}.get(piece.cell, piece.cell)
        return [first, second]
    if defect == "broken_part":
        pieces[rng.integers(len(pieces))].defect = defect
    elif action in {"missing", "extra", "wrong"}:
        piece = next(piece for piece in pieces if piece.part.name == name)
        if action == "missing":
            pieces.remove(piece)
            return [piece.cell]
        if action == "extra":
            pieces.append(Piece(piece.part, piece.cell, defect))
        else:
            others = [part for part, _ in KIT if part is not piece.part]
            piece.part, piece.defect = others[rng.integers(len(others))], defect
    return []


def _arrange(pieces: list[Piece], rng: np.random.Generator) -> list[tuple[Piece, tuple[float, float], float]]:
    """Find a place for every piece: centre and angle, within its compartment and clear of the others."""
    placed = []
    for cell in range(len(KIT)):
        # The long parts need most room.
        inside = sorted((piece for piece in pieces if piece.cell == cell), key=lambda piece: -piece.part.half_length)
        placed += _arrange_cell(inside, rng)
    return placed


def _arrange_cell(pieces: list[Piece], rng: np.random.Generator) -> list[tuple[Piece, tuple[float, float], float]]:
    """Throw the pieces of one compartment until they all lie clear of each other."""
    while True:
        placed, axes = [], []
        for piece in pieces:
            for _ in range(60):
                center, angle = _throw(piece, rng)
                axis = _axis_points(piece.part, center, angle)
                if all(_clearance(axis, other) > piece.part.radius + radius + GAP for other, radius in axes):
                    placed.append((piece, center, angle))
                    axes.append((axis, piece.part.radius))
                    break
        if len(placed) == len(pieces):
            return placed


def _throw(piece: Piece, rng: np.random.Generator) -> tuple[tuple[float, float], float]:
    """Draw a place in the compartment that keeps the piece off the walls."""
    part = piece.part
    angle = rng.uniform(0, 2 * np.pi)
    # A long part lies along the compartment, or as far across as the walls let it.
    if part.half_length > 0:
        angle = rng.choice([-1, 1]) * np.pi / 2 + rng.normal(0, 0.35)
    left, top = _corner(piece.cell)
    margin_x = part.half_length * abs(np.cos(angle)) + part.radius + GAP
    margin_y = part.half_length * abs(np.sin(angle)) + part.radius + GAP
    x = rng.uniform(left + margin_x, left + CELL_WIDTH - margin_x)
    y = rng.uniform(top + margin_y, top + CELL_HEIGHT - margin_y)
    return (x, y), angle


def _axis_points(part: Part, center: tuple[float, float], angle: float) -> np.ndarray:
    along = np.linspace(-part.half_length, part.half_length, 7)[:, None]
    return np.array(center) + along * np.array([np.cos(angle), np.sin(angle)])


def _clearance(axis: np.ndarray, other: np.ndarray) -> float:
    return np.linalg.norm(axis[:, None] - other[None], axis=-1).min()


def _lay(
    canvas: Canvas,
    piece: Piece,
    center: tuple[float, float],
    angle: float,
    masks: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> None:
    """Stamp a piece onto the canvas, and enter it into the masks."""
    cut = random_cut(piece.part, rng) if piece.defect == "broken_part" else None
    covered, broken = canvas.stamp(lambda u, v: piece.part.draw(u, v, rng), center, angle, piece.part.reach, cut)
    if piece.defect:
        masks[piece.defect] |= broken if cut else covered
    for name in masks:
        # What is missing can be anywhere on the floor that no part covers.
        if name.startswith("missing_"):
            masks[name] &= ~covered
