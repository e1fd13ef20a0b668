"""What a ``-m`` expression asks for: whether whoever started this run wants GPUs."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

    from pytest_qvl.options import Settings


def insists_on(mark: str, expression: str) -> bool:
    """Whether a ``-m`` expression selects only tests that carry ``mark``.

    ``gpu``, ``gpu and not slow`` and ``not (slow or not gpu)`` do; ``not gpu``, ``gpu or slow`` and nothing
    do not, nor does an expression that pytest will refuse a moment later.
    """
    from _pytest.mark.expression import Expression

    if mark not in expression:
        return False
    try:
        compiled = Expression.compile(expression)
    except SyntaxError:
        return False
    others = sorted(set(re.findall(r"[\w:+\-.\[\]\\/]+", expression)) - {mark, "and", "or", "not"})
    # Every combination of a handful of names; of more (nobody types that) none, each alone, and all.
    sizes = range(len(others) + 1) if len(others) <= 8 else (0, 1, len(others))
    worlds = [set(world) for size in sizes for world in itertools.combinations(others, size)]

    def selects(present: set[str]) -> bool:
        return compiled.evaluate(lambda name, /, **_: name in present)

    return any(selects(world | {mark}) for world in worlds) and not any(selects(world) for world in worlds)


def asks_for_gpus(config: pytest.Config, settings: Settings) -> bool:
    """Whether whoever started this run asked for GPUs: by ``-m gpu``, by requiring one, or by the device."""
    insists = insists_on("gpu", config.getoption("markexpr", "") or "")
    return insists or bool(settings.require_gpu) or settings.device == "cuda"
