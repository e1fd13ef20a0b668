"""What a forecast says. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pytest_qvl.vram.forecast import phases as names

if TYPE_CHECKING:
    from pytest_qvl.vram.cards import Card
    from pytest_qvl.vram.forecast.engine.trace import Failure, PhaseBytes
    from pytest_qvl.vram.forecast.request import Request

Dimension = Literal["image", "batch"]


@dataclass(frozen=True)
class Timeline:
    """Live bytes over one training step, in the order of allocation events (not of time).

    Attributes:
        phases: Phase of every point.
        live: Live bytes by kind of every point, in the order of :data:`~pytest_qvl.vram.forecast.engine.trace.KINDS`.
    """

    phases: tuple[str, ...] = ()
    live: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether it fits a card.

    Attributes:
        card: The card.
        available: Bytes left for torch's allocator: what torch sees of the card less the CUDA context.
        reserved: Most bytes the allocator would reserve if nothing stopped it.
        failure: Where it runs out of memory on this card, cached segments given back first; ``None`` if it
            fits.
    """

    card: Card
    available: int
    reserved: int
    failure: Failure | None

    @property
    def fits(self) -> bool:
        """Whether every phase runs on the card."""
        return self.failure is None

    @property
    def tight(self) -> bool:
        """Whether it fits only because the allocator gives cached segments back in time."""
        return self.fits and self.reserved > self.available


@dataclass(frozen=True)
class Forecast:
    """The device memory of one configuration, phase by phase, in bytes.

    Attributes:
        request: What was asked.
        label: The model's name.
        visual_tokens: Visual tokens per sample, of the longest where they differ.
        sequence: All tokens per sample, of the longest where they differ.
        resident: Allocated once the model is ready, before the adapter.
        phases: Every phase, in order.
        timeline: Live bytes over one training step; empty without training.
        verdict: The answer for a card, if one was named.
        linear_attention: Whether the model has some, so that ``request.linear_attention`` decides memory.
    """

    request: Request
    label: str
    visual_tokens: int
    sequence: int
    resident: int
    phases: tuple[PhaseBytes, ...]
    timeline: Timeline = field(default=Timeline(), repr=False)
    verdict: Verdict | None = None
    linear_attention: bool = False

    def phase(self, name: str) -> PhaseBytes:
        """The phase called ``name`` (see :mod:`pytest_qvl.vram.forecast.phases`).

        Raises:
            KeyError: This forecast has no such phase.
        """
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(f"no phase {name!r}; there are {', '.join(p.name for p in self.phases)}")

    @property
    def peak(self) -> PhaseBytes:
        """The phase with the most allocated bytes."""
        return max(self.phases, key=lambda phase: phase.peak_allocated)

    @property
    def training_peak(self) -> PhaseBytes | None:
        """The phase of the training step with the most allocated bytes."""
        training = [phase for phase in self.phases if phase.name in names.TRAINING]
        return max(training, key=lambda phase: phase.peak_allocated, default=None)

    @property
    def peak_reserved(self) -> int:
        """Most bytes the allocator reserves in any phase."""
        return max(phase.peak_reserved for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, all sizes in bytes; the timeline is left out."""
        verdict = self.verdict
        return {
            "model": self.label,
            "request": asdict(self.request),
            "visual_tokens": self.visual_tokens,
            "sequence": self.sequence,
            "resident": self.resident,
            "phases": [asdict(phase) for phase in self.phases],
            "peak": {
                "phase": self.peak.name,
                "allocated": self.peak.peak_allocated,
                "reserved": self.peak_reserved,
            },
            "card": None
            if verdict is None
            else {
                **asdict(verdict.card),
                "context_bytes": verdict.card.context_bytes,
                "available": verdict.available,
                "fits": verdict.fits,
                "failure": None if verdict.failure is None else asdict(verdict.failure),
            },
        }


@dataclass(frozen=True)
class Refused:
    """What was tried and does not fit.

    Attributes:
        request: All of it.
        visual_tokens: Visual tokens per sample.
    """

    request: Request
    visual_tokens: int


@dataclass(frozen=True)
class Largest:
    """The largest image or batch found to fit the card.

    Attributes:
        dimension: What was varied.
        forecast: The forecast that confirms it; ``None`` if not even the smallest fits.
        bounded: Whether a larger one was impossible for another reason (the processor shrinks every larger
            image).
        refused: The smallest one tried that does not fit, if any.
    """

    dimension: Dimension
    forecast: Forecast | None
    bounded: bool = False
    refused: Refused | None = None
