"""Whether a committed table still stands for the code: a digest of what decides its content."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# What only lists, prints or judges no model of the panel.
ASIDE = frozenset(
    {
        *("faults/cli.py", "faults/page.py", "faults/freshness.py", "faults/unreproduced.py", "faults/matrix.py"),
        *("checks/__init__.py", "checks/vram.py", "checks/forecast.py"),
    }
)


def definitions_digest() -> str:
    """Hash of the code of all checks, faults, variations and probes; comments and docstrings do not count."""
    found = hashlib.sha256()
    for folder in ("checks", "faults", "samples"):
        for file in sorted((PACKAGE / folder).glob("*.py")):
            name = file.relative_to(PACKAGE).as_posix()
            if name not in ASIDE:
                found.update(f"{name}\n{code_of(file.read_text(encoding='utf-8'))}\n".encode())
    return found.hexdigest()[:16]


def code_of(source: str) -> str:
    """Source without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            text = node.body[0]
            assert text.end_lineno is not None
            for row in range(text.lineno - 1, text.end_lineno):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())
