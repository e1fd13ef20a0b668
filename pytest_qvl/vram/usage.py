"""What one phase used of the device's memory, in four numbers that are always named."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pytest_qvl.evidence import Figure
from pytest_qvl.vram.units import GiB

Number = Literal["allocated", "reserved", "process", "fit"]
NUMBERS: tuple[Number, ...] = ("allocated", "reserved", "process", "fit")


@dataclass(frozen=True)
class Usage:
    """What one phase used; bytes and seconds. All numbers are 0 where nothing was measured.

    Attributes:
        name: The phase.
        seconds: From its start to its end with the device synchronised, without the meter's own work.
        reason: Why nothing was measured; empty when it was.
        allocated: Peak allocated.
        reserved: Peak reserved.
        process: What the process held at most: the highest reading, taken at borders of phases, or peak reserved
            with what the process was seen to hold beyond it, whichever is more; ``None`` where the driver does not
            tell.
        process_source: Where that comes from: ``process``, ``device`` (what the whole device gained), or
            empty.
        context: What the process holds beyond the allocator, or what the card to fit is known to need;
            ``None`` when neither is known.
        alive_allocated: Allocated when the phase began: what fixtures and earlier code left.
        alive_reserved: Reserved when the phase began.
        error: Type of the exception that ended it.
    """

    name: str
    seconds: float = 0.0
    reason: str = ""
    allocated: int = 0
    reserved: int = 0
    process: int | None = None
    process_source: str = ""
    context: int | None = None
    alive_allocated: int = 0
    alive_reserved: int = 0
    error: str = ""

    @property
    def measured(self) -> bool:
        """Whether the numbers mean anything."""
        return not self.reason

    @property
    def fit(self) -> int | None:
        """Peak reserved + context, what a card must have; ``None`` where the context is unknown."""
        return None if self.context is None else self.reserved + self.context

    def number(self, of: Number) -> int | None:
        """One of the numbers by name; ``None`` where it was not measured."""
        return getattr(self, of) if self.measured else None

    def missing(self, of: Number) -> str:
        """Why that number was not measured; empty when it was."""
        if self.number(of) is not None:
            return ""
        return self.reason or (
            f"the driver does not tell the memory of this process, which {of!r} needs (no NVML library, or a "
            "container without the 'utility' capability); 'reserved' needs no driver"
        )

    def figures(self) -> tuple[Figure, ...]:
        """The numbers in GiB and the seconds, for evidence and records."""
        numbers = [
            Figure(f"{self.name}: peak {of}", value / GiB, unit="GiB")
            for of in NUMBERS
            if (value := self.number(of)) is not None
        ]
        return (*numbers, Figure(f"{self.name}: time", self.seconds, unit="s"))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the record and for the way from an xdist worker; :class:`Usage` takes it back."""
        return asdict(self)
