"""What a planted mistake is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MISTAKES: dict[str, Mistake] = {}


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        name: Short, for a test id.
        source: The thread where it cost somebody a training, or the page that warns of it.
        check: The check that names it.
        words: What its sentence says of the cause.
        plant: Makes the broken training from the bench, a folder and the guard: a context that yields a trainer.
        guard: Arguments of the guard beside the default ones.
        since_5: Whether it is none before Transformers 5.
    """

    name: str
    source: str
    check: str
    words: tuple[str, ...]
    plant: Callable[[Any, Any, Any], Any]
    guard: dict[str, Any]
    since_5: bool = False


def mistake(
    name: str, *, source: str, check: str, words: tuple[str, ...], since_5: bool = False, **guard: Any
) -> Callable[[Any], Any]:
    """Register a generator function of bench, folder and guard that yields a broken trainer and tidies up after it."""

    def register(plant: Any) -> Any:
        assert name not in MISTAKES, name
        MISTAKES[name] = Mistake(name, source, check, words, contextmanager(plant), guard, since_5)
        return plant

    return register
