"""The definitions of a module as text, less what changes nothing.

Left out are docstrings, annotations, imports and what stands under ``if TYPE_CHECKING``; names of variables and of
parameters that nobody uses from outside are numbers; an imported name is called as it is called where it comes from.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

PACKAGE = __name__.partition(".")[0]
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Fields that say nothing of what is done; the rest is written out with its name.
_SILENT = {"annotation", "returns", "type_comment", "type_params", "type_ignores", "kind", "ctx"}


def definitions(tree: ast.Module, spoken: frozenset[str]) -> list[str]:
    """Each statement at the top of a module as text; Python's own ``ast.dump`` differs between its releases.

    Args:
        tree: The module.
        spoken: Names under which parameters may be used from outside, see :func:`spoken_names`.
    """
    body = tree.body if ast.get_docstring(tree, clean=False) is None else tree.body[1:]
    scope = _Scope(spoken, (_imported(_own_nodes(tree.body)),))
    return [_text(statement, scope) for statement in body if not _is_silent(statement)]


def spoken_names(tree: ast.Module) -> set[str]:
    """Names that calls give arguments by, and all text that could name one: ``signature.parameters["batch"]``."""
    nodes = list(ast.walk(tree))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg} | {
        text for text in texts if text.isidentifier()
    }


@dataclass(frozen=True)
class _Scope:
    """What the names in one function stand for: its own, and those of the functions around it.

    Attributes:
        spoken: Names that parameters keep.
        names: What each name is written as, by function from the outside to the inside.
    """

    spoken: frozenset[str]
    names: tuple[dict[str, str], ...]

    def inside(self, function: Function) -> _Scope:
        return _Scope(self.spoken, (*self.names, _local_names(function, len(self.names), self.spoken)))

    def known(self, name: str) -> str:
        return next((names[name] for names in reversed(self.names) if name in names), name)


def _text(node: object, scope: _Scope) -> str:
    """A node of the syntax tree as text, without what decides nothing.

    Left out: docstrings, imports, annotations, positions and empty fields. Variables are written by number.
    """
    if isinstance(node, list):
        return "[" + ",".join(_text(item, scope) for item in node if not _is_silent(item)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Name):
        return f"Name({scope.known(node.id)})"
    inner = scope.inside(node) if isinstance(node, _FUNCTIONS) else scope
    fields = []
    for name, value in ast.iter_fields(node):
        if name in _SILENT or value is None or value == []:
            continue
        if name == "body" and isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            value = value[1:]  # noqa: PLW2901
        if _holds_names(node, name):
            fields.append(f"{name}={_renamed(value, inner)}")
        elif isinstance(value, ast.arguments):
            fields.append(f"{name}={_parameters(value, scope, inner)}")
        else:  # decorators are evaluated outside of their function
            fields.append(f"{name}={_text(value, scope if name == 'decorator_list' else inner)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _parameters(arguments: ast.arguments, outer: _Scope, inner: _Scope) -> str:
    """Names as they are inside the function, defaults as they are evaluated outside of it."""
    fields = []
    for name, value in ast.iter_fields(arguments):
        given = value if isinstance(value, list) else [value] * (value is not None)
        shown = [inner.known(one.arg) if isinstance(one, ast.arg) else _text(one, outer) for one in given]
        fields.append(f"{name}={shown}")
    return f"arguments({','.join(fields)})"


def _is_silent(node: object) -> bool:
    """Whether a statement decides nothing: an import, or ``if TYPE_CHECKING:``."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.Import | ast.ImportFrom)


def _holds_names(node: ast.AST, field: str) -> bool:
    """Whether a field of a node that holds text names variables."""
    return (
        (isinstance(node, ast.Nonlocal) and field == "names")
        or (isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and field == "name")
        or (isinstance(node, ast.MatchMapping) and field == "rest")
    )


def _renamed(value: object, scope: _Scope) -> str:
    return ",".join(scope.known(str(name)) for name in (value if isinstance(value, list) else [value]))


def _local_names(function: Function, depth: int, spoken: frozenset[str]) -> dict[str, str]:
    """A function's parameters and variables under their numbers, but for parameters with a name that is used."""
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    names: dict[str, str] = {}
    for argument in given:
        if argument is not None:
            names[argument.arg] = argument.arg if argument.arg in spoken else f"<{depth}.{len(names)}>"
    nodes = list(_own_nodes(function.body if isinstance(function.body, list) else [function.body]))
    outer = {name for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names}
    names |= _imported(nodes)
    for node in nodes:
        for name in _bound(node):
            if name not in outer:
                names.setdefault(name, f"<{depth}.{len(names)}>")
    return names


def _imported(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """Names that imports bind, as they are called where they come from; those of this package without the module.

    So a definition that moves to another module is the same for those who import it.
    """
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            own = node.level or (node.module or "").partition(".")[0] == PACKAGE
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name if own else f"{node.module}.{alias.name}"
    return names


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
        return [node.id]
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        return [node.name]
    return [node.rest] if isinstance(node, ast.MatchMapping) and node.rest else []


def _own_nodes(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of a module or function in their order, those of functions and classes inside it left out."""
    waiting: list[ast.AST] = list(reversed(body))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))
