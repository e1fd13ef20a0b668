"""The summary: a table where the suite ran, one line where it did not, nothing where there is nothing to say."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from pytest_qvl.evidence import CheckFailed, Evidence, Figure, Table
from pytest_qvl.promises import PROMISES, promise_number
from pytest_qvl.report.injected_fault import InjectedFault
from pytest_qvl.report.promise_table import TITLE, write_promises
from pytest_qvl.report.report_data import Finding, ReportData, add_to_report
from pytest_qvl.report.run_results import PhaseResult, ResultsBuilder, RunResults
from pytest_qvl.report.terminal import Summary

CPU, CUDA = "embedded on cpu", "embedded on cuda"


class Terminal:
    """Keeps what the summary writes, with its colours."""

    def __init__(self, verbosity=0, width=80):
        writer = SimpleNamespace(fullwidth=width)
        self.config = SimpleNamespace(get_verbosity=lambda: verbosity, get_terminal_writer=lambda: writer)
        self.lines = []
        self.colours = {}

    def section(self, title, **_):
        self.lines.append(title)

    def line(self, text, **markup):
        self.lines.append(text)
        self.colours[text] = {name for name, on in markup.items() if on} - {"bold"}


def report(check=None, outcome="passed", *, target=CPU, evidence=(), not_judged=(), skipped=None, longrepr=None):
    made = pytest.TestReport(
        "test_x.py::test_x", ("test_x.py", 0, "test_x"), {}, outcome, longrepr, "call", duration=2.0
    )
    finding = Finding(target, target, "transformers", check, tuple(evidence), tuple(not_judged), skipped)
    add_to_report(made, finding=finding)
    return made


def kept(check, value=0.5):
    return Evidence(check, "p", (Figure("drift", value, 1.0, "<="), Figure("seen", 7)))


def broken(check, value=2.0):
    return Evidence(check, "p", (Figure("drift", value, 1.0, "<="),), ("the logits drift",))


def built(*reports):
    builder = ResultsBuilder()
    for one in reports:
        builder.pytest_runtest_logreport(one)
    return builder


def written(*reports, exitstatus=pytest.ExitCode.OK, verbosity=0, width=80):
    terminal = Terminal(verbosity, width)
    Summary(built(*reports)).pytest_terminal_summary(terminal, exitstatus)
    return terminal


def row(terminal, number):
    return next(line for line in terminal.lines if line.startswith(f"   {number:>2}  "))


def alone(check):
    """What the summary says where this check gave a verdict, and no other of its promise did."""
    promise = PROMISES[promise_number(check) - 1]
    return f"partly judged  (1 of {len({check} | {*promise.checks} - {*promise.on_request})} checks)"


def test_results_put_together_by_hand_are_shown_as_any():
    finding = Finding(CPU, CPU, "transformers", "causality", (kept("causality"),))
    phases = (PhaseResult("a::b", "call", "passed", 2.0, "", "", ReportData(finding)),)
    terminal = Terminal()
    write_promises(terminal, RunResults(datetime.now(UTC), 3.0, 0, phases))
    assert terminal.lines == written(report("causality", evidence=[kept("causality")])).lines


def test_results_that_were_read_do_not_change_with_a_later_report():
    builder = built(report("causality", evidence=[kept("causality")]))
    before = builder.results()
    builder.pytest_runtest_logreport(report("causality", "failed", evidence=[broken("causality")]))
    assert (before.tests, builder.results().tests) == ({"passed": 1}, {"passed": 1, "failed": 1})
    assert all(evidence.ok for evidence in before.suite[CPU].evidence)
    with pytest.raises(FrozenInstanceError):
        before.phases = ()


def test_every_promise_has_checks_and_every_check_one_promise():
    checks = [check for promise in PROMISES for check in promise.checks]
    assert len(checks) == len(set(checks))
    assert all(promise_number(check) is not None for check in checks)
    assert promise_number("somebody_elses") is None


def test_every_check_of_the_suite_belongs_to_a_promise():
    import re

    from pytest_qvl.session.suite_collection import FOLDER, check_of

    assert check_of("test_picture_pairing_in_training") == "picture_pairing"
    assert check_of("test_picture_pairings") == "picture_pairings"
    for file in set(FOLDER.glob("test_*.py")) - {FOLDER / "test_preflight.py"}:  # it judges files, before promises
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            assert promise_number(check_of(name)) is not None, f"{file.name}: {name}"


def test_a_whole_run_is_kept():
    reports = [report(check, evidence=[kept(check)]) for promise in PROMISES for check in promise.checks]
    terminal = written(*reports)
    assert terminal.lines[:2] == [TITLE, CPU]
    assert all(" kept " in line for line in terminal.lines[2:-1])
    checks = sum(len(promise.checks) for promise in PROMISES)
    verdict = f"   verdict: kept: {len(PROMISES)} of {len(PROMISES)} promises kept; {checks} checks in {2 * checks} s"
    assert terminal.lines[-1] == verdict
    assert terminal.colours[verdict] == {"green"}


def test_a_promise_shows_its_worst_figure_with_the_limit():
    terminal = written(*(report("causality", evidence=[kept("causality", value)]) for value in (0.2, 0.9, 0.4)))
    assert row(terminal, 5).endswith(f"{alone('causality')} drift 0.9 (<= 1)")


def test_a_broken_promise_shows_what_broke_it_and_turns_the_verdict():
    terminal = written(
        report("causality", evidence=[kept("causality", 0.9)]),
        report("feature_scatter", "failed", evidence=[broken("feature_scatter")]),
        report("alignment", "failed", evidence=[Evidence("alignment", "p", problems=("blind",))]),
        report("label_mask", "failed", longrepr="ValueError: no labels\nmore"),
    )
    assert row(terminal, 5).endswith("BROKEN         drift 2 (<= 1)")
    assert row(terminal, 9).endswith("BROKEN         blind")
    assert row(terminal, 10).endswith(" error")
    assert "       error: label_mask: ValueError: no labels" in terminal.lines
    assert terminal.lines[-1].startswith(f"   verdict: BROKEN: 0 of {len(PROMISES)} promises kept, 2 BROKEN, 1 error, ")
    assert terminal.colours[terminal.lines[-1]] == {"red"}


@pytest.mark.parametrize(
    ("caught", "others", "says", "colour"),
    [
        (True, [], "label_mask must catch it, and caught it; so did no other check", "green"),
        (True, ["causality"], "label_mask must catch it, and caught it; so did causality", "green"),
        (False, [], "label_mask must catch it, and DID NOT CATCH IT", "red"),
        (False, ["causality"], "label_mask must catch it, and DID NOT CATCH IT; causality did", "red"),
        (None, ["causality"], "label_mask must catch it, and was not run", "yellow"),
    ],
)
def test_a_fault_says_which_checks_noticed_it(caught, others, says, colour):
    reports = [report(check, "failed", evidence=[broken(check)]) for check in others]
    if caught is not None:
        found = [broken("label_mask")] if caught else [kept("label_mask")]
        reports.append(report("label_mask", "failed" if caught else "passed", evidence=found))
    builder = built(*reports, report("label_mask", "skipped", skipped="it cannot be made here"))
    builder.set_fault(InjectedFault("labels-shift", "Labels are shifted.", "label_mask"))
    terminal = Terminal(verbosity=-2)
    Summary(builder).pytest_terminal_summary(terminal, pytest.ExitCode.OK)
    assert terminal.lines == []
    Summary(builder).pytest_terminal_summary_fault(terminal, pytest.ExitCode.OK)
    assert terminal.lines == ["qvl: fault labels-shift: Labels are shifted.", f"qvl: {says}"]
    assert terminal.colours[f"qvl: {says}"] == {colour}


def test_a_broken_row_shows_a_figure_that_is_broken():
    whole = Figure("adapters outside the text side", 0, 0, "==")
    unlike = Figure("scaling", 4.0, 2.0, "<=")
    found = Evidence("adapter_census", "p", (whole,), ("layer 3 has no adapter",))
    assert row(written(report("adapter_census", "failed", evidence=[found])), 2).endswith("   layer 3 has no adapter")
    found = Evidence("adapter_census", "p", (whole, unlike), ("the scaling is wrong",))
    assert row(written(report("adapter_census", "failed", evidence=[found])), 2).endswith("   scaling 4 (<= 2)")


def test_a_promise_is_kept_only_if_all_its_checks_gave_a_verdict():
    first, *others = PROMISES[1].checks
    one, *rest = (report(check, evidence=[kept(check)]) for check in (first, *others))
    terminal = written(one)
    assert row(terminal, 2).endswith(f"{alone(first)} drift 0.5 (<= 1)")
    verdict = f"partly judged: 0 of {len(PROMISES)} promises kept, 1 partly judged, {len(PROMISES) - 1} not run"
    assert terminal.lines[-1].startswith(f"   verdict: {verdict}")
    assert " kept " in row(written(one, *rest), 2)
    state = built(one).results().suite[CPU].promises()[1]
    assert state.state == "partly judged"
    assert (state.judged, state.missing) == ((first,), tuple(others))


def test_a_row_says_how_much_a_check_left_out():
    figures = (Figure("ratio", 0.5, 1.0, "<="), Figure("layers judged", 3), Figure("layers not judged", 2))
    found = [Evidence("gradient_arithmetic", "p", figures), kept("gradient_arithmetic", 0.4)]
    terminal = written(report("gradient_arithmetic", evidence=found), width=200)
    number = promise_number("gradient_arithmetic")
    assert row(terminal, number).endswith(" ratio 0.5 (<= 1); gradient_arithmetic: layers not judged 2")


def test_measuring_vram_without_a_limit_or_a_card_keeps_nothing():
    resident = Figure("resident beside the model", 0.01, 0.1, "<=", "GiB")
    measured = Evidence("peak_vram", "p", (resident, Figure("prefill: peak allocated", 6.5)))
    limited = Evidence("peak_vram", "p", (resident, Figure("prefill: fit", 6.5, 15.0, "<=", "GiB")))
    agrees = report("forecast_agrees", evidence=[kept("forecast_agrees")])
    no_card = report("forecast_fits_card", "skipped", not_judged=[("forecast_fits_card", "no card was named")])
    terminal = written(report("peak_vram", evidence=[measured]), agrees, no_card)
    assert row(terminal, 11).endswith("not judged     measured only: neither --qvl-vram-limit nor --qvl-card was given")
    assert " kept " in row(written(report("peak_vram", evidence=[limited]), agrees, no_card), 11)
    fits = report("forecast_fits_card", evidence=[kept("forecast_fits_card")])
    assert " kept " in row(written(report("peak_vram", evidence=[measured]), agrees, fits), 11)
    assert f" {alone('forecast_fits_card')}" in row(written(fits), 11)
    leak = Evidence("peak_vram", "p", (replace(resident, value=2.0),), ("2 GiB are allocated beside the model",))
    assert " BROKEN " in row(written(report("peak_vram", "failed", evidence=[leak]), agrees), 11)


def test_a_narrow_terminal_is_readable():
    terminal = written(
        report("causality", evidence=[kept("causality")]),
        report("feature_scatter", "failed", evidence=[broken("feature_scatter")]),
        width=40,
    )
    lines = terminal.lines[2:-1]
    assert all(len(line) <= 40 for line in lines)
    where = lines.index("    5  features land on their")
    assert lines[where + 1 : where + 3] == ["       placeholders", "       BROKEN: drift 2 (<= 1)"]


def test_what_a_stranger_said_does_not_reach_the_terminal_as_it_is():
    said = "blind\x1b[2J\x07\u202e\x9b1m\ud800 äöü 图像"
    terminal = written(
        report("alignment", "failed", evidence=[Evidence("alignment", "p", problems=(said,))]),
        report("causality", "skipped", not_judged=[("causality", said)]),
        report(None, "skipped", target=said, skipped=said),
    )
    shown = r"blind\x1b[2J\x07\u202e\x9b1m\ud800 äöü 图像"
    assert row(terminal, 9).endswith(shown)
    assert f"       not judged: causality: {shown}" in terminal.lines
    assert terminal.lines[-1] == f"qvl: {shown}: 1 test not run: {shown}"
    assert (
        str(CheckFailed(Evidence("alignment", "p", problems=(said,), notes=("a\nb\tc",)))) == f"{shown}\nnote: a\nb\tc"
    )


def test_an_error_without_verdict_is_no_verdict():
    terminal = written(
        report("causality", evidence=[kept("causality")]),
        report("label_mask", "failed", longrepr=SimpleNamespace(reprcrash=SimpleNamespace(message="no\nlabels"))),
    )
    assert "       error: label_mask: no" in terminal.lines
    assert terminal.lines[-1].startswith("   verdict: could not be judged: 0 of ")
    assert terminal.colours[terminal.lines[-1]] == {"red"}


def test_what_could_not_be_judged_is_said_under_its_promise():
    terminal = written(
        report("causality", evidence=[kept("causality")]),
        report("feature_scatter", "skipped", not_judged=[("feature_scatter", "a uniform picture")]),
        report("feature_scatter", "skipped", not_judged=[("feature_scatter", "a uniform picture")]),
        report("alignment", "skipped", not_judged=[("alignment", "no knowledge")]),
        report("peak_vram", "skipped", skipped="needs CUDA: none"),
    )
    assert f" {alone('causality')}" in row(terminal, 5)
    assert terminal.lines.count("       not judged: feature_scatter: a uniform picture") == 1
    assert row(terminal, 9).endswith(" not judged")
    assert "       not judged: alignment: no knowledge" in terminal.lines
    assert row(terminal, 11).endswith("skipped        needs CUDA: none")
    assert "1 not judged, 1 skipped, " in terminal.lines[-1]


def test_peaks_are_shown_by_phase_though_nothing_is_wrong_with_them():
    table = Table(("phase", "allocated GiB"), (("load", 6.5), ("prefill", 7.0)))
    evidence = Evidence("peak_vram", "p", table=table)
    lines = written(report("peak_vram", evidence=[evidence])).lines
    assert lines[13:-2] == [f"       {line}" for line in str(table).splitlines()]
    assert "load" in lines[15]
    other = written(report("causality", evidence=[replace(evidence, check="causality")])).lines
    assert len(other) == len(lines) - len(str(table).splitlines())


@pytest.mark.parametrize("status", [pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR])
def test_a_run_that_was_stopped_is_not_called_kept(status):
    terminal = written(report("causality", evidence=[kept("causality")]), exitstatus=status)
    assert terminal.lines[-1].startswith("   verdict: stopped early: 0 of ")


def test_a_model_that_was_only_skipped_takes_one_line():
    reports = [report("causality", "skipped", target=CUDA, skipped="needs CUDA: none") for _ in range(3)]
    assert written(*reports).lines == ["qvl: embedded on cuda: 3 tests not run: needs CUDA: none"]
    reports.append(report("alignment", "skipped", target=CUDA, skipped="no room"))
    assert written(*reports).lines == ["qvl: embedded on cuda: 4 tests not run: needs CUDA: none (3); no room (1)"]


def test_models_are_told_apart():
    terminal = written(
        report("causality", evidence=[kept("causality")]),
        report("causality", "failed", target=CUDA, evidence=[broken("causality")]),
    )
    assert [line for line in terminal.lines if "verdict" in line][0].startswith("   verdict: partly judged: 0 of")
    assert [line for line in terminal.lines if "verdict" in line][1].startswith("   verdict: BROKEN: 0 of")


def test_own_tests_beside_the_suite_do_not_enter_its_table():
    terminal = written(
        report("causality", evidence=[kept("causality")]),
        report(None, "failed", evidence=[broken("label_mask"), kept("alignment")]),
        report(None, "failed"),
    )
    assert row(terminal, 10).endswith("not run")
    assert terminal.lines[-1] == "qvl: embedded on cpu: BROKEN: label_mask, 1 check kept"


def test_a_broken_promise_that_a_passing_test_expects_is_none():
    assert written(report(None, evidence=[broken("label_mask")])).lines == []


def test_nothing_to_say_is_not_said():
    assert written().lines == []
    assert written(report(None), report(None, "failed"), report(None, "skipped")).lines == []
    plain = pytest.TestReport("x", ("x", 0, "x"), {}, "passed", None, "call")
    assert written(plain).lines == []


def test_quieter_than_quiet_is_silent():
    assert written(report("causality", evidence=[kept("causality")]), verbosity=-1).lines
    assert not written(report("causality", evidence=[kept("causality")]), verbosity=-2).lines


def test_results_are_built_once_for_all_parts(monkeypatch):
    builder, terminal, calls = built(report(evidence=[kept("loss_arithmetic")])), Terminal(), []
    own = builder.results
    monkeypatch.setattr(builder, "results", lambda status: calls.append(status) or own(status))
    summary = Summary(builder)
    summary.pytest_terminal_summary(terminal, pytest.ExitCode.OK)
    summary.pytest_terminal_summary_fault(terminal, pytest.ExitCode.OK)
    assert calls == [0]


def test_v_shows_every_check_and_vv_every_figure():
    found = [kept("causality", 0.9), broken("feature_scatter")]
    reports = [report(one.check, "passed" if one.ok else "failed", evidence=[one]) for one in found]

    def below(verbosity):
        return [line for line in written(*reports, verbosity=verbosity).lines if line.startswith("       ")]

    assert below(0) == []
    assert below(1) == ["       causality: kept: drift 0.9 (<= 1)", "       feature_scatter: BROKEN: drift 2 (<= 1)"]
    assert below(2) == [
        *("       causality: kept", "         drift 0.9 (<= 1)", "         seen 7"),
        "       feature_scatter: BROKEN: drift 2 (<= 1)",
    ]


def test_forty_columns_break_no_word_and_lose_none():
    long = "the model is on the CPU, and this reason is longer than a line of a narrow terminal"
    reports = [
        report("causality", evidence=[kept("causality")]),
        report("peak_vram", "skipped", not_judged=[("peak_vram", long)]),
        report("label_mask", "failed", longrepr="ValueError: " + long),
    ]
    narrow, wide = written(*reports, width=40, verbosity=1), written(*reports, width=200, verbosity=1)
    assert max(map(len, narrow.lines)) <= 40
    assert all(
        word in " ".join(narrow.lines).split() for line in wide.lines if line[:4] == "    " for word in line.split()
    )
    assert "       not judged: peak_vram: the model" in narrow.lines
    assert "         is on the CPU, and this reason" in narrow.lines
