"""The timeline of one training step as a figure: live bytes stacked by kind, phases, the card's line."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from pytest_qvl.figures import new_figure, write_svg
from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.engine.trace import KINDS, Kind
from pytest_qvl.vram.units import GiB, format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qvl.vram.forecast.result import Forecast, Timeline, Verdict

# Pixels.
WIDTH, HEIGHT = 1100, 560
LEFT, RIGHT, TOP, BOTTOM = 70, 180, 70, 90
COLUMNS = 600
# Of what is drawn as an image, so that steps stay sharp on a dense screen.
IMAGE_SCALE = 2.0
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
_CARD_COLOUR = "#c1121f"
_GREY = "#555555"

Column = tuple[str, tuple[int, ...]]


def draw_timeline(forecast: Forecast, file: Path) -> None:
    """Write ``forecast.timeline`` as SVG.

    Raises:
        ValueError: The forecast has no training step.
    """
    if not forecast.timeline.live:
        raise ValueError("a timeline needs a training step: the forecast was made without an adapter (lora_r 0)")
    columns = _columns(forecast.timeline)
    peak = max((live for _, live in columns), key=sum)
    title, detail = _title(forecast), _detail(forecast, sum(peak))
    with new_figure(WIDTH, HEIGHT) as figure:
        inner = ((WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, *inner))
        _draw_areas(axes, columns, peak)
        _draw_phases(axes, [name for name, _ in columns])
        axes.set(xlim=(0, len(columns)), ylim=(0, _highest(forecast.verdict, sum(peak)) / GiB))
        if forecast.verdict is not None:
            _draw_card(axes, forecast.verdict)
        _dress(axes)
        figure.text(LEFT / WIDTH, 1 - 26 / HEIGHT, title, fontsize=12.5, fontweight="bold")
        figure.text(LEFT / WIDTH, 1 - 47 / HEIGHT, detail, color=_GREY)
        write_svg(figure, file, title=title, data=drawn(forecast), image_scale=IMAGE_SCALE)


def drawn(forecast: Forecast) -> dict[str, Any]:
    """What the figure stands for, as plain data: its words, the peak of each phase by kind, and the card.

    Without the columns: garbage that waits for Python's collector moves single ones of them from run to run.
    """
    verdict = forecast.verdict
    return {
        "words": [_title(forecast), _detail(forecast, max(map(sum, forecast.timeline.live)))],
        "phases": {phase.name: phase.by_kind for phase in forecast.phases if phase.name in phases.TRAINING},
        "card": None if verdict is None else [verdict.card.title, verdict.available],
    }


def _title(forecast: Forecast) -> str:
    return f"{forecast.label}: one training step, {forecast.sequence:,} tokens x batch {forecast.request.batch}"


def _detail(forecast: Forecast, peak: int) -> str:
    request = forecast.request
    height, width = request.image
    return (
        f"{request.images} x {height}x{width} pixels per sample, LoRA r={request.lora_r}, "
        f"{'with' if request.gradient_checkpointing else 'without'} gradient checkpointing, "
        f"{request.optimizer}; peak {format_bytes(peak)} allocated"
    )


def _columns(timeline: Timeline) -> list[Column]:
    """:data:`COLUMNS` points along the bytes allocated and freed so far, each the highest of its stretch.

    Bytes moved are a rough stand-in for time: by count of events, the many small allocations of the vision
    windows would fill the figure and the loss would be a hair.
    """
    points = list(zip(timeline.phases, timeline.live, strict=True))
    totals = [sum(live) for live in timeline.live]
    moved = [0.0]
    for before, after in pairwise(totals):
        moved.append(moved[-1] + abs(after - before))
    columns: list[Column] = []
    at = 0
    for column in range(COLUMNS):
        last = at
        while last + 1 < len(points) and moved[last + 1] <= moved[-1] * (column + 1) / COLUMNS:
            last += 1
        columns.append(points[max(range(at, last + 1), key=totals.__getitem__)])
        at = min(last + 1, len(points) - 1) if last > at else last
    return columns


def _highest(verdict: Verdict | None, peak: int) -> float:
    """Bytes at the upper edge: with the card's line, unless that is far above."""
    near = verdict is not None and verdict.available < 1.6 * peak
    return 1.04 * max(peak, verdict.available if verdict is not None and near else 0)


def _draw_areas(axes: Any, columns: list[Column], peak: tuple[int, ...]) -> None:
    """Live bytes stacked by kind, as an image (a thousand corners for each kind otherwise), and the legend."""
    edges = range(len(columns) + 1)
    below = [0.0] * (len(columns) + 1)
    handles = []
    for index, (kind, at_peak) in enumerate(zip(KINDS, peak, strict=True)):
        sizes = [live[index] / GiB for _, live in columns]
        if not any(sizes):
            continue
        above = [base + size for base, size in zip(below, [*sizes, sizes[-1]], strict=True)]
        label = f"{kind}\n{format_bytes(at_peak)}"
        handles.append(
            axes.fill_between(
                edges, below, above, step="post", color=COLOURS[kind], linewidth=0, label=label, rasterized=True
            )
        )
        below = above
    axes.legend(
        handles=handles[::-1],
        title="at the peak",
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        labelspacing=0.9,
        handlelength=1.0,
        handleheight=1.0,
    )


def _draw_phases(axes: Any, names: list[str]) -> None:
    """A dashed line where a phase begins and its name below; aslant where there is no room for a level one."""
    start = 0
    for full, group in groupby(names):
        end = start + sum(1 for _ in group)
        name = full.removeprefix("train: ")
        if start:
            axes.axvline(start, ymin=-0.015, color="#333333", linewidth=0.8, linestyle=(0, (2, 3)), clip_on=False)
        room = (end - start) * (WIDTH - LEFT - RIGHT) / len(names) > 7 * len(name)
        place = {"ha": "center", "rotation": 0} if room else {"ha": "left", "rotation": -40, "rotation_mode": "anchor"}
        axes.text(
            (start + end) / 2, -0.025, name, va="top", transform=axes.get_xaxis_transform(), fontsize=9.5, **place
        )
        start = end


def _draw_card(axes: Any, verdict: Verdict) -> None:
    label = f"{verdict.card.title}: {format_bytes(verdict.available)} for the allocator"
    style = {"ha": "right", "va": "bottom", "color": _CARD_COLOUR}
    top = axes.get_ylim()[1]
    if verdict.available / GiB > top:
        axes.text(axes.get_xlim()[1], top, f"{label} (above)", **style)
        return
    axes.axhline(verdict.available / GiB, color=_CARD_COLOUR, linewidth=1.5)
    axes.annotate(label, (1, verdict.available / GiB), (0, 3), ("axes fraction", "data"), "offset points", **style)


def _dress(axes: Any) -> None:
    """Axis titles, a faint grid, and no more lines than needed."""
    axes.set_ylabel("GiB in use (torch's allocator)", color=_GREY)
    axes.set_xlabel("allocations and frees in order, each as wide as its bytes (not time)", color=_GREY, labelpad=42)
    axes.set_xticks([])
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, colors=_GREY)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
