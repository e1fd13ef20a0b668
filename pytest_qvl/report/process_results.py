"""What one process that ran tests says of its session: verdicts, limits, the GPU that it leased, its VRAM."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pytest_qvl.report.report_data import LimitOutcome
from pytest_qvl.vram.usage import Usage


@dataclass(frozen=True)
class Verdict:
    """One process's verdict on its session.

    Attributes:
        name: What is judged, ``leak``.
        state: As in the summary of the suite.
        text: What was found; the first line says it all.
        process: The backend's process or the xdist worker; empty where there is only one process.
    """

    name: str
    state: Literal["kept", "BROKEN", "not judged"]
    text: str
    process: str = ""

    def __str__(self) -> str:
        return f"{self.process}: {self.text}" if self.process else self.text


@dataclass(frozen=True)
class LeasedGpu:
    """The GPU that a process had to itself.

    Attributes:
        gpu: Name and UUID.
        name: Of the model of card.
        index: As the driver counts.
        waited: Seconds until the lease was had.
        busy: Who held memory of it when it was leased; empty where nobody did.
    """

    gpu: str
    name: str
    index: int
    waited: float
    busy: str


@dataclass(frozen=True)
class ProcessResults:
    """What one process found out about its session, beyond its tests.

    Attributes:
        session: Peak VRAM of the whole session.
        phases: Peak VRAM of each phase that was measured inside it, in order.
        lease: Its GPU; ``None`` for a process that leased none.
        verdicts: On its session.
        limits: What became of limits on the session's VRAM.
        process: The backend's process or the xdist worker; empty for the one that was started.
    """

    session: Usage
    phases: tuple[Usage, ...] = ()
    lease: LeasedGpu | None = None
    verdicts: tuple[Verdict, ...] = ()
    limits: tuple[LimitOutcome, ...] = ()
    process: str = ""

    def started_by(self, process: str) -> ProcessResults:
        """The same, as seen by the one that started ``process``, in which or below which it was found."""
        name = " ".join(filter(None, (process, self.process)))
        return replace(self, process=name, verdicts=tuple(replace(v, process=name) for v in self.verdicts))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as JSON and execnet take it."""
        parts = {name: [asdict(one) for one in getattr(self, name)] for name in ("phases", "verdicts", "limits")}
        lease = None if self.lease is None else asdict(self.lease)
        return {"session": asdict(self.session), **parts, "lease": lease, "process": self.process}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ProcessResults:
        """Inverse of :meth:`as_dict`."""
        return cls(
            Usage(**data["session"]),
            tuple(Usage(**one) for one in data["phases"]),
            None if data["lease"] is None else LeasedGpu(**data["lease"]),
            tuple(Verdict(**one) for one in data["verdicts"]),
            tuple(LimitOutcome(**one) for one in data["limits"]),
            data["process"],
        )
