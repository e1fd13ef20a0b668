"""What a report carries comes out as it went in, by JSON and by execnet alike."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pytest_qvl.evidence import Evidence, Figure, Table
from pytest_qvl.report.injected_fault import InjectedFault
from pytest_qvl.report.process_results import LeasedGpu, ProcessResults, Verdict
from pytest_qvl.report.report_data import (
    ATTRIBUTE,
    Finding,
    GpuFailure,
    LimitOutcome,
    ReportData,
    add_to_report,
    report_data,
)
from pytest_qvl.report.run_results import XPASS, ResultsBuilder
from pytest_qvl.vram.usage import Usage

EVIDENCE = Evidence(
    "peak_vram",
    "p",
    (Figure("drift", 0.5, 1.0, "<="), Figure("dtype", "bfloat16")),
    ("too much",),
    ("a note",),
    Table(("phase", "GiB"), (("load", 1.5), ("prefill", None))),
    {"logits": [0.5, -1.0]},
)
WHOLE = ReportData(
    Finding("7b on cuda by x", "7b on cuda", "x", "peak_vram", (EVIDENCE,), (("alignment", "why"),), "needs CUDA: no"),
    (LimitOutcome("a::b", 7, "fit", "call", None, "no CUDA", True),),
    False,
    GpuFailure("broken", "CUDA is broken", "a::b"),
    "FAILED",
)


@pytest.mark.parametrize("data", [WHOLE, ReportData()], ids=["all of it", "nothing"])
def test_it_comes_back_from_json_and_from_execnet(data):
    execnet = pytest.importorskip("execnet")
    plain = data.as_dict()
    assert ReportData.from_dict(plain) == data
    assert ReportData.from_dict(json.loads(json.dumps(plain))) == data
    assert ReportData.from_dict(execnet.loads(execnet.dumps(plain))) == data


PROCESS = ProcessResults(
    Usage("session", 2.5, process=None),
    (Usage("load", reason="no CUDA"),),
    LeasedGpu("H100 (GPU-a)", "H100", 0, 1.5, ""),
    (Verdict("leak", "kept", "free again"),),
    WHOLE.limits,
)


@pytest.mark.parametrize("found", [PROCESS, ProcessResults(Usage("session"))], ids=["all of it", "nothing"])
def test_the_results_of_a_process_come_back_as_those_of_the_process_that_was_started(found):
    execnet = pytest.importorskip("execnet")
    sent = execnet.loads(execnet.dumps(found.as_dict()))
    worker = ProcessResults.from_dict(sent).started_by("gw0")
    named = ProcessResults.from_dict(json.loads(json.dumps(worker.as_dict()))).started_by("unsloth")
    assert {named.process, *(verdict.process for verdict in named.verdicts)} == {"unsloth gw0"}
    assert replace(named, process="", verdicts=found.verdicts) == found


def test_setting_one_field_leaves_the_others():
    report = SimpleNamespace()
    assert report_data(report) == ReportData()
    add_to_report(report, limits=WHOLE.limits)
    add_to_report(report, finding=WHOLE.finding)
    assert report_data(report) == ReportData(WHOLE.finding, WHOLE.limits)
    assert list(vars(report)) == [ATTRIBUTE]


def test_the_record_has_no_data_of_evidence():
    assert "data" not in EVIDENCE.as_dict()


def test_a_known_failure_that_holds_has_noticed_no_fault():
    builder = ResultsBuilder()
    builder.set_fault(InjectedFault("loss-summed", "The loss is a sum.", "loss_arithmetic"))
    for check, error in (("adapter_census", f"{XPASS} known [known.toml#1]"), ("loss_arithmetic", "the loss is off")):
        made = pytest.TestReport("a::t", ("a", 0, "t"), {}, "failed", error, "call")
        add_to_report(made, finding=Finding("m on cpu", "m on cpu", "transformers", check))
        builder.pytest_runtest_logreport(made)
    verdict = builder.results(1).fault_verdict
    assert (verdict.state, verdict.also) == ("caught", ())
