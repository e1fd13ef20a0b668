"""Mutations of code: one expression of a function that runs, compiled anew and put into the live function."""

from __future__ import annotations

import ast
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.mutation.drawn import CODE, Mutation

if TYPE_CHECKING:
    import random

OPERATORS: dict[type[ast.AST], Callable[[], Any]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv},
}
SHOWN = 100  # characters of an expression
Change = Callable[[Any], None]


@dataclass(frozen=True)
class Site:
    """One way to change one expression.

    Attributes:
        file: Source file.
        function: Line at which the code of its function starts, and the function's name.
        node: Number of the expression among those of the file, in the order of ``ast.walk``.
        line: Line of the expression.
        change: What is done to it, a key of :data:`CHANGES`.
    """

    file: str
    function: tuple[int, str]
    node: int
    line: int
    change: str


def _constant(node: ast.Constant) -> None:
    value: Any = node.value
    if isinstance(value, bool):
        node.value = not value
    elif isinstance(value, int):
        node.value = value + 1
    else:
        node.value = value * 1.01 if value else 0.01


def _operator(node: Any) -> None:
    if isinstance(node, ast.Compare):
        node.ops[0] = OPERATORS[type(node.ops[0])]()
    else:
        node.op = OPERATORS[type(node.op)]()


def _arguments(node: ast.Call) -> None:
    node.args[0], node.args[1] = node.args[1], node.args[0]


def _keywords(node: ast.Call) -> None:
    first, second = node.keywords[:2]
    first.value, second.value = second.value, first.value


def _operands(node: ast.BinOp) -> None:
    node.left, node.right = node.right, node.left


def _elements(node: ast.Tuple) -> None:
    node.elts[0], node.elts[1] = node.elts[1], node.elts[0]


def _sign(node: ast.UnaryOp) -> None:
    node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.USub()


def _denied(node: ast.UnaryOp) -> None:
    node.op, node.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)


CHANGES: dict[str, tuple[Change, Callable[[ast.AST], bool]]] = {
    "constant": (_constant, lambda n: isinstance(n, ast.Constant) and isinstance(n.value, bool | int | float)),
    "operator": (
        _operator,
        lambda n: (
            (isinstance(n, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(n.op) in OPERATORS)
            or (isinstance(n, ast.Compare) and type(n.ops[0]) in OPERATORS)
        ),
    ),
    "arguments exchanged": (_arguments, lambda n: isinstance(n, ast.Call) and _plain(n.args)),
    "keywords exchanged": (
        _keywords,
        lambda n: isinstance(n, ast.Call) and len(n.keywords) > 1 and all(k.arg for k in n.keywords[:2]),
    ),
    "operands exchanged": (
        _operands,
        lambda n: isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub | ast.Div | ast.MatMult | ast.Pow),
    ),
    "elements exchanged": (
        _elements,
        lambda n: isinstance(n, ast.Tuple) and isinstance(n.ctx, ast.Load) and _plain(n.elts),
    ),
    "sign": (_sign, lambda n: isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.USub | ast.UAdd)),
    "denied": (_denied, lambda n: isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.Not)),
}


def _plain(given: list[ast.expr]) -> bool:
    return len(given) > 1 and not any(isinstance(one, ast.Starred) for one in given[:2])


@contextmanager
def lines_run(files: set[str]) -> Iterator[dict[str, set[int]]]:
    """Collect the lines of the files that run inside the block."""
    found: dict[str, set[int]] = {file: set() for file in files}

    def inside(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            found[frame.f_code.co_filename].add(frame.f_lineno)
        return inside

    def enter(frame: Any, _event: str, _: Any) -> Any:
        return inside if frame.f_code.co_filename in found else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield found
    finally:
        sys.settrace(before)


def sites_of(run: dict[str, set[int]]) -> list[Site]:
    """Every way to change one expression on a line that runs, in functions that can be reached."""
    found = []
    for file, lines in sorted(run.items()):
        reached = {(function.__code__.co_firstlineno, function.__name__) for function in _functions(file)}
        for function, node, number in _expressions(_parsed(file)):
            if node.lineno not in lines or function not in reached:
                continue
            fitting = [name for name, (_, fits) in CHANGES.items() if fits(node)]
            found += [Site(file, function, number, node.lineno, name) for name in fitting]
    return found


def draw_code(sites: list[Site], generator: random.Random) -> Mutation | None:
    """Change one expression; nothing if the change would not be one."""
    site = generator.choice(sites)
    tree = _parsed(site.file)
    node = next(node for _, node, number in _expressions(tree) if number == site.node)
    before = ast.unparse(node)
    CHANGES[site.change][0](node)
    ast.fix_missing_locations(tree)
    if ast.unparse(node) == before:
        return None
    code = next(_code_objects(compile(tree, site.file, "exec"), site.function), None)
    if code is None:
        return None
    line = _source(site.file).splitlines()[site.line - 1].strip()
    where = f"{Path(site.file).name}:{site.line}, {site.function[1]}"
    change = f"{before[:SHOWN]} becomes {ast.unparse(node)[:SHOWN]}"
    what = f"{where}, {site.change}: {change}{f' in {line[:SHOWN]}' * (line[:SHOWN] != before[:SHOWN])}"
    return Mutation(CODE, what, lambda: _replaced(site, code))


@contextmanager
def _replaced(site: Site, code: CodeType) -> Iterator[None]:
    functions = [f for f in _functions(site.file) if (f.__code__.co_firstlineno, f.__name__) == site.function]
    before = [(function, function.__code__) for function in functions]
    for function in functions:
        function.__code__ = code
    try:
        yield
    finally:
        for function, kept in before:
            function.__code__ = kept


def _parsed(file: str) -> ast.Module:
    """The tree of a file; a new one each time, because mutations write into it."""
    return ast.parse(_source(file))


@cache
def _source(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")


@cache
def _functions(file: str) -> list[FunctionType]:
    """The live functions of a file, whatever decorators have wrapped them in."""
    set_aside = bool(gc.get_freeze_count())
    gc.unfreeze()  # what somebody set aside (gc.freeze) is not among the objects
    try:
        return [one for one in gc.get_objects() if type(one) is FunctionType and one.__code__.co_filename == file]
    finally:
        if set_aside:
            gc.freeze()


def _expressions(tree: ast.Module) -> Iterator[tuple[tuple[int, str], Any, int]]:
    """Expressions and statements inside functions, with the function and a number; no annotations, nothing raised."""
    numbers = {id(node): number for number, node in enumerate(ast.walk(tree))}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
        for node in _inside(function.body):
            yield (first, function.name), node, numbers[id(node)]


def _inside(body: list[Any]) -> Iterator[Any]:
    """What a function computes: its nodes without functions of its own, annotations, what it raises, and docstrings."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Raise | ast.Assert | ast.Lambda):
            continue
        if isinstance(node, ast.expr | ast.stmt) and hasattr(node, "lineno"):
            yield node
        left_out = {"annotation"}
        for name, value in ast.iter_fields(node):
            if name not in left_out:
                yield from _inside([one for one in (value if isinstance(value, list) else [value]) if _is_node(one)])


def _is_node(value: Any) -> bool:
    return isinstance(value, ast.AST)


def _code_objects(code: CodeType, function: tuple[int, str]) -> Iterator[CodeType]:
    """The code of a function among those that a module's code holds, at any depth."""
    for one in code.co_consts:
        if isinstance(one, CodeType):
            if (one.co_firstlineno, one.co_name) == function:
                yield one
            yield from _code_objects(one, function)
