"""Who held the memory at the moment of the peak, worked out from the allocation history."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_qvl.vram.allocator import Event

_NOWHERE = "code without a recorded line (C++, a backward pass)"


@dataclass(frozen=True)
class Holder:
    """Memory that one line of code held.

    Attributes:
        where: ``package/module.py:12 function``, or what else is known of it.
        size: Bytes.
        blocks: How many blocks.
    """

    where: str
    size: int
    blocks: int


def holders_at_peak(events: Iterable[Event], alive_before: int, before: str) -> tuple[Holder, ...]:
    """The holders at the highest point of the history, biggest first.

    Args:
        events: The history of the measured scope, oldest first.
        alive_before: Bytes allocated when the scope began.
        before: How to name those bytes.
    """
    changes = list(events)
    levels = list(itertools.accumulate((e.size if e.action == "take" else -e.size for e in changes), initial=0))
    until = levels.index(max(levels))
    alive: dict[int, Event] = {}
    for event in changes[:until]:
        if event.action == "take":
            alive[event.address] = event
        elif event.address in alive:
            del alive[event.address]
        else:
            alive_before -= event.size
    sizes: dict[str, list[int]] = defaultdict(list)
    for event in alive.values():
        sizes[event.where or _NOWHERE].append(event.size)
    found = [Holder(where, sum(blocks), len(blocks)) for where, blocks in sizes.items()]
    if alive_before > 0:
        found.append(Holder(before, alive_before, 1))
    return tuple(sorted(found, key=lambda holder: -holder.size))
