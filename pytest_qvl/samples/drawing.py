"""Coloured shapes on a grid of cells, drawn so that every shape stays inside its own cell.

Scenes are described in units of which a cell has 28, and drawn at any size. At 28 px a cell is two by two patches
of 14 px, which Qwen2-VL and Qwen2.5-VL merge into one visual token. So each shape is seen by exactly one visual
token, and moving a shape to another cell permutes visual tokens. At other sizes that are whole visual tokens it is
seen by that many, and by no other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

CELL = 28
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 40),
    "blue": (40, 60, 220),
    "yellow": (235, 215, 30),
    "purple": (150, 40, 170),
    "orange": (245, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star")

Cell = tuple[int, int]
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """A shape in a cell (column, row), its centre `offset` away from the middle; a cell is 28 wide."""

    shape: str
    colour: str
    cell: Cell
    offset: tuple[int, int]
    radius: int
    rgb: RGB


@dataclass(frozen=True)
class Scene:
    """Things on a plain background; `columns` x `rows` cells, at most one thing per cell."""

    columns: int
    rows: int
    background: RGB
    things: tuple[Thing, ...]

    def render(self, cell: int = CELL) -> Image:
        """The image: RGB, `cell` px per side of a cell."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (self.columns * cell, self.rows * cell), self.background)
        draw = ImageDraw.Draw(image)
        for thing in self.things:
            _draw(draw, thing, cell / CELL)
        return image

    def moved(self, cells: dict[Cell, Cell]) -> Scene:
        """The same scene with every thing moved to the cell that `cells` maps its own to."""
        return replace(self, things=tuple(replace(thing, cell=cells[thing.cell]) for thing in self.things))


def random_thing(rng: random.Random, cell: Cell, shape: str | None = None, colour: str | None = None) -> Thing:
    """A thing in `cell`; what is not given is drawn at random."""
    shape = shape or rng.choice(SHAPES)
    colour = colour or rng.choice(tuple(COLOURS))
    radius = rng.randint(8, 11)
    slack = CELL // 2 - 1 - radius
    offset = (rng.randint(-slack, slack), rng.randint(-slack, slack))
    return Thing(shape, colour, cell, offset, radius, _near(rng, COLOURS[colour], 12))


def random_background(rng: random.Random) -> RGB:
    """A random dark or light grey, slightly tinted, as RGB."""
    grey = rng.choice((rng.randint(0, 70), rng.randint(185, 255)))
    return _near(rng, (grey, grey, grey), 8)


def _near(rng: random.Random, rgb: RGB, spread: int) -> RGB:
    red, green, blue = (min(255, max(0, value + rng.randint(-spread, spread))) for value in rgb)
    return red, green, blue


def _draw(draw: ImageDraw, thing: Thing, scale: float) -> None:
    x = scale * (thing.cell[0] * CELL + CELL // 2 + thing.offset[0])
    y = scale * (thing.cell[1] * CELL + CELL // 2 + thing.offset[1])
    r = scale * thing.radius
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=thing.rgb)
    elif thing.shape == "square":
        half = 0.85 * r
        draw.rectangle((x - half, y - half, x + half, y + half), fill=thing.rgb)
    elif thing.shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=thing.rgb)
    else:
        tips = [(r if k % 2 == 0 else 0.42 * r, -math.pi / 2 + k * math.pi / 5) for k in range(10)]
        draw.polygon([(x + d * math.cos(a), y + d * math.sin(a)) for d, a in tips], fill=thing.rgb)
