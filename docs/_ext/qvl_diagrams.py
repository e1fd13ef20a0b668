"""Flowcharts of fenced ``mermaid`` blocks (``a --> b``), drawn as SVG so that pages need no script and no network."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ARROW = re.compile(r"^\s*(\w+)\s*-->\s*(\w+)\s*$", re.MULTILINE)
HEIGHT, ROW, GAP, LETTER = 26, 38, 56, 7.0  # of a box, from row to row, between columns, of a letter: pixels


def columns(edges: list[tuple[str, str]]) -> list[list[str]]:
    """Names by the length of the longest way to them."""
    names = list(dict.fromkeys(name for edge in edges for name in edge))
    before = {name: [a for a, b in edges if b == name] for name in names}

    def depth(name: str) -> int:
        return 1 + max(map(depth, before[name]), default=-1)

    found: list[list[str]] = []
    for name in sorted(names, key=depth):
        found += [[]] * (depth(name) >= len(found))
        found[depth(name)] = [*found[depth(name)], name]
    for at, column in enumerate(found[1:], 1):  # near what they are made from
        rows = {name: row for earlier in found[:at] for row, name in enumerate(earlier)}
        column.sort(key=lambda name: sum(rows[a] for a in before[name]) / len(before[name]))
    return found


def drawn(edges: list[tuple[str, str]]) -> str:
    """The flowchart from left to right."""
    placed = columns(edges)
    widths = [max(len(name) for name in column) * LETTER + 18 for column in placed]
    tallest = max(map(len, placed))
    boxes: dict[str, tuple[float, float, float]] = {}
    left = 2.0
    for column, width in zip(placed, widths, strict=True):
        top = (tallest - len(column)) * ROW / 2 + 2
        boxes |= {name: (left, top + row * ROW, width) for row, name in enumerate(column)}
        left += width + GAP
    parts = [
        f'<svg class="qvl-diagram" role="img" aria-label="Which fixture is made from which" '
        f'viewBox="0 0 {left - GAP + 2:.0f} {tallest * ROW:.0f}" style="min-width: {left - GAP + 2:.0f}px">'
    ]
    for a, b in edges:
        x, y = boxes[a][0] + boxes[a][2], boxes[a][1] + HEIGHT / 2
        to_x, to_y = boxes[b][0], boxes[b][1] + HEIGHT / 2
        curve = f"C{x + GAP / 2:.0f} {y:.0f} {to_x - GAP / 2:.0f} {to_y:.0f} {to_x:.0f} {to_y:.0f}"
        tip = f"M{to_x - 6:.0f} {to_y - 3:.0f} L{to_x:.0f} {to_y:.0f} L{to_x - 6:.0f} {to_y + 3:.0f}"
        parts.append(f'<path d="M{x:.0f} {y:.0f} {curve} {tip}"/>')
    for name, (x, y, width) in boxes.items():
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}" rx="5"/>')
        parts.append(f'<text x="{x + width / 2:.0f}" y="{y + 17:.0f}">{name}</text>')
    return "\n".join([*parts, "</svg>"])


class Mermaid(SphinxDirective):
    """A fenced block of arrows."""

    has_content: ClassVar[bool] = True

    def run(self) -> list[nodes.Node]:
        """The drawing, in a box that scrolls sideways on a narrow screen."""
        svg = drawn(ARROW.findall("\n".join(self.content)))
        return [nodes.raw("", f'<div class="qvl-scroll">{svg}</div>', format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.add_directive("mermaid", Mermaid)
    return {"parallel_read_safe": True}
