"""What a check says of itself, once: everything that lists checks has it, and a check that is missing is noticed."""

from __future__ import annotations

import ast
import re
import runpy
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from pytest_qvl import checks
from pytest_qvl.checks.declared import NEEDS, Declared, declared, needing, read
from pytest_qvl.checks.registry import check
from pytest_qvl.promises import PROMISES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(checks.__file__).parent


def test_what_is_read_from_the_source_is_what_the_decorators_say() -> None:
    """Also of one that is written in another way than the others: over several lines, or below another decorator."""
    decorated = {
        node.name: _declared_by(node.name, file.stem, given)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        for given in node.decorator_list
        if isinstance(given, ast.Call) and getattr(given.func, "id", "") == "check"
    }
    assert decorated == declared()


def _declared_by(name: str, module: str, decorator: ast.Call) -> Declared:
    given = {word.arg: ast.literal_eval(word.value) for word in decorator.keywords}
    return Declared(name, module, given["promise"], given.get("needs", ()))


def test_a_declaration_may_take_several_lines() -> None:
    source = '@check(\n    promise=3,\n    needs=("gpu", "time"),\n)\ndef new(model):\n    pass\n'
    assert read(source, "here") == [("new", "here", 3, ("gpu", "time"))]


def test_a_need_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="a check cannot need money; known: gpu, knowledge"):
        check(promise=1, needs=("money",))


def test_a_check_with_the_name_of_its_module_is_refused() -> None:
    """Once such a module is imported, the package has it under that name, and whoever calls the check calls a module."""

    def positions(model: Any) -> None:
        """A check."""

    positions.__module__ = "pytest_qvl.checks.positions"
    with pytest.raises(ValueError, match="the check positions and its module pytest_qvl.checks.positions have one"):
        check(promise=6)(positions)
    for file in PACKAGE.glob("*.py"):
        import_module(f"pytest_qvl.checks.{file.stem}")


def test_every_check_belongs_to_a_promise_and_every_promise_has_one() -> None:
    assert [promise.number for promise in PROMISES] == list(range(1, len(PROMISES) + 1))
    assert {each.promise for each in declared().values()} == {promise.number for promise in PROMISES}
    assert set(chain(*(promise.checks for promise in PROMISES))) == set(declared())
    assert set(chain(*(each.needs for each in declared().values()))) == set(NEEDS)


def test_type_checkers_see_every_check() -> None:
    """Each is imported for them in checks/__init__, from the module that holds it."""
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    homes = {
        name: module
        for module, name in re.findall(r"from pytest_qvl\.checks\.(\w+) import (\w+) as \2$", source, re.MULTILINE)
    }
    assert {name: homes.get(name) for name in declared()} == {each.name: each.module for each in declared().values()}


def test_the_suite_has_a_test_of_every_check() -> None:
    from pytest_qvl.session.suite_collection import FOLDER, check_of

    files = [file.read_text(encoding="utf-8") for file in FOLDER.glob("test_*.py")]
    tests = chain(*(re.findall(r"^def (test_\w+)", file, re.MULTILINE) for file in files))
    # The preflight judges files; what has no model to judge is no check.
    assert {check_of(test) for test in tests} == {*declared(), "preflight"}


def test_a_fault_names_every_check_that_judges_a_model() -> None:
    from pytest_qvl.faults import catalogue

    assert {fault.check for fault in catalogue().values()} == set(declared()) - set(needing("forecast"))


def test_the_page_has_the_tables_that_the_checks_make() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "check_tables.py"))
    page = (ROOT / "docs" / "checks.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE)) == sorted(declared())
    assert script["tables"](page) == page, "run: python tools/check_tables.py"
