"""Forecasts of a dataset's batches: the usual ones beside the worst."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.vram.units import GiB

if TYPE_CHECKING:
    from pytest_qvl.vram.forecast.dataset import Batch, Dataset
    from pytest_qvl.vram.forecast.result import Forecast
    from pytest_qvl.vram.forecast.run import Forecaster

_SHARES = {"median": 0.5, "95 %": 0.95, "largest": 1.0}


@dataclass(frozen=True)
class Batches:
    """A dataset with forecasts of its batches.

    Attributes:
        dataset: All samples.
        forecasts: Of the median batch, the one that 95 % do not exceed, and the worst.
    """

    dataset: Dataset
    forecasts: tuple[tuple[Batch, Forecast], ...]


def forecast_batches(dataset: Dataset, worst: Forecast, forecaster: Forecaster) -> Batches:
    """Forecasts of the usual batches, beside the one of the worst that was made.

    Args:
        dataset: All samples.
        worst: Of the dataset's worst batch.
        forecaster: Made it.
    """
    found = []
    for batch in dataset.batches(worst.request.batch):
        request = replace(worst.request, samples=batch.samples)
        same = request == worst.request
        found.append((batch, worst if same else forecaster.forecast(request, inference=False, timeline=False)))
    return Batches(dataset, tuple(found))


def render_dataset(batches: Batches) -> str:
    """Tokens of samples and the peak of each batch."""
    dataset = batches.dataset
    longest = max(dataset.rows, key=lambda row: row.tokens)
    lines = [f"dataset {dataset.name}: {len(dataset.rows):,} samples; longest: {longest.name}"]
    for what, of in _NUMBERS.items():
        values = (f"{name} {dataset.quantile(share, of):,}" for name, share in _SHARES.items())
        lines.append(f"  {what} of a sample: {', '.join(values)}")
    for batch, forecast in batches.forecasts:
        size, length = len(batch.rows), batch.longest.tokens
        said = f"{forecast.peak.peak_allocated / GiB:.2f} GiB allocated, {forecast.peak_reserved / GiB:.2f} reserved"
        fits = "" if forecast.verdict is None else ", fits" if forecast.verdict.fits else ", DOES NOT FIT"
        lines.append(f"  {batch.which} batch: {size} x {length:,} tokens, padding included: {said}{fits}")
    lines.append("everything else is said of the worst batch, which any shuffled epoch may draw")
    return "\n".join(lines)


_NUMBERS = {
    "tokens": lambda row: row.tokens,
    "visual tokens": lambda row: row.visual,
    "text tokens": lambda row: row.sample.tokens,
}


def dataset_json(batches: Batches) -> dict[str, Any]:
    """Plain data, sizes in bytes."""
    dataset = batches.dataset
    return {
        "name": dataset.name,
        "samples": len(dataset.rows),
        "tokens": {
            what: {name: dataset.quantile(share, of) for name, share in _SHARES.items()}
            for what, of in _NUMBERS.items()
        },
        "batches": [
            {
                "which": batch.which,
                "rows": [row.name for row in batch.rows],
                "padded_tokens": batch.padded,
                "allocated": forecast.peak.peak_allocated,
                "reserved": forecast.peak_reserved,
                "fits": None if forecast.verdict is None else forecast.verdict.fits,
            }
            for batch, forecast in batches.forecasts
        ],
    }
