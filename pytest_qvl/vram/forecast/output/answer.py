"""All that one run of ``pytest-qvl forecast`` has to say, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.vram.forecast.changes import Change, render_changes
from pytest_qvl.vram.forecast.output.of_dataset import Batches, dataset_json, render_dataset
from pytest_qvl.vram.forecast.output.text import render
from pytest_qvl.vram.forecast.validation.rules_of_thumb import Rule, render_rules_of_thumb

if TYPE_CHECKING:
    from pytest_qvl.vram.forecast.result import Forecast, Largest

SCHEMA = "pytest-qvl/forecast/1"


@dataclass(frozen=True)
class Answer:
    """A forecast with what was asked beside it; ``None`` for what was not.

    Attributes:
        forecast: Of what was asked, or of a dataset's worst batch.
        assumed: Settings that decide memory and that nobody named, as options.
        batches: A dataset's.
        largest: What still fits.
        changes: What would make it fit.
        rules: What others answer.
    """

    forecast: Forecast
    assumed: tuple[str, ...] = ()
    batches: Batches | None = None
    largest: Largest | None = None
    changes: list[Change] | None = None
    rules: list[Rule] | None = None

    def as_text(self) -> str:
        """For the terminal."""
        parts = [render(self.forecast, self.largest, self.assumed)]
        if self.batches is not None:
            parts.append(render_dataset(self.batches))
        if self.changes is not None:
            parts.append(render_changes(self.changes))
        if self.rules:
            parts.append(render_rules_of_thumb(self.rules, self.forecast))
        return "\n\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Plain data, sizes in bytes, as ``forecast.schema.json`` describes it."""
        data = {"schema": SCHEMA, **self.forecast.as_dict(), "assumed": list(self.assumed)}
        if self.batches is not None:
            data["dataset"] = dataset_json(self.batches)
        if self.largest is not None:
            data["largest"] = {
                "dimension": self.largest.dimension,
                "request": self.largest.forecast and self.largest.forecast.as_dict()["request"],
                "refused": self.largest.refused and asdict(self.largest.refused.request),
                "bounded": self.largest.bounded,
            }
        if self.changes is not None:
            data["changes"] = [_change(change) for change in self.changes]
        if self.rules:
            data["rules"] = [vars(rule) for rule in self.rules]
        return data


def _change(change: Change) -> dict[str, Any]:
    return {
        "options": change.options,
        "cost": change.cost,
        "request": change.forecast.as_dict()["request"],
        "allocated": change.forecast.peak.peak_allocated,
        "reserved": change.forecast.peak_reserved,
        "fits": change.fits,
    }
