"""Another report, as a plugin of somebody else would write it: the results of the run are all that it reads."""

from __future__ import annotations

import json
import re

import pytest

from pytest_qvl.promises import PROMISES

SUITE = ("--pyargs", "pytest_qvl.suite")
PAGE = """
    import pytest
    from html import escape
    from pathlib import Path
    from pytest_qvl.session.keys import RESULTS_KEY

    @pytest.fixture(scope="session")
    def qvl_quantized_model(): raise ValueError("no <model>")

    def pytest_terminal_summary(config, exitstatus):
        results = config.stash[RESULTS_KEY].results(int(exitstatus))
        rows = [
            [target, promise.number, promise.title, promise.state, promise.detail]
            for target, found in results.suite.items() for promise in found.promises()
        ]
        rows += [[target, check, said] for target, found in results.suite.items() for check, said in found.errors]
        rows += [[phase.test, phase.when, phase.outcome, phase.error] for phase in results.phases if phase.failed]
        cells = ["".join(f"<td>{escape(str(cell))}" for cell in row) for row in rows]
        Path("page.html").write_text("".join(f"<tr>{row}\\n" for row in cells))
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "xdist"])
def test_an_html_report_says_what_terminal_and_record_say(pytester, run_apart, workers):
    pytester.makeini("[pytest]")
    pytester.makeconftest(PAGE)
    arguments = ("--qvl-device", "cpu", "-k", "test_quantization_census", "--qvl-record", "r.json")
    result = run_apart(*arguments, *SUITE, *workers, plugins=["xdist"] if workers else [])
    result.assert_outcomes(errors=1)
    lines = (pytester.path / "page.html").read_text(encoding="utf-8").splitlines()
    rows = [re.split("<tr>?<td>|<td>", line)[1:] for line in lines]
    promises, (error, failed) = rows[: len(PROMISES)], rows[len(PROMISES) :]
    table = [line for line in result.outlines if re.match(r" {3}[ 1]\d  ", line)]
    assert [" ".join(row[1:]).strip() for row in promises] == [" ".join(line.split()) for line in table]
    record = json.loads((pytester.path / "r.json").read_text(encoding="utf-8"))
    said = [[p["target"], str(p["number"]), p["title"], p["state"], p["detail"]] for p in record["promises"]]
    assert promises == said
    assert error == ["embedded on cpu", "quantization_census", "ValueError: no &lt;model&gt;"]
    assert failed[1:] == ["setup", "failed", "ValueError: no &lt;model&gt;"]
    assert record["exit_status"] == result.ret
