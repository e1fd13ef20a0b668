"""What more than one backend has measured, side by side; nothing where only one has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pytest_qvl.checks import vram
from pytest_qvl.evidence import Evidence, Figure, Judge, Table
from pytest_qvl.report.comparison import SOME_LOGITS, TOP_TOKENS, comparison
from pytest_qvl.report.report_data import Finding, add_to_report, report_data
from pytest_qvl.report.run_results import ResultsBuilder


def peaks(allocated, seconds, tokens=(1, 2), logits=(0.5, -1.0), process=10.0):
    rows = (("prefill", allocated, 9.0, process, seconds, 100 / seconds),)
    figures = (Figure(TOP_TOKENS, "cut short …"), Figure(SOME_LOGITS, "cut short …"))  # for people
    data = {TOP_TOKENS: list(tokens), SOME_LOGITS: list(logits)}
    return Evidence("peak_vram", "p", figures, table=Table(vram.COLUMNS, rows), data=data)


def compared(**found):
    builder = ResultsBuilder()
    for backend, evidence in found.items():
        report = pytest.TestReport("x", ("x", 0, "x"), {}, "passed", None, "call")
        add_to_report(report, finding=Finding(f"7b on cuda by {backend}", "7b on cuda", backend, None, (evidence,)))
        builder.pytest_runtest_logreport(report)
    return comparison(builder.results())


def test_memory_and_time_are_set_against_the_first_backend():
    tables = compared(transformers=peaks(8.0, 1.0), unsloth=peaks(6.0, 0.5))
    table = tables["7b on cuda: memory and time"]
    assert table.columns[:3] == ("phase", "backend", "allocated GiB")
    assert table.rows == (
        ("prefill", "transformers", 8.0, 9.0, 10.0, 1.0, 100.0),
        ("prefill", "unsloth", 6.0, 9.0, 10.0, 0.5, 200.0),
        ("prefill", "unsloth / transformers", 0.75, 1.0, 1.0, 0.5, 2.0),
    )


def test_what_the_driver_did_not_tell_has_no_ratio():
    tables = compared(transformers=peaks(8.0, 1.0, process=None), unsloth=peaks(6.0, 0.5))
    assert tables["7b on cuda: memory and time"].rows[2][4] is None


def test_logits_of_the_same_inputs():
    tables = compared(transformers=peaks(8, 1), unsloth=peaks(6, 1, tokens=(1, 3), logits=(0.75, -1.0)))
    assert tables["7b on cuda: logits of the same inputs"].rows == (
        ("unsloth against transformers", "1 of 2", 0.25, 2),
    )


def test_inputs_of_another_size_are_not_compared():
    tables = compared(transformers=peaks(8, 1), unsloth=peaks(6, 1, tokens=(1,), logits=(0.5,)))
    assert list(tables) == ["7b on cuda: memory and time"]


def test_one_backend_is_no_comparison():
    assert compared(transformers=peaks(8.0, 1.0)) == {}
    assert compared(transformers=Evidence("alignment", "p"), unsloth=Evidence("alignment", "p")) == {}


def test_the_digest_of_logits_is_what_the_comparison_reads():
    import torch

    logits = torch.zeros(2, 100)
    logits[0, 3], logits[1, 99] = 2.0, 1.5
    digest = {f"prefill: {name}": values for name, values in vram.logits_digest(logits).items()}
    assert digest[TOP_TOKENS] == [3, 99]
    values = digest[SOME_LOGITS]
    assert len(values) == 2 * vram.DIGEST_LOGITS
    assert values[-1] == 1.5
    assert values[:3] == [0.0, 0.0, 2.0]
    assert vram.logits_digest(torch.ones(1, 5, dtype=torch.bfloat16))[vram.SOME_LOGITS] == [1.0] * 5


def test_the_digest_of_logits_reaches_a_report_as_numbers_and_the_record_as_text():
    import json

    import torch

    judge = Judge("peak_vram", "p")
    vram._report_digest(judge, "prefill", torch.tensor([[0.123456789, -2.0, 1e-9]]))
    report = SimpleNamespace()
    add_to_report(report, finding=Finding("t", "s", "b", None, (judge.verdict(),)))
    sent = SimpleNamespace(**json.loads(json.dumps(vars(report))))
    (evidence,) = report_data(sent).finding.evidence
    assert evidence.data == {TOP_TOKENS: [0], SOME_LOGITS: [0.123457, -2.0, 1e-09]}
    assert [figure.value for figure in evidence.figures] == ["0", "0.123457 -2 1e-09"]
    assert "data" not in evidence.as_dict()
