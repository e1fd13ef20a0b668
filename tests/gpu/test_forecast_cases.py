"""The committed forecasts (docs/records/forecast-predictions.json) against this GPU; ``--qvl-record`` keeps the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qvl.evidence import CannotJudge, Judge
from pytest_qvl.vram.cap import pinned_attention
from pytest_qvl.vram.forecast.validation.agreement import Comparison, hold
from pytest_qvl.vram.forecast.validation.predictions import NOT_COMPARED, Case, read_predictions
from pytest_qvl.vram.units import GiB

pytestmark = pytest.mark.gpu
PREDICTIONS = Path(__file__).parents[2] / "docs" / "records" / "forecast-predictions.json"
ENTRIES = [e for e in read_predictions(PREDICTIONS) if e["card"] is None and not e["too_large_to_measure"]]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_what_was_predicted_is_measured(torch, room, measure_case, side_by_side, entry):
    case = Case.from_dict(entry)
    found, expected = torch.cuda.get_device_capability(), case.request.capability
    if found != expected:
        raise CannotJudge(f"predicted for compute capability {expected}, and this GPU has {found}")
    if not room(entry):
        raise CannotJudge("this GPU has less free memory than the forecast needs")
    with pinned_attention(found):
        measured = measure_case(case)
    judge = Judge("forecast_case", f"the forecast made before for {case.name}")
    judge.report("resident", measured.resident / GiB, unit="GiB")
    judge.report("resident by the forecast", entry["resident"] / GiB, unit="GiB")
    for name in (usage.name for usage in measured.phases if usage.name not in NOT_COMPARED):
        predicted = entry["phases"][name]["allocated"]
        hold(judge, Comparison(name, predicted, measured.peak(name), entry["resident"], measured.resident))
    judge.verdict(*side_by_side(entry, measured))
