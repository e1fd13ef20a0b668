"""The table of versions is what its records give; it, tox.ini and the nightly job keep to pyproject's ranges."""

from __future__ import annotations

import configparser
import itertools
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "versions.py"))
ROWS, ENVIRONMENTS = TOOL["ROWS"], TOOL["environments"]()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = {one.name: one.specifier for one in map(Requirement, PROJECT["dependencies"])}
RECORDS = TOOL["records"]()


def named(section: str) -> Iterator[str]:
    """The environments of a section of tox.ini: ``testenv:py{311,312}-{a,b}`` has four."""
    parts = [part.split(",") for part in re.split(r"[{}]", section.removeprefix("testenv:"))]
    return map("".join, itertools.product(*parts))


def tox_pins(environment: str) -> dict[str, str]:
    """What tox.ini installs into it at one release."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    (section,) = [one for one in tox.sections() if environment in named(one)]
    found = {}
    for line in tox[section]["deps"].splitlines():
        if pin := re.fullmatch(r"(?:([\w!,]+): )?([\w-]+)==([\w.]+)", line):
            factors, package, release = pin.groups()
            if factors is None or any(holds(one, environment.split("-")) for one in factors.split(",")):
                assert package not in found, f"{environment}: {package} twice"
                found[package] = release
    return found


def holds(factor: str, of: list[str]) -> bool:
    return factor[1:] not in of if factor.startswith("!") else factor in of


def is_lowest(release: str, bound: Version) -> bool:
    """``>=24`` begins at 24.0, and ``>=12.560`` at 12.560.30, its first release: nothing above what is declared."""
    given = Version(release).release
    return given[: len(bound.release)] == bound.release and not any(given[len(bound.release) : 2])


def test_the_lowest_row_is_where_the_declared_ranges_begin() -> None:
    bounds = TOOL["lower_bounds"]()
    assert bounds.keys() == DECLARED.keys(), "each dependency has a lower end"
    extras = [Requirement(text) for text in EXTRAS["test"]]
    bounds |= {one.name: Version(s.version) for one in extras for s in one.specifier if one.name in TOOL["BESIDE"]}
    del bounds[TOOL["NO_LOWER_BUILD"]]
    assert bounds.keys() == TOOL["LOWEST"].keys()
    assert not [name for name, bound in bounds.items() if not is_lowest(TOOL["LOWEST"][name], bound)]
    assert is_lowest(ROWS["torch26"].pins["torch"], TOOL["lower_bounds"]()["torch"])
    assert PROJECT["requires-python"] == ">=3.11" and TOOL["PYTHONS"][0] == "py311"


@pytest.mark.parametrize(
    ("release", "bound", "holds"), [("24.1", "24", False), ("24.0", "24", True), ("9.1.0", "9.0", False)]
)
def test_a_release_above_the_lower_end_is_not_the_lowest(release: str, bound: str, holds: bool) -> None:
    assert is_lowest(release, Version(bound)) == holds


@pytest.mark.parametrize("row", ROWS)
def test_every_pin_is_within_the_declared_range(row: str) -> None:
    assert not [name for name, release in ROWS[row].pins.items() if name in DECLARED and release not in DECLARED[name]]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_tox_installs_what_the_row_says(environment: str) -> None:
    row = ROWS[environment.partition("-")[2]]
    assert tox_pins(environment) == {"torch": TOOL["TORCH"], **row.pins}


def test_the_row_of_the_pins_has_those_of_constraints() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert ROWS["default"].pins.items() <= pinned.items()
    assert pinned["torch"] == TOOL["TORCH"]


def test_every_environment_runs_at_night() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (job,) = re.findall(r"^  versions:\n(?:(?:    .*)?\n)+", text, flags=re.MULTILINE)
    rows = [f"py311-{row}" for row in re.findall(r"^          - (\w+)$", job, flags=re.MULTILINE)]
    others = re.findall(r'\{ python: "(\d)\.(\d+)", row: (\w+) \}', job)
    assert [*rows, *(f"py{major}{minor}-{row}" for major, minor, row in others)] == ENVIRONMENTS
    assert "github.event_name == 'schedule'" in job


def test_an_environment_that_is_another_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"torch": "2.13.0", "pytest-xdist": "3.8.0", "pytest-cov": "7.1.0"}
    monkeypatch.setitem(TOOL["differences"].__globals__, "installed", here.get)
    python = TOOL["differences"]("py27-xdist")
    assert len(python) == 2 and python[0].startswith("this is py3")
    assert python[1] == "pytest-cov is 7.1.0, should be missing"
    assert "pytest-randomly is missing, should be 5.1.0" in TOOL["differences"]("py27-randomly")


def test_failures_and_skips_are_counted_by_pytests_own_report(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    found = TOOL["run"](["-p", "no:qvl", "test_it.py"], tmp_path)
    assert found == {"passed": 1, "failed": ["test_it::test_b"], "skipped": 1, "exit": 1}
    assert TOOL["counts"](found) == "1 passed, 1 **failed**, 1 skipped"
    assert TOOL["counts"]({"passed": 0, "failed": [], "skipped": 0, "exit": 4}) == "**exit 4**"


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["environment"])
def test_a_record_is_of_its_row_within_the_ranges_and_green(record: dict[str, Any]) -> None:
    python, _, name = record["environment"].partition("-")
    assert python == "py{}{}".format(*record["python"].split("."))
    assert {"torch": TOOL["TORCH"], **ROWS[name].pins}.items() <= record["packages"].items()
    assert not [one for one in TOOL["BESIDE"] if one in record["packages"] and one not in ROWS[name].pins]
    assert not [one for one, versions in DECLARED.items() if record["packages"][one] not in versions]
    for outcome in record["runs"].values():
        assert outcome["passed"] and not outcome["failed"] and outcome["exit"] == 0


def test_the_page_is_what_the_records_give() -> None:
    assert TOOL["PAGE"].read_text(encoding="utf-8") == TOOL["page"](RECORDS), "run: python tools/versions.py --page"
