"""The timeline of one training step as an SVG: live bytes stacked by kind, phases, the card's line.

Standard library only: a few polygons need no plotting library.
"""

from __future__ import annotations

from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from pytest_qvl.vram.forecast.engine.trace import KINDS, Kind
from pytest_qvl.vram.units import GiB, format_bytes

if TYPE_CHECKING:
    from pytest_qvl.vram.forecast.result import Forecast, Timeline

WIDTH, HEIGHT = 1100, 560
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 64, 76
COLUMNS = 600
COLOURS: dict[Kind, str] = {
    "weights": "#4e5d6c",
    "adapters": "#2a9d8f",
    "optimizer": "#8ab17d",
    "gradients": "#e9c46a",
    "cache": "#b5838d",
    "inputs": "#adb5bd",
    "activations": "#457b9d",
    "logits": "#e76f51",
    "workspace": "#6d597a",
}


def draw_timeline(forecast: Forecast) -> str:
    """An SVG document of ``forecast.timeline``.

    Raises:
        ValueError: The forecast has no training step.
    """
    if not forecast.timeline.live:
        raise ValueError("a timeline needs a training step: the forecast was made without an adapter (lora_r 0)")
    columns = _columns(forecast.timeline)
    verdict = forecast.verdict
    top = max(sum(live) for _, live in columns)
    shown = max(top, verdict.available if verdict and verdict.available < 1.6 * top else 0) * 1.04
    plot = _Plot(len(columns), shown)
    body = [
        *_axis(plot, shown),
        *_areas(plot, [live for _, live in columns]),
        *_phase_marks(plot, [phase for phase, _ in columns]),
        *_legend(columns),
    ]
    if verdict is not None:
        body += _card_line(plot, verdict.card.title, verdict.available, shown)
    height, width = forecast.request.image
    title = f"{forecast.label}: one training step, {forecast.sequence:,} tokens x batch {forecast.request.batch}"
    detail = (
        f"{forecast.request.images} x {height}x{width} pixels per sample, LoRA r={forecast.request.lora_r}, "
        f"{'with' if forecast.request.gradient_checkpointing else 'without'} gradient checkpointing, "
        f"{forecast.request.optimizer}; peak {format_bytes(top)} allocated"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="13" role="img" aria-label="{escape(title)}">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n'
        f'<text x="{LEFT}" y="26" font-size="17" font-weight="600">{escape(title)}</text>\n'
        f'<text x="{LEFT}" y="46" fill="#555">{escape(detail)}</text>\n' + "\n".join(body) + "\n</svg>\n"
    )


