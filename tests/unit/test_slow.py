"""What a plain run leaves out is counted, and one option and every night run it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = "pytest -n 2 --dist worksteal"
PLAIN_AND_SLOW = """
    import pytest
    def test_plain(): pass
    @pytest.mark.slow
    def test_slow(): pass
    @pytest.mark.parametrize("n", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_rest_of_a_matrix(n): pass
    def test_listed(): pass
"""


@pytest.mark.parametrize(
    ("arguments", "passed", "skipped", "deselected"),
    [([], 2, 3, 0), (["--slow"], 5, 0, 0), (["-m", "slow"], 0, 3, 2), (["--slow", "-m", "slow"], 3, 0, 2)],
    ids=str,
)
def test_slow_tests_are_counted_where_they_do_not_run(pytester, arguments, passed, skipped, deselected):
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["markers"]
    pytester.makepyprojecttoml(f"[tool.pytest]\nstrict = true\nmarkers = {markers}")
    pytester.makeconftest((ROOT / "conftest.py").read_text(encoding="utf-8"))
    file = pytester.makepyfile(PLAIN_AND_SLOW)
    pytester.mkdir("tests").joinpath("slow_tests.txt").write_text(f"{file.name}::test_listed\n", encoding="utf-8")
    result = pytester.runpytest_inprocess("-rs", *arguments)
    result.assert_outcomes(passed=passed, skipped=skipped, deselected=deselected)
    assert ("slow: --slow runs it" in result.stdout.str()) == bool(skipped)


def test_the_night_runs_what_a_plain_run_leaves_out():
    night = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "schedule:" in night
    assert f"- run: {COMMAND} --slow\n" in night
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").endswith(f"\n{COMMAND}\n")
    assert f"`{COMMAND} --slow`" in (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert f"/{COMMAND}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
