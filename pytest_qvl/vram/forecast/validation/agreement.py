"""How near a forecast has to be to what was measured. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.vram.units import MiB, format_bytes

if TYPE_CHECKING:
    from pytest_qvl.evidence import Judge

# Of the whole peak. The weights alone are most of it, so by itself it would let a forecast of the weights pass.
PEAK_SHARE, PEAK_FLOOR = 0.03, 64 * MiB
# Of the peak less what was resident before: activations, logits, gradients, caches, optimizer.
ABOVE_SHARE, ABOVE_FLOOR = 0.10, 32 * MiB


@dataclass(frozen=True)
class Comparison:
    """One phase, forecast and measured; all in bytes of peak allocated.

    Attributes:
        phase: What both sides call it.
        forecast: Peak by the forecast.
        measured: Peak by the meter.
        forecast_resident: What the forecast has resident before the first phase.
        measured_resident: What was resident.
        workspace: How much of the forecast are workspaces of libraries, the same for every model.
    """

    phase: str
    forecast: int
    measured: int
    forecast_resident: int
    measured_resident: int
    workspace: int = 0

    @property
    def error(self) -> int:
        """Forecast peak less measured peak, in bytes."""
        return self.forecast - self.measured

    @property
    def allowed(self) -> int:
        """How far the forecast may be off the peak, in bytes."""
        return max(int(PEAK_SHARE * self.measured), PEAK_FLOOR)

    @property
    def above_measured(self) -> int:
        """Measured peak less what was resident."""
        return self.measured - self.measured_resident

    @property
    def above_error(self) -> int:
        """Forecast less measured, each above its own resident bytes."""
        return (self.forecast - self.forecast_resident) - self.above_measured

    @property
    def above_allowed(self) -> int:
        """How far off the peak above what was resident may be."""
        return max(int(ABOVE_SHARE * self.above_measured), ABOVE_FLOOR)

    @property
    def holds(self) -> bool:
        """Whether both are within their limits."""
        return abs(self.error) <= self.allowed and abs(self.above_error) <= self.above_allowed

    @property
    def telling(self) -> bool:
        """Whether a forecast of weights and library workspaces alone would be refused here."""
        return self.above_measured - self.workspace > self.above_allowed


def hold(judge: Judge, comparison: Comparison) -> None:
    """Hold one phase to both limits."""
    c = comparison
    judge.at_most(
        f"{c.phase}: forecast off the peak by",
        abs(c.error) / MiB,
        c.allowed / MiB,
        unit="MiB",
        else_say=(
            f"{c.phase}: forecast {format_bytes(c.forecast)}, measured {format_bytes(c.measured)} at the peak: "
            f"{format_bytes(abs(c.error))} too {'much' if c.error > 0 else 'little'}"
        ),
    )
    judge.at_most(
        f"{c.phase}: forecast off the peak above what is resident by",
        abs(c.above_error) / MiB,
        c.above_allowed / MiB,
        unit="MiB",
        else_say=(
            f"{c.phase}: above what is resident, forecast {format_bytes(c.forecast - c.forecast_resident)}, measured "
            f"{format_bytes(c.above_measured)}: {format_bytes(abs(c.above_error))} too "
            f"{'much' if c.above_error > 0 else 'little'}"
        ),
    )
