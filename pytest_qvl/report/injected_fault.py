"""The fault that ``--qvl-fault`` made, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class InjectedFault:
    """What was damaged on purpose.

    Attributes:
        name: What the command line calls it.
        summary: What is wrong, in one sentence.
        check: The check that must catch it.
        reference: When the reference was recorded, where the run chose that; empty otherwise.
    """

    name: str
    summary: str
    check: str
    reference: str = ""

    def verdict(self, noticed: Mapping[str, bool]) -> FaultVerdict:
        """What became of it.

        Args:
            noticed: Whether each check that gave a verdict on the damaged model failed.
        """
        also = tuple(check for check, did in noticed.items() if did and check != self.check)
        if self.check not in noticed:
            return FaultVerdict(self, "not run", also)
        return FaultVerdict(self, "caught" if noticed[self.check] else "missed", also)


@dataclass(frozen=True)
class FaultVerdict:
    """What became of a fault.

    Attributes:
        fault: What was damaged.
        state: Whether the check that must catch it did; *not run* where it gave no verdict on the damaged model.
        also: Other checks that noticed it.
    """

    fault: InjectedFault
    state: Literal["caught", "missed", "not run"]
    also: tuple[str, ...] = ()
