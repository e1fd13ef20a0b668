"""``pytest-qvl explain CHECK``: from a red line to its cause. Reads docstrings from the source; imports no torch."""

from __future__ import annotations

import ast
import inspect
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qvl import checks
from pytest_qvl.checks.declared import declared
from pytest_qvl.promises import PROMISES
from pytest_qvl.records.remedies import REMEDIES
from pytest_qvl.releases import DEFECTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.checks.declared import Declared
    from pytest_qvl.faults.catalogue import Fault

SHOWN_WITHOUT_THREAD = 6
_ARGUMENTS = re.compile(r"^(?:Args|Returns|Raises|Yields|Attributes):$", re.MULTILINE)
_PAGE = re.compile(r"`*docs/([\w-]+)\.md(?:#([\w-]+))?`*")
_THREAD = re.compile(r"([\w.-]+/[\w.-]+)#(\d+)")


def explain(name: str) -> str:
    """What a check promises, how it judges, by which limits, what breaks it, and what to do.

    Raises:
        ValueError: No such check; names the nearest.
    """
    check = _find(name)
    first, method = docstring(check)
    promise = PROMISES[check.promise - 1]
    lines = [f"{check.name}: {first}", f"promise {promise.number}: {promise.title}", ""]
    lines += [_PAGE.sub(_titled, method), ""] if method else []
    remedy = REMEDIES[check.name]
    lines += ["usual cause:", f"  {remedy.cause}", "what to do first:", f"  {remedy.fix}", ""]
    lines += [*_defects(check.name), *_faults(check.name)]
    lines += ["see it again:", f"  {again(check.name)}"]
    return "\n".join(lines)


def again(check: str, *arguments: str) -> str:
    """The command that runs one check of the suite."""
    return " ".join(("pytest --pyargs pytest_qvl.suite -k", f"test_{check}", *arguments))


def _find(name: str) -> Declared:
    known = declared()
    name = name.removeprefix("test_")
    if name not in known:
        near = " or ".join(map(repr, get_close_matches(name, known)))
        hint = f"; did you mean {near}?" if near else f"; they are: {', '.join(known)}"
        raise ValueError(f"no check is called {name!r}{hint}")
    return known[name]


def docstring(check: Declared) -> tuple[str, str]:
    """The first line of a check's docstring, and the rest without its arguments."""
    file = Path(checks.__file__).with_name(f"{check.module}.py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == check.name)
    first, _, rest = inspect.cleandoc(ast.get_docstring(found) or "").partition("\n")
    return first, _ARGUMENTS.split(rest, maxsplit=1)[0].strip()


def _titled(page: re.Match[str]) -> str:
    """A page of the documentation and a heading by their words: an installed package has no ``docs/``."""
    title, anchor = page.groups()
    section = f', "{anchor.replace("-", " ")}"' if anchor else ""
    return f"the documentation's {title.capitalize()}{section}"


def _defects(name: str) -> Iterator[str]:
    """Releases that are known to break it."""
    known = [defect for defect in DEFECTS if name in defect.checks]
    if known:
        yield "known defects of releases:"
        for defect in known:
            yield f"  {defect.package} {defect.versions}: {defect.summary} ({defect.thread})"
        yield ""


def faults_of(name: str) -> list[Fault]:
    """The faults that this check must catch, those with a public thread first."""
    from pytest_qvl.faults.catalogue import catalogue

    return sorted((fault for fault in catalogue().values() if fault.check == name), key=lambda fault: not fault.source)


def _faults(name: str) -> Iterator[str]:
    """What has broken it before, with threads, and how to see it."""
    faults = faults_of(name)
    if not faults:
        return
    threads = [fault for fault in faults if fault.source]
    others = faults[len(threads) :]
    yield "what has caused it before:" if threads else "faults that show it:"
    for fault in threads:
        yield f"  {fault.name}: {fault.summary}"
        yield from (f"      {link}" for link in links(fault.source))
    if threads and others:
        yield "faults that show it:"
    yield from (f"  {fault.name}: {fault.summary}" for fault in others[:SHOWN_WITHOUT_THREAD])
    if left := [fault.name for fault in others[SHOWN_WITHOUT_THREAD:]]:
        yield f"  and {', '.join(left)}"
    yield f"  (each on your model: {again(name, '--qvl-fault NAME')})"
    yield ""


def links(source: str) -> list[str]:
    """Addresses of the threads of a fault; what is no thread of GitHub stays as it is."""
    found = [f"https://github.com/{owner}/issues/{number}" for owner, number in _THREAD.findall(source)]
    return found or [source]
