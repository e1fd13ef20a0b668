"""References of docstrings that Sphinx cannot follow by itself, held to the code all the same.

Docstrings name types by their last word, as the code imports them (often for type checkers alone). A name that is
documented becomes a link; one that exists in the code, or in another package, and is not documented stays text; any
other is a warning, so a docstring cannot name what was renamed.
"""

from __future__ import annotations

import ast
import pkgutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_qvl

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment


@cache
def names() -> frozenset[str]:
    """What modules of the package define or import, with the methods and attributes of their classes."""
    found: set[str] = set()
    for file in Path(pytest_qvl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found.update((alias.asname or alias.name).rpartition(".")[2] for alias in node.names)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                found.update(target.id for target in targets if isinstance(target, ast.Name))
    return frozenset(found)


def exists(target: str) -> bool:
    """Whether there is such a thing: by its full path, or by its last word in this package."""
    try:
        return pkgutil.resolve_name(target) is not None
    except (ImportError, AttributeError, ValueError):
        return "." not in target and target in names()


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element) -> Element | None:
    """The link, the bare text, or nothing, which is a warning."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    target = node["reftarget"]
    last = target.rpartition(".")[2]
    found = {name for name, entry in domain.objects.items() if name.endswith(f".{last}") and not entry.aliased}
    if len(found) == 1 and (link := _link(app, env, node, contnode, found.pop())):
        return link
    return contnode if exists(target) else None


def _link(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element, target: str) -> Element | None:
    node["reftarget"] = target
    return env.domains.python_domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
