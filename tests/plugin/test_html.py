"""``--qvl-html``: the page of a run, with its exit status and its comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

JUDGES = """
    from pytest_qvl.evidence import Judge
    def test_it():
        judge = Judge("causality", "a promise")
        judge.equal("wrong ones", {wrong}, 0, else_say="some are <b>wrong</b>")
        judge.verdict()
"""


def test_a_run_writes_its_page(pytester, run_light):
    pytester.makepyfile(JUDGES.format(wrong=0))
    assert run_light("--qvl-html", "page.html", "--qvl-record", "r.json").ret == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "causality" in page
    assert "What failed" not in page
    pytester.makepyfile(JUDGES.format(wrong=1))
    assert run_light("--qvl-html", "page.html", "--qvl-record", "r.json", "--qvl-compare", "r.json").ret == 1
    page = Path("page.html").read_text(encoding="utf-8")
    for said in ("✗ Broken", "some are &lt;b&gt;wrong&lt;/b&gt;", "1 new failure", "exit status</dt><dd>1<"):
        assert said in page


def test_a_page_that_cannot_be_written_is_no_green_run(pytester, run_light):
    pytester.makepyfile("def test_it(): pass")
    result = run_light("--qvl-html", "/proc/nowhere/page.html", "--qvl-record", "r.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert json.loads(Path("r.json").read_text(encoding="utf-8"))["exit_status"] == result.ret
    result.stdout.fnmatch_lines(["qvl_html: /proc/nowhere/page.html could not be written: No such file or directory"])


def test_a_file_that_is_no_page_is_not_replaced(pytester, run_light):
    test = pytester.makepyfile("def test_it(): pass")
    result = run_light("--qvl-html", str(test))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--qvl-html*is there and is no report of a run: name another file*"])


def test_a_page_does_not_replace_the_record_of_its_run(pytester, run_light):
    pytester.makepyfile("def test_it(): pass")
    result = run_light("--qvl-html", "r", "--qvl-record", "r")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*qvl_html (--qvl-html): '*r' is the record's file too*name another one"])
