"""A guard for training runs: one callback that stops a broken run at its first step, with the evidence.

    from pytest_qvl.training import Guard

    Trainer(..., callbacks=[Guard()])

Importing this package imports nothing heavy; :class:`Guard` imports what a script that trains has imported anyway.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qvl.training.findings import Finding as Finding
    from pytest_qvl.training.findings import GuardError as GuardError
    from pytest_qvl.training.findings import GuardWarning as GuardWarning
    from pytest_qvl.training.guard import Guard as Guard

_HOMES = {"Guard": "guard", "Finding": "findings", "GuardError": "findings", "GuardWarning": "findings"}
__all__ = ["Finding", "Guard", "GuardError", "GuardWarning"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
