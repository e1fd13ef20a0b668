"""An ended phase held to a limit, with who held the memory where it is above."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.evidence import Evidence, Judge
from pytest_qvl.vram.units import GiB, format_bytes
from pytest_qvl.vram.usage import NUMBERS, Number, Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qvl.vram.meter import Phase

_SHOWN_HOLDERS = 5
_SHOWN_PHASES = 8


def hold_limit(phase: Phase, limit: int, of: Number) -> Evidence:
    """Hold an ended phase to a limit.

    Args:
        phase: Ended; its number must have been measured.
        limit: Bytes.
        of: Which number the limit bounds.

    Raises:
        CheckFailed: Above the limit. Names phase, number, limit, the highest phase inside and the biggest
            holders.
    """
    usage = phase.usage
    value = usage.number(of) if usage else None
    if usage is None or value is None:
        raise ValueError(f"{phase.name!r} has no measured {of}, so it can be held to no limit")
    judge = Judge("limit_vram", f"{of} stays within {format_bytes(limit)}")
    judge.at_most(
        f"peak {of}",
        value / GiB,
        limit / GiB,
        unit="GiB",
        else_say=(
            f"{_describe_number(usage, of)} is {format_bytes(value - limit)} above the limit of "
            f"{format_bytes(limit)} in {usage.name}"
        ),
    )
    judge.note(f"{format_bytes(usage.alive_allocated)} were allocated before it began (fixtures and earlier code)")
    for line in describe_holders(phase) if value > limit else ():
        judge.note(line)
    inner = sorted(phase.inner, key=lambda u: -(u.number(of) or 0))[:_SHOWN_PHASES]
    rows = [*(_row(u.name, u) for u in inner), _row("altogether", usage)]
    return judge.verdict(("phase", "allocated", "reserved", "process", "fit", "seconds"), rows)


def describe_holders(phase: Phase) -> list[str]:
    """The biggest holders at the peak of an ended phase, one line each, or why they are not known."""
    if not phase.holders:
        return ["who held it was not recorded (CUDA was started inside, or the allocator keeps no history)"]
    lines = []
    for holder in phase.holders[:_SHOWN_HOLDERS]:
        blocks = f" in {holder.blocks} blocks" if holder.blocks > 1 else ""
        lines.append(f"at the peak {format_bytes(holder.size)}{blocks} held by {holder.where}")
    return lines


def _describe_number(usage: Usage, of: Number) -> str:
    value = format_bytes(usage.number(of) or 0)
    if of == "fit":
        context = format_bytes(usage.context or 0)
        return f"fit {value} (peak reserved {format_bytes(usage.reserved)} + context {context})"
    if of == "process":
        source = "by the driver's process list" if usage.process_source == "process" else "gained by the whole device"
        return f"process {value} ({source})"
    return f"peak {of} {value}"


def _row(name: str, usage: Usage) -> Sequence[str | float]:
    numbers = [usage.number(of) for of in NUMBERS]
    return (name, *("-" if n is None else format_bytes(n) for n in numbers), round(usage.seconds, 3))