class _Plot:
    def __init__(self, columns: int, highest: float) -> None:
        self._columns, self._highest = columns, highest

    def x(self, column: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * column / self._columns

    def y(self, size: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * size / self._highest


def _columns(timeline: Timeline) -> list[tuple[str, tuple[int, ...]]]:
    """:data:`COLUMNS` points along the bytes allocated and freed so far, each the highest of its stretch.

    Bytes moved are a rough stand-in for time: by count of events, the many small allocations of the vision
    windows would fill the figure and the loss would be a hair.
    """
    points = list(zip(timeline.phases, timeline.live, strict=True))
    totals = [sum(live) for live in timeline.live]
    moved = [0.0]
    for before, after in pairwise(totals):
        moved.append(moved[-1] + abs(after - before))
    columns: list[tuple[str, tuple[int, ...]]] = []
    at = 0
    for column in range(COLUMNS):
        last = at
        while last + 1 < len(points) and moved[last + 1] <= moved[-1] * (column + 1) / COLUMNS:
            last += 1
        columns.append(points[max(range(at, last + 1), key=totals.__getitem__)])
        at = min(last + 1, len(points) - 1) if last > at else last
    return columns


def _areas(plot: _Plot, columns: list[tuple[int, ...]]) -> list[str]:
    areas = []
    below = [0] * len(columns)
    for index, kind in enumerate(KINDS):
        above = [base + live[index] for base, live in zip(below, columns, strict=True)]
        if above != below:
            outline = [*_steps(plot, above), *reversed(_steps(plot, below))]
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
            areas.append(f'<polygon points="{points}" fill="{COLOURS[kind]}"><title>{kind}</title></polygon>')
        below = above
    return areas


def _steps(plot: _Plot, sizes: list[int]) -> list[tuple[float, float]]:
    corners: list[tuple[float, float]] = []
    for column, size in enumerate(sizes):
        right = (plot.x(column + 1), plot.y(size))
        if corners and corners[-1][1] == right[1]:
            corners[-1] = right
        else:
            corners += [(plot.x(column), plot.y(size)), right]
    return corners


def _axis(plot: _Plot, shown: float) -> list[str]:
    step = next(GiB * s for s in (0.25, 0.5, 1, 2, 5, 10, 20, 50) if shown / (GiB * s) <= 12)
    lines = []
    for tick in range(int(shown / step) + 1):
        y = plot.y(tick * step)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        label = f"{tick * step / GiB:g}"
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{label}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    lines.append(
        f'<text transform="translate(20 {middle:.0f}) rotate(-90)" text-anchor="middle" fill="#555">'
        "GiB in use (torch's allocator)</text>"
    )
    lines.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 14}" text-anchor="middle" fill="#555">'
        "allocations and frees in order, each as wide as its bytes (not time)</text>"
    )
    return lines


def _phase_marks(plot: _Plot, phases: list[str]) -> list[str]:
    marks = []
    start = 0
    for column in range(1, len(phases) + 1):
        if column == len(phases) or phases[column] != phases[start]:
            left, right = plot.x(start), plot.x(column)
            name = phases[start].removeprefix("train: ")
            if start:
                marks.append(
                    f'<line x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM + 6}" '
                    'stroke="#333" stroke-dasharray="2 4"/>'
                )
            # Narrow phases have no room for a level label.
            room = right - left > 7 * len(name)
            place = f"{(left + right) / 2:.1f} {HEIGHT - BOTTOM + (22 if room else 10)}"
            turn = 'text-anchor="middle"' if room else 'text-anchor="start"'
            rotate = "" if room else " rotate(40)"
            marks.append(f'<text transform="translate({place}){rotate}" {turn}>{escape(name)}</text>')
            start = column
    return marks


def _card_line(plot: _Plot, title: str, available: int, shown: float) -> list[str]:
    label = f"{escape(title)}: {format_bytes(available)} for the allocator"
    if available > shown:
        return [f'<text x="{WIDTH - RIGHT}" y="{TOP - 4}" text-anchor="end" fill="#c1121f">{label} (above)</text>']
    y = plot.y(available)
    return [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c1121f" stroke-width="2"/>',
        f'<text x="{WIDTH - RIGHT}" y="{y - 6:.1f}" text-anchor="end" fill="#c1121f">{label}</text>',
    ]


def _legend(columns: list[tuple[str, tuple[int, ...]]]) -> list[str]:
    _, peak = max(columns, key=lambda column: sum(column[1]))
    x = WIDTH - RIGHT + 18
    rows = [f'<text x="{x}" y="{TOP + 6}" fill="#555">at the peak</text>']
    shown = [
        (kind, size) for kind, size in zip(KINDS, peak, strict=True) if any(c[1][KINDS.index(kind)] for c in columns)
    ]
    for row, (kind, size) in enumerate(reversed(shown)):
        y = TOP + 18 + 36 * row
        rows.append(f'<rect x="{x}" y="{y}" width="13" height="13" fill="{COLOURS[kind]}"/>')
        rows.append(f'<text x="{x + 20}" y="{y + 11}">{kind}</text>')
        rows.append(f'<text x="{x + 20}" y="{y + 26}" fill="#555" font-size="12">{format_bytes(size)}</text>')
    return rows
