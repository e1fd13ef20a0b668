"""The committed forecasts (docs/records/forecast-predictions.json) against this GPU; ``--qvl-record`` keeps the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qvl.evidence import CannotJudge, Judge
from pytest_qvl.vram.cap import pinned_attention
from pytest_qvl.vram.forecast.agreement import Comparison, hold
from pytest_qvl.vram.forecast.predictions import NOT_COMPARED, Case, read_predictions
from pytest_qvl.vram.meter import Meter
from pytest_qvl.vram.units import GiB, MiB, format_bytes

pytestmark = pytest.mark.gpu
PREDICTIONS = Path(__file__).parents[2] / "docs" / "records" / "forecast-predictions.json"
ENTRIES = [e for e in read_predictions(PREDICTIONS) if e["card"] is None and not e["too_large_to_measure"]]
COLUMNS = ("phase", "allocated MiB: forecast", "measured", "reserved MiB: forecast", "measured")


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: no CUDA device is visible")
    torch.ones(1, device="cuda")
    return torch


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_what_was_predicted_is_measured(torch, entry):
    case = Case.from_dict(entry)
    found, expected = torch.cuda.get_device_capability(), case.request.capability
    if found != expected:
        raise CannotJudge(f"predicted for compute capability {expected}, and this GPU has {found}")
    needed = max(phase["reserved"] for phase in entry["phases"].values()) + GiB
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        raise CannotJudge(f"needs {format_bytes(needed)} of free memory")
    with pinned_attention(found):
        measured = measure_case(case)
    judge = Judge("forecast_case", f"the forecast made before for {case.name}")
    judge.report("resident", measured.resident / GiB, unit="GiB")
    judge.report("resident by the forecast", entry["resident"] / GiB, unit="GiB")
    rows = []
    for usage in measured.phases:
        predicted = entry["phases"][usage.name]
        peak = measured.peak(usage.name)
        rows.append((usage.name, predicted["allocated"] / MiB, peak / MiB))
        rows[-1] += (predicted["reserved"] / MiB, usage.reserved / MiB)
        if usage.name not in NOT_COMPARED:
            hold(judge, Comparison(usage.name, predicted["allocated"], peak, entry["resident"], measured.resident))
    judge.verdict(COLUMNS, rows)


def measure_case(case):
    from pytest_qvl.vram.forecast.measured import measure

    return measure(case.request, Meter(), inference=case.inference)
