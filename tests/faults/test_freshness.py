"""The digest of what decides a verdict: what changes it, and what does not."""

from __future__ import annotations

import pytest

from pytest_qvl.faults import catalogue
from pytest_qvl.faults.matrix.freshness import (
    ASIDE,
    LINEAR_ATTENTION,
    PACKAGE,
    Definitions,
    deciding_definitions,
    deciding_files,
    definitions_digest,
    definitions_of,
    parted,
)

PLAIN = """
from a import b
LIMIT = 4
FIRST = b(1)

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

def again(rows):
    return check(rows, factor=3)
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
    "a parameter that no call spells out": ("again(rows):\n    return check(rows", "again(r):\n    return check(r"),
    "another name for an import": (
        "from a import b\nLIMIT = 4\nFIRST = b(1)",
        "from a import b as c\nLIMIT = 4\nFIRST = c(1)",
    ),
    "an import that nobody needs": ("from a import b", "import json\nfrom a import b"),
    "an import further down": ("LIMIT = 4\nFIRST", "LIMIT = 4\nfrom a import b\nFIRST"),
    "the order of definitions": ("LIMIT = 4\nFIRST = b(1)", "FIRST = b(1)\nLIMIT = 4"),
    "a comprehension's variable": ("[value for value in model]", "[one for one in model]"),
}
OTHER = {
    "a number": ("LIMIT = 4", "LIMIT = 5"),
    "words of a message": ("rows moved", "rows went"),
    "a global's name": ("LIMIT", "BOUND"),
    "a parameter's name that a call spells out": ("factor", "share"),
    "an argument's name": ("check(rows, factor=3)", "check(rows, share=3)"),
    "what is called": ("return check(rows", "return max(rows"),
    "a default": ("*, factor=2", "*, factor=5"),
    "what is imported": ("from a import b", "from a import c as b"),
    "whose it is": ("from a import b", "from other import b"),
    "a definition that goes": ("FIRST = b(1)\n", ""),
    "a comparison": ("worst > LIMIT", "worst >= LIMIT"),
    "which variable is read": ("max(worst, row)", "max(row, row)"),
    "whose variable is changed": ("        nonlocal worst\n", "        worst = 0\n"),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_does_not_count(change: tuple[str, str]) -> None:
    assert change[0] in PLAIN
    assert definitions_of([PLAIN.replace(*change)]) == definitions_of([PLAIN])


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_counts(change: tuple[str, str]) -> None:
    assert change[0] in PLAIN
    assert definitions_of([PLAIN.replace(*change)]) != definitions_of([PLAIN])


def test_a_definition_may_move_with_the_imports_of_those_who_use_it() -> None:
    tool, user = "def tool(n):\n    return n + 1\n", "def user():\n    {}return tool(2)\n"
    there = ["from pytest_qvl.faults.a import tool\n" + user.format(""), tool, "OTHER = 1\n"]
    elsewhere = [
        "OTHER = 1\n" + tool,
        user.format("from pytest_qvl.checks.b import tool as t\n    ").replace("tool(", "t("),
    ]
    assert definitions_of(there) == definitions_of(elsewhere) == definitions_of([user.format("") + tool, "OTHER = 1\n"])


def test_a_parameter_named_in_a_text_keeps_its_name() -> None:
    """As ``@check`` finds a batch among the arguments by the parameter's name."""
    finds = "def check(function):\n    return signature(function).parameters['batch']\n"
    assert definitions_of([finds, "def f(batch): return batch"]) != definitions_of([finds, "def f(rows): return rows"])


def test_what_is_left_aside_is_there() -> None:
    """A module that moves takes its name in this list along; else it would begin to count."""
    assert [name for name in ASIDE | LINEAR_ATTENTION if not (PACKAGE / name).is_file()] == []


def test_everything_that_decides_a_verdict_is_read() -> None:
    names = {file.relative_to(PACKAGE).as_posix() for file in deciding_files()}
    assert {
        "evidence.py",
        "oracles/elementary.py",
        "checks/routing.py",
        "faults/definitions/routing.py",
        "samples/scenes.py",
        "models/state.py",
    } <= names
    assert "models/backends/transformers.py" in names  # folders inside folders
    assert "faults/matrix/page.py" not in names
    assert len(definitions_digest()) == 16


def test_linear_attention_decides_for_models_that_have_it() -> None:
    everything = set(deciding_files("embedded:qwen3.5"))
    assert everything == set(deciding_files("synthetic:qwen3.5-9b")) == set(deciding_files("some/folder"))
    for model in ("embedded", "embedded:qwen3-vl", "synthetic:qwen2.5-vl-7b"):
        left = everything - set(deciding_files(model))
        assert {file.relative_to(PACKAGE).as_posix() for file in left} == LINEAR_ATTENTION, model
    assert definitions_digest("embedded:qwen3.5") != definitions_digest()


FAULTS = """
from pytest_qvl.faults.catalogue import fault

@fault("loud", "Too loud.", target="model")
def _loud(case):
    shout(case)
    yield

@fault("louder", "Louder.", target="model")
def _louder(case):
    with _loud(case):
        yield

@fault("quiet", "Too quiet.", target="model")
def _quiet(case):
    whisper(case)
    yield

def shout(case):
    case.volume = 11
"""


def test_a_fault_is_parted_from_the_rest_unless_something_else_uses_it():
    common, alone = parted(definitions_of([FAULTS]))
    assert set(alone) == {"louder", "quiet"}
    changed, others = parted(definitions_of([FAULTS.replace("whisper", "mumble")]))
    assert changed == common
    assert {name for name in alone if alone[name] != others[name]} == {"quiet"}
    assert parted(definitions_of([FAULTS.replace("11", "12")]))[0] != common
    assert parted(definitions_of([FAULTS.replace("shout(case)\n    yield", "yield")]))[0] != common


def test_the_digest_is_of_all_of_them():
    now = deciding_definitions()
    assert definitions_digest() == now.digest
    assert set(now.faults) <= set(catalogue()) and len(now.faults) > 200
    for other in (Definitions("0", now.faults), Definitions(now.common, {**now.faults, "compute-float32": "0"})):
        assert other.digest != now.digest
