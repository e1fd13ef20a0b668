"""The digest of what decides a verdict: what changes it, and what does not."""

from __future__ import annotations

import pytest

from pytest_qvl.faults.freshness import PACKAGE, code_of, deciding_files, definitions_digest

PLAIN = """
from a import b
LIMIT = 4

def check(model, *, factor=2):
    worst = 0
    for row in model:
        worst = max(worst, row)
    def inner(shift):
        nonlocal worst
        worst += shift
        return [value for value in model]
    if worst > LIMIT:
        raise ValueError(f"{worst} rows moved")
    return inner
"""

SAME = {
    "comments": ("LIMIT = 4", "LIMIT = 4  # of course"),
    "docstrings": ("    worst = 0\n", '    """Says what.\n\n    And why.\n    """\n    worst = 0\n'),
    "annotations": ("def check(model,", "def check(model: list[int],"),
    "imports for typing": ("LIMIT = 4", "if TYPE_CHECKING:\n    import torch\nLIMIT = 4"),
    "layout": ("max(worst, row)", "max(\n            worst,\n            row,\n        )"),
    "a local variable's name": ("worst", "largest"),
    "a loop variable's name": (
        "row in model:\n        worst = max(worst, row)",
        "r in model:\n        worst = max(worst, r)",
    ),
    "a comprehension's variable": ("[value for value in model]", "[one for one in model]"),
}
OTHER = {
    "a number": ("LIMIT = 4", "LIMIT = 5"),
    "words of a message": ("rows moved", "rows went"),
    "a global's name": ("LIMIT", "BOUND"),
    "a parameter's name, which callers may use": ("model", "given"),
    "a default": ("factor=2", "factor=3"),
    "an import": ("from a import b", "from a import c as b"),
    "a comparison": ("worst > LIMIT", "worst >= LIMIT"),
    "which variable is read": ("max(worst, row)", "max(row, row)"),
    "whose variable is changed": ("        nonlocal worst\n", "        worst = 0\n"),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_does_not_count(change: tuple[str, str]) -> None:
    assert change[0] in PLAIN
    assert code_of(PLAIN.replace(*change)) == code_of(PLAIN)


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_counts(change: tuple[str, str]) -> None:
    assert change[0] in PLAIN
    assert code_of(PLAIN.replace(*change)) != code_of(PLAIN)


def test_everything_that_decides_a_verdict_is_read() -> None:
    names = {file.relative_to(PACKAGE).as_posix() for file in deciding_files()}
    assert {"evidence.py", "checks/routing.py", "faults/routing.py", "samples/scenes.py", "models/state.py"} <= names
    assert "models/backends/transformers.py" in names  # folders inside folders
    assert "faults/page.py" not in names
    assert len(definitions_digest()) == 16
