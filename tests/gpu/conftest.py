"""What GPU tests share: torch on CUDA, and the committed forecasts measured and set beside what was measured."""

from __future__ import annotations

import pytest

from pytest_qvl.vram.units import GiB, MiB

COLUMNS = ("phase", "allocated MiB: forecast", "measured", "reserved MiB: forecast", "measured")


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: no CUDA device is visible")
    torch.ones(1, device="cuda")
    return torch


@pytest.fixture(scope="module")
def room(torch):
    """Whether the GPU has free what a forecast needs, and at least so much."""

    def there_is(entry, at_least=0):
        needed = max(phase["reserved"] for phase in entry["phases"].values()) + GiB
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] >= max(needed, at_least)

    return there_is


@pytest.fixture(scope="module")
def measure_case(torch):
    def measured(case):
        from pytest_qvl.vram.forecast.validation.measured import measure
        from pytest_qvl.vram.meter import Meter

        return measure(case.request, Meter(), inference=case.inference)

    return measured


@pytest.fixture(scope="session")
def side_by_side():
    """Columns and rows: each phase as forecast and as measured."""

    def table(entry, measured):
        rows = []
        for usage in measured.phases:
            forecast = entry["phases"][usage.name]
            peak = measured.peak(usage.name)
            sizes = (forecast["allocated"], peak, forecast["reserved"], usage.reserved)
            rows.append((usage.name, *(size / MiB for size in sizes)))
        return COLUMNS, rows

    return table
