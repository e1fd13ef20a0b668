"""The matrix as a figure: a row per fault, a column per check, the smoke test, and the reference after the damage."""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.matrix.results import faults_in_order
from pytest_qvl.figures import new_figure, write_svg

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qvl.faults.matrix.results import Result

SMOKE, AFTER = "smoke test", "reference after"
# Outcomes in the order of the legend: colour and meaning.
KINDS = {
    "named": ("#1b5e20", "the check that must catch it"),
    "caught": ("#81c784", "also caught"),
    "refused": ("#d4e157", "inputs refused in words"),
    "crashed": ("#9e9e9e", "exception from the model"),
    "cannot judge": ("#e0e0e0", "cannot judge (a skip)"),
    "pass": ("#ffffff", "not noticed"),
    "missed": ("#c62828", "missed by the check that must catch it"),
}
# Pixels: a cell, room for names of faults, for names of checks, and for the legend.
CELL, LEFT, TOP, RIGHT, BOTTOM = 14, 390, 165, 300, 12


def cells(result: Result) -> dict[str, dict[str, str]]:
    """What is drawn: for each fault that was made, by check (and the last columns) a key of :data:`KINDS`.

    The last column, where it was run: whether any check catches the fault that is in the reference too.
    """
    made, after = result.made, result.after
    table = {}
    # A record has them in the order in which they were done; the page goes family by family.
    for name, fault in faults_in_order().items():
        if name not in made or made[name].broken:
            continue
        row = made[name]
        kinds = dict(row.outcomes)
        if fault.check in kinds:
            kinds[fault.check] = "named" if row.named else "missed"
        table[name] = {**kinds, SMOKE: "pass" if row.smoke == "pass" else "caught"}
        if after:
            by = after[name]
            table[name][AFTER] = ("named" if row.check in by else "caught") if by else "missed"
    return table


def draw_matrix(result: Result, file: Path) -> None:
    """Write ``docs/faults.svg``.

    Raises:
        ValueError: The record has no fault that was made, rows of different checks, or an outcome without a colour.
    """
    table = cells(result)
    if not table:
        raise ValueError("the record has no fault that was made: there is nothing to draw")
    checks = list(next(iter(table.values())))
    other = next((name for name, row in table.items() if list(row) != checks), "")
    if other:
        raise ValueError(f"the record's rows are of different checks: run {other!r} again")
    unknown = {kind for row in table.values() for kind in row.values()} - KINDS.keys()
    if unknown:
        raise ValueError(f"no colour stands for the outcomes {', '.join(sorted(unknown))}")
    width, height = LEFT + CELL * len(checks) + RIGHT, TOP + CELL * len(table) + BOTTOM
    with new_figure(width, height) as figure:
        box = (LEFT / width, BOTTOM / height, CELL * len(checks) / width, CELL * len(table) / height)
        axes = figure.add_axes(box)
        axes.set(xlim=(0, len(checks)), ylim=(len(table), 0), autoscale_on=False)
        axes.set_axis_off()
        _draw_cells(axes, table, checks)
        _draw_names(axes, list(table), checks)
        _draw_legend(axes, len(checks))
        write_svg(figure, file, title="Deliberate faults by checks", data=table)


def _draw_cells(axes: Any, table: dict[str, dict[str, str]], checks: list[str]) -> None:
    """One pixel per cell, with lines between them."""
    colours = {kind: [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for kind, (colour, _) in KINDS.items()}
    image = [[colours[row[check]] for check in checks] for row in table.values()]
    axes.imshow(image, interpolation="none", aspect="auto", extent=(0, len(checks), len(table), 0))
    # One line with gaps for each direction: a line of its own each would take a hundred times the bytes.
    for lines, length, upright in ((len(checks), len(table), True), (len(table), len(checks), False)):
        at = [value for line in range(lines + 1) for value in (line, line, nan)]
        ends = [value for _ in range(lines + 1) for value in (0, length, nan)]
        axes.plot(*((at, ends) if upright else (ends, at)), color="#cfcfcf", linewidth=0.6, clip_on=False)


def _draw_names(axes: Any, faults: list[str], checks: list[str]) -> None:
    for row, name in enumerate(faults):
        axes.text(-0.4, row + 0.5, name, ha="right", va="center", fontsize=7.5)
    for column, check in enumerate(checks):
        axes.text(column + 0.5, -0.4, check, ha="left", va="bottom", rotation=60, rotation_mode="anchor", fontsize=7.5)
    known = faults_in_order()
    families = [known[name].family for name in faults]
    for family in dict.fromkeys(families):
        first, left = families.index(family), -LEFT / CELL + 0.4
        axes.text(left, first + 0.5, family, ha="left", va="center", fontsize=7.5, fontweight="bold")
        axes.plot((left, len(checks)), (first, first), color="#555555", linewidth=0.8, clip_on=False)


def _draw_legend(axes: Any, columns: int) -> None:
    from matplotlib.patches import Rectangle

    for number, (colour, words) in enumerate(KINDS.values()):
        x, y = columns + 1.5, 0.5 + 1.6 * number
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="#777777", linewidth=0.6, clip_on=False))
        axes.text(x + 1.5, y + 0.5, words, ha="left", va="center")
