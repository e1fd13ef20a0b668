"""A module's syntax tree as text, less what changes nothing: docstrings, annotations, names of local variables."""

from __future__ import annotations

import ast
from collections.abc import Iterator

Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Fields that say nothing of what is done; the rest is written out with its name.
_SILENT = {"annotation", "returns", "type_comment", "type_params", "type_ignores", "kind", "ctx"}


def without_names(tree: ast.Module) -> str:
    """The tree as text; Python's own ``ast.dump`` and ``ast.unparse`` differ between its releases."""
    return _text(tree, ())


def _text(node: object, scopes: tuple[dict[str, str], ...]) -> str:
    if isinstance(node, list):
        return "[" + ",".join(_text(item, scopes) for item in node if not _for_typing(item)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Name):
        return f"Name({_known(node.id, scopes)})"
    inner = scopes
    if isinstance(node, _SCOPES):
        inner = (*scopes, _local_names(node, len(scopes)))
    fields = []
    for name, value in ast.iter_fields(node):
        if name in _SILENT or value is None or value == []:
            continue
        if name == "body" and isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            value = value[1:]  # noqa: PLW2901
        if _holds_names(node, name):
            fields.append(f"{name}={_renamed(value, inner)}")
        else:  # decorators and defaults are evaluated outside of their function
            fields.append(f"{name}={_text(value, scopes if name in ('decorator_list', 'args') else inner)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _for_typing(node: object) -> bool:
    """``if TYPE_CHECKING:``, and a bare annotation that assigns nothing in a function or module."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _holds_names(node: ast.AST, field: str) -> bool:
    """Whether a field of text is the name of a variable."""
    return (
        (isinstance(node, ast.Nonlocal) and field == "names")
        or (isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and field == "name")
        or (isinstance(node, ast.MatchMapping) and field == "rest")
    )


def _renamed(value: object, scopes: tuple[dict[str, str], ...]) -> str:
    return ",".join(_known(str(name), scopes) for name in (value if isinstance(value, list) else [value]))


def _known(name: str, scopes: tuple[dict[str, str], ...]) -> str:
    for scope in reversed(scopes):
        if name in scope:
            return scope[name]
    return name


def _local_names(function: Scope, depth: int) -> dict[str, str]:
    """A function's parameters under their own names, which callers may use, its variables under their numbers."""
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    names = {argument.arg: argument.arg for argument in given if argument is not None}
    outer: set[str] = set()
    for node in _own_nodes(function):
        if isinstance(node, ast.Global | ast.Nonlocal):
            outer.update(node.names)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            outer.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    for node in _own_nodes(function):
        for name in _bound(node):
            if name not in outer:
                names.setdefault(name, f"<{depth}.{len(names)}>")
    return names


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
        return [node.id]
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        return [node.name]
    return [node.rest] if isinstance(node, ast.MatchMapping) and node.rest else []


def _own_nodes(function: Scope) -> Iterator[ast.AST]:
    """The nodes of a function in their order, those of functions and classes inside it left out."""
    body = function.body if isinstance(function.body, list) else [function.body]
    waiting: list[ast.AST] = list(reversed(body))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*_SCOPES, ast.ClassDef)):
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))
