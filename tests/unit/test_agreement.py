"""When a forecast agrees with a measurement, on numbers of which right and wrong are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_qvl.checks.forecast import judge_agreement
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.vram.forecast.engine.trace import PhaseBytes
from pytest_qvl.vram.forecast.validation.agreement import Comparison
from pytest_qvl.vram.forecast.validation.predictions import (
    NOT_COMPARED,
    SCHEMA,
    SIDES,
    Case,
    cases,
    differences,
    read_predictions,
)
from pytest_qvl.vram.units import GiB, MiB
from pytest_qvl.vram.usage import Usage

RESIDENT = 7000 * MiB
# What a 7B model takes above its weights, in MiB.
ABOVE = {"vision": 90, "prefill": 390, "decode 8": 390, "train step": 2250}


def forecast(above=ABOVE, resident=RESIDENT, workspace=33 * MiB):
    found, start = {}, resident
    for name, size in above.items():
        found[name] = PhaseBytes(name, resident + int(size * MiB), 0, {"workspace": workspace}, start)
        start = resident + workspace
    return found


def measured(above=ABOVE, resident=RESIDENT, **fields):
    return [
        Usage(name, 0.1, allocated=resident + int(size * MiB), alive_allocated=resident, **fields)
        for name, size in above.items()
    ]


def test_a_forecast_that_is_right_agrees_and_shows_its_figures():
    evidence = judge_agreement({"load": PhaseBytes("load"), **forecast()}, measured())
    assert evidence.ok
    assert evidence.check == "forecast_agrees"
    assert len([f for f in evidence.figures if f.relation]) == 2 * len(ABOVE)
    assert [row[0] for row in evidence.table.rows] == list(ABOVE)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"train step": 2250 - 230}, "train step: above what is resident, forecast 1.97 GiB, measured 2.20 GiB"),
        ({"train step": 2250 + 230}, "train step: above what is resident, .* 230 MiB too much"),
        ({"train step": 2250 + 300}, "train step: forecast 9.33 GiB, measured 9.03 GiB at the peak: 300 MiB too much"),
        ({"vision": 90 + 33}, "vision: above what is resident, forecast 123 MiB, measured 90 MiB: 33 MiB too much"),
        ({"prefill": 390 - 40}, "prefill: above what is resident, .*: 40 MiB too little"),
    ],
)
def test_a_forecast_that_is_off_is_refused_with_the_phase_and_by_how_much(changed, says):
    with pytest.raises(CheckFailed, match=says):
        judge_agreement(forecast({**ABOVE, **changed}), measured())


@pytest.mark.parametrize("changed", [{"train step": 2250 - 220}, {"vision": 90 + 31}, {"prefill": 390 + 38}])
def test_what_the_issue_allows_is_allowed(changed):
    assert judge_agreement(forecast({**ABOVE, **changed}), measured()).ok


def test_a_forecast_of_the_weights_alone_is_refused():
    """Its peaks are within 3 % at small pictures; what is above the weights gives it away."""
    weights = dict.fromkeys(ABOVE, 33)
    small = {"vision": 90, "prefill": 150, "decode 8": 150, "train step": 200}
    comparison = [Comparison("x", RESIDENT, RESIDENT + size * MiB, RESIDENT, RESIDENT) for size in small.values()]
    assert all(abs(c.error) <= c.allowed for c in comparison)
    with pytest.raises(CheckFailed, match="above what is resident"):
        judge_agreement(forecast(weights), measured(small))


def test_what_is_resident_may_differ_as_far_as_the_whole_peak_may():
    """A test's own tensors beside the model are in both of its numbers."""
    assert judge_agreement(forecast(), measured(resident=RESIDENT + 100 * MiB)).ok
    with pytest.raises(CheckFailed, match="vision: forecast 6.92 GiB, measured 7.41 GiB at the peak"):
        judge_agreement(forecast(), measured(resident=RESIDENT + 500 * MiB))


def test_a_model_whose_activations_are_within_the_limit_proves_nothing():
    tiny = {"vision": 36, "prefill": 36, "decode 8": 36, "train step": 73}
    with pytest.raises(CannotJudge, match="a forecast of the weights alone would pass: .* takes 7 MiB at most"):
        judge_agreement(forecast(tiny, 7 * MiB, workspace=66 * MiB), measured(tiny, 7 * MiB))


def test_what_was_not_measured_is_not_judged():
    with pytest.raises(CannotJudge, match="vision was not measured: CUDA was never used"):
        judge_agreement(forecast(), measured(reason="CUDA was never used"))


def test_a_phase_that_was_not_forecast_is_an_error():
    with pytest.raises(KeyError, match="decode 8"):
        judge_agreement({name: phase for name, phase in forecast().items() if name != "decode 8"}, measured())


# --- the committed predictions -----------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"
PREDICTIONS = DOCS / "records" / "forecast-predictions.json"
CURRENT = DOCS / "records" / "forecast-current.json"


@pytest.fixture(scope="module")
def entries():
    return read_predictions(PREDICTIONS)


def test_every_case_is_predicted_and_reads_back_as_the_same_request(entries):
    assert [Case.from_dict(entry) for entry in entries] == cases()
    names = [entry["name"] for entry in entries]
    assert len(set(names)) == len(names) == 24
    assert {entry["visual_tokens"] for entry in entries} == set(SIDES)


def test_cases_that_run_generate_and_train_through_every_phase(entries):
    from pytest_qvl.vram.forecast import phases

    for entry in entries:
        generated = {phases.VISION, phases.PREFILL, phases.DECODE} if entry["card"] is None else set()
        expected = {phases.LOAD, phases.ATTACH, phases.STATES, *phases.TRAINING, *generated}
        expected |= {phases.PREPARE} if entry["request"]["kbit_upcast"] else set()
        assert set(entry["phases"]) == expected
        assert expected > set(NOT_COMPARED)
        assert all(p["allocated"] <= p["reserved"] for p in entry["phases"].values())


def test_what_is_left_out_is_above_what_the_gpus_hold(entries):
    for entry in entries:
        reserved = max(phase["reserved"] for phase in entry["phases"].values())
        assert entry["too_large_to_measure"] == (entry["card"] is None and reserved > 70 * GiB)


def test_todays_forecasts_are_as_far_from_those_predicted_first_as_the_page_says(entries):
    pairs = list(zip(entries, read_predictions(CURRENT), strict=True))
    assert [found["name"] for _, found in pairs] == [entry["name"] for entry in entries]
    assert [line for entry, found in pairs if entry["card"] is None for line in differences(entry, found)] == []
    assert all(e["verdict"]["fits"] == f["verdict"]["fits"] for e, f in pairs if e["card"])
    assert sum(e["verdict"]["fails_in"] != f["verdict"]["fails_in"] for e, f in pairs if e["card"]) == 1
    off = {
        kind: max(abs(f["phases"][name][kind] / size[kind] - 1) for e, f in pairs for name, size in e["phases"].items())
        for kind in ("allocated", "reserved")
    }
    said = f"at most {off['allocated']:.2%} of what is allocated and {off['reserved']:.1%} of what is reserved"
    assert said.replace("%", " %") in " ".join((DOCS / "forecast.md").read_text(encoding="utf-8").split())


def test_a_file_of_another_schema_is_refused(tmp_path):
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"schema": "other/1", "cases": []}))
    with pytest.raises(ValueError, match=f"has schema 'other/1'; this reads {SCHEMA}"):
        read_predictions(file)
