"""A forecast as JSON, sizes in bytes, as ``forecast.schema.json`` describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qvl.vram.forecast.changes import Change
    from pytest_qvl.vram.forecast.result import Forecast, Largest
    from pytest_qvl.vram.forecast.validation.rules_of_thumb import Rule

SCHEMA = "pytest-qvl/forecast/1"


def as_json(
    forecast: Forecast,
    assumed: tuple[str, ...] = (),
    largest: Largest | None = None,
    changes: list[Change] | None = None,
    rules: list[Rule] | None = None,
) -> dict[str, Any]:
    """Plain data.

    Args:
        forecast: To be written.
        assumed: What nobody asked for, as options.
        largest: What was found to fit still; left out if not searched for.
        changes: What would make it fit; left out if not searched for.
        rules: What others answer; left out if not asked.
    """
    data = {"schema": SCHEMA, **forecast.as_dict(), "assumed": list(assumed)}
    if largest is not None:
        data["largest"] = {
            "dimension": largest.dimension,
            "request": largest.forecast and largest.forecast.as_dict()["request"],
            "refused": largest.refused and largest.refused.as_dict()["request"],
            "bounded": largest.bounded,
        }
    if changes is not None:
        data["changes"] = [_change(change) for change in changes]
    if rules:
        data["rules"] = [vars(rule) for rule in rules]
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
