"""``--qvl-compare``: a run says what changed since a record, and is red where something got worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

JUDGES = """
    import pytest
    from pytest_qvl.evidence import Judge
    @pytest.mark.parametrize("check", ["causality", "label_mask"])
    def test_it(check):
        judge = Judge(check, "a promise")
        judge.equal("wrong ones", {wrong}, 0, else_say="some are wrong")
        judge.verdict()
"""


@pytest.fixture
def base(pytester, run_light):
    """The record of a run of two checks; what another run of them says when it is compared with a record."""
    pytester.makepyfile(JUDGES.format(wrong=0))
    run_light("--qvl-record", "base.json").assert_outcomes(passed=2)
    return lambda *arguments, file="base.json": run_light("--qvl-compare", file, "--qvl-record", "r.json", *arguments)


def exit_status():
    return json.loads(Path("r.json").read_text(encoding="utf-8"))["exit_status"]


def test_a_run_says_that_nothing_changed(base):
    same = base()
    assert same.ret == exit_status() == 0
    same.stdout.fnmatch_lines(["=* compared with *base.json =*", "qvl: compare: nothing changed: 2 verdicts compared"])
    over_itself = base(file="r.json")
    over_itself.stdout.fnmatch_lines(["qvl: compare: nothing changed: 2 verdicts compared"])


def test_a_run_that_lost_a_check_is_red_though_its_tests_are_green(base):
    data = json.loads(Path("base.json").read_text(encoding="utf-8"))
    data["checks"].append({**data["checks"][0], "test": "test_of_old"})
    data["environment"]["packages"]["peft"] = "0.1"
    Path("more.json").write_text(json.dumps(data))
    gone = base(file="more.json")
    gone.assert_outcomes(passed=2)
    assert gone.ret == exit_status() == pytest.ExitCode.TESTS_FAILED
    gone.stdout.fnmatch_lines(["   peft 0.1 →*", "gone (*", "   causality (test_of_old)*", "qvl: compare: 1 gone"])


def test_the_checks_that_broke_are_named(pytester, base):
    pytester.makepyfile(JUDGES.format(wrong="int(check == 'label_mask')"))
    found = base("-qq")
    lines = [line for line in found.outlines if line.startswith("qvl: compare")]
    assert lines == ["qvl: compare: 1 new failure"]
    base().stdout.fnmatch_lines(["   label_mask (test_it?label_mask?): kept → BROKEN: some are wrong*"])


def test_a_run_that_is_told_to_stop_is_not_compared(pytester, base):
    pytester.makepyfile("import pytest\ndef test_it(): pytest.exit('enough', returncode=2)")
    result = base()
    assert result.ret == exit_status() == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["qvl: qvl_compare: cannot compare: the new record is of a run that was interrupted*"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "is no record of a run"),
        (None, "No such file or directory"),
        ('{"schema":"pytest-qvl/record/9"}', "upgrade"),
    ],
)
def test_a_base_that_is_no_record_is_refused_before_the_run(pytester, run_light, text, says):
    pytester.makepyfile("def test_it(): pass")
    if text is not None:
        (pytester.path / "old.json").write_text(text)
    result = run_light("--qvl-compare", "old.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--qvl-compare: *old.json*{says}*"])


def test_a_run_that_cannot_be_compared_is_not_green(pytester, run_light):
    pytester.makepyfile("def test_it(): pass")
    result = run_light("--qvl-compare", "shipped")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["qvl: qvl_compare: cannot compare: no reference is shipped for a run without a model*"]
    )


def test_a_base_that_cannot_be_compared_starts_no_line_of_its_own(pytester, run_light):
    base = json.loads((Path(__file__).parents[2] / "docs/records/h200-embedded.json").read_text(encoding="utf-8"))
    base["checks"] = [{**one, "target": "x\n::error::y\x1b[31m"} for one in base["checks"]]
    (pytester.mkdir("older") / "base.json").write_text(json.dumps(base))
    pytester.makepyfile("def test_it(): pass")
    result = run_light("--qvl-compare", "older/base.json")
    assert any("cannot compare: no model in common: x \\::error::y\\x1b" in line for line in result.outlines)
    assert "\x1b[31m" not in result.stdout.str() and "::error::y" not in [line[:10] for line in result.outlines]
