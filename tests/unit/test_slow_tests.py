"""The list of slow tests names tests that there are, and leaves every module some."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTED = (ROOT / "tests" / "slow_tests.txt").read_text(encoding="utf-8").splitlines()


def test_every_test_that_is_listed_exists_once() -> None:
    assert sorted(set(LISTED)) == LISTED
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in {each.split("::")[0] for each in LISTED}}
    names = [(each, *re.match(r"([^:]+)::(?:\w+::)?(\w+)", each).groups()) for each in LISTED]
    assert [each for each, file, name in names if f"def {name}(" not in sources[file]] == []


def test_a_module_keeps_tests_that_are_quick() -> None:
    slow: dict[str, set[str]] = defaultdict(set)
    for each in LISTED:
        if "[" not in each:
            slow[each.split("::")[0]].add(each.split("::")[1])
    for file, names in slow.items():
        there = set(re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert there - names, file
