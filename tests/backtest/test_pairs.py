"""The pairs are well-formed, belong to the defects that the package ships, and the page is what the record gives.

What runs them is ``python -m tests.backtest``.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from pytest_qvl import checks, releases
from pytest_qvl.evidence import CheckFailed, Judge
from tests.backtest.page import page, with_defects
from tests.backtest.pairs import BASES, PAIRS, Pair
from tests.backtest.record import as_it_should_be, defect_of
from tests.backtest.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "docs/records/backtest.json").read_text(encoding="utf-8"))

every_pair = pytest.mark.parametrize("pair", PAIRS, ids=[pair.name for pair in PAIRS])


@every_pair
def test_a_pair_is_one_of_a_shipped_defect(pair: Pair) -> None:
    defect = defect_of(pair)
    assert SpecifierSet(defect.versions).contains(pair.bad)
    assert not SpecifierSet(defect.versions).contains(pair.good)
    assert pair.check in defect.checks
    assert pair.check in checks.__all__
    assert pair.scenario in SCENARIOS
    assert pair.base in BASES
    assert pair.words


@every_pair
def test_a_failure_on_the_bad_release_says_which_one_fixes_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "installed", lambda package: pair.bad if package == pair.package else None)
    judge = Judge(pair.check, "promise")
    judge.problem(pair.words)
    with pytest.raises(CheckFailed) as failed:
        judge.verdict()
    fixed_in = defect_of(pair).fixed_in
    assert (f"fixed in {fixed_in}" if fixed_in else "no release has it fixed yet") in str(failed.value)


@every_pair
def test_the_record_has_it_as_it_should_be(pair: Pair) -> None:
    assert as_it_should_be(pair, RECORD)


def test_no_pair_is_there_twice() -> None:
    assert Counter(pair.name for pair in PAIRS).most_common(1)[0][1] == 1


def test_every_case_has_a_pair() -> None:
    """A case of one family runs beside those of the others."""
    cases = [{name.partition("_qwen")[0] for name in names} for names in (SCENARIOS, (p.scenario for p in PAIRS))]
    assert cases[0] == cases[1]


def test_the_page_is_what_the_record_gives() -> None:
    assert (ROOT / "docs/backtest.md").read_text(encoding="utf-8") == page(RECORD), (
        "run: python -m tests.backtest --page"
    )


def test_the_table_of_known_defects_is_that_of_the_package() -> None:
    text = (ROOT / "docs/releases.md").read_text(encoding="utf-8")
    assert text == with_defects(text), "run: python -m tests.backtest --page"


def test_every_shipped_defect_was_run() -> None:
    run = {(pair.package, pair.thread) for pair in PAIRS}
    assert [defect.what for defect in releases.DEFECTS if (defect.package, defect.thread) not in run] == []
