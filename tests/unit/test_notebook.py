"""The notebook for a T4 is what its source says, and its code compiles; ``tox -e notebook`` runs it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from pytest_qvl.cli import parser

SOURCE = Path(__file__).parents[2] / "examples" / "t4_notebook.py"
CELLS = json.loads(SOURCE.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]


def plain(cell: dict[str, object]) -> str:
    """A cell as the source has it: prose and magic are comments there."""
    lines = "".join(cell["source"]).splitlines()  # type: ignore[arg-type]
    if cell["cell_type"] == "code":
        return "\n".join(f"# {line}" if line.startswith("%") else line for line in lines)
    return "\n".join(f"# {line}".rstrip() for line in lines)


def test_the_notebook_is_what_its_source_says() -> None:
    _, *cells = re.split(r"^# %%.*\n", SOURCE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [cell.strip() for cell in cells] == [plain(cell) for cell in CELLS], "run python tools/notebook.py"


def test_nothing_that_a_run_printed_is_kept() -> None:
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell["cell_type"] == "code"], ids=lambda cell: cell["id"])
def test_cells_compile(cell: dict[str, object]) -> None:
    compile(plain(cell), str(cell["id"]), "exec")


def test_its_forecast_is_a_command_that_exists() -> None:
    found = [node for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)]
    (command,) = [ast.literal_eval(node.value) for node in found if ast.unparse(node.targets[0]) == "command"]
    assert command[0] == "pytest-qvl"
    parser().parse_args(command[1:])
