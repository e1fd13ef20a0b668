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
from pytest_qvl.checks.declared import NEEDS, declared, needing, read
from pytest_qvl.checks.registry import DECLARED, check
from pytest_qvl.report.promises import PROMISES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(checks.__file__).parent


def test_what_is_read_from_the_source_is_what_the_decorators_say() -> None:
    for file in PACKAGE.glob("*.py"):
        import_module(f"pytest_qvl.checks.{file.stem}")
    assert {name: each for name, each in DECLARED.items() if getattr(checks, name, None)} == declared()


def test_every_decorator_in_the_source_is_read() -> None:
    """Also one that is written in another way than the others: over several lines, or below another decorator."""
    decorated = {
        node.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Call) and getattr(d.func, "id", "") == "check" for d in node.decorator_list)
    }
    assert decorated == set(declared())


def test_a_declaration_may_take_several_lines() -> None:
    source = '@check(\n    promise=3,\n    needs=("gpu", "time"),\n)\ndef new(model):\n    pass\n'
    assert read(source, "here") == [("new", "here", 3, ("gpu", "time"))]


def test_a_need_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="a check cannot need money; known: gpu, knowledge"):
        check(promise=1, needs=("money",))


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
    assert {check_of(test) for test in tests} == set(declared())


def test_a_fault_names_every_check_that_judges_a_model() -> None:
    from pytest_qvl.faults import catalogue

    assert {fault.check for fault in catalogue().values()} == set(declared()) - set(needing("forecast"))


def test_the_page_has_the_tables_that_the_checks_make() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "check_tables.py"))
    page = (ROOT / "docs" / "checks.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE)) == sorted(declared())
    assert script["tables"](page) == page, "run: python tools/check_tables.py"
