"""In GitHub Actions: a summary of the step in Markdown, and annotations on failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qvl.records.markdown import run_markdown
from pytest_qvl.records.stored import read_record

RECORDS = Path(__file__).parents[2] / "docs" / "records"
JUDGES = """
    from pytest_qvl.evidence import Judge
    def test_it():
        judge = Judge("causality", "a promise")
        judge.equal("wrong ones", {wrong}, 0, else_say="100 % | <b>wrong</b>\\n::error::no")
        judge.verdict()
"""


@pytest.fixture
def run(pytester, run_light, monkeypatch):
    """Run one check in a step of a job."""
    summary = pytester.path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("CI", "true")  # pytest prints whole messages then

    def run(source, *arguments):
        pytester.makepyfile(source)
        result = run_light(*arguments)
        return result, summary.read_text(encoding="utf-8") if summary.exists() else None

    return run


def test_a_run_appends_its_summary(pytester, run):
    (pytester.path / "summary.md").write_text("before\n")
    _, green = run(JUDGES.format(wrong=0))
    assert green.startswith("before\n## ✅ pytest-qvl: ") or green.startswith("before\n## ➖ pytest-qvl: ")
    result, both = run(JUDGES.format(wrong=1))
    red = both.removeprefix(green)
    assert red.startswith("## ❌ pytest-qvl: Broken")
    assert "**causality**" in red and "`pytest-qvl explain causality`" in red
    assert "<b>" not in red
    (line,) = [line for line in result.outlines if line.startswith("::error")]
    file = next(pytester.path.glob("test_*.py")).name
    assert line.startswith(f"::error file={file},title=test_it::")
    assert "100 %25 | <b>wrong</b>" in line
    assert line.endswith(" (pytest-qvl explain causality)")
    assert "pytest-qvl explain causality" in result.outlines  # as below the failure itself


def test_a_run_that_judges_nothing_writes_nothing(run):
    result, summary = run("def test_it(): assert False")
    assert summary is None
    assert not [line for line in result.outlines if line.startswith("::")]


def test_a_summary_that_cannot_be_written_is_said_and_no_failure(pytester, run, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/proc/nowhere/summary.md")
    result, _ = run(JUDGES.format(wrong=0))
    assert result.ret == 0
    result.stdout.fnmatch_lines(["GITHUB_STEP_SUMMARY: /proc/nowhere/summary.md could not be written: *"])


def test_another_plugin_annotates(pytester, run):
    pytester.makepyfile(other="")
    pytester.makeconftest(
        "import other\ndef pytest_configure(config): "
        "config.pluginmanager.register(other, 'pytest_github_actions_annotate_failures')"
    )
    result, _ = run(JUDGES.format(wrong=1))
    assert not [line for line in result.outlines if line.startswith("::error")]


def test_a_table_has_a_row_for_every_promise():
    text = run_markdown(read_record(RECORDS / "h200-qwen2.5-vl-7b.json"))
    rows = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 13))
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


@pytest.mark.slow  # a process that imports torch
def test_without_a_gpu_skipped_tests_take_a_line_each_way_not_one_each(run_apart, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = run_apart("--pyargs", "pytest_qvl.suite", "-m", "gpu", "-rs", "-p", "no:cacheprovider")
    assert sum("needs CUDA" in line for line in result.outlines) <= 2
    assert len(result.outlines) < 40
