"""What the panel makes of an exception: words of a check, or a crash that came from beneath it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.faults.matrix import panel as module
from pytest_qvl.faults.matrix.panel import CRASHED, REFUSED, UNDECIDED, judge
from pytest_qvl.faults.subject import Subject, embedded
from pytest_qvl.samples import make_batch

CASE: Any = SimpleNamespace(subject=embedded())


@pytest.fixture
def said_by(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The panel's verdict where its only check does what is given."""

    def verdict(check: Any) -> str:
        monkeypatch.setattr(module, "all_checks", lambda _device="cpu": {"a check": lambda _case: check()})
        return judge(CASE, "a check").outcome

    return verdict


def test_a_value_error_of_this_package_is_words_of_the_check(said_by: Any) -> None:
    assert said_by(lambda: make_batch(None, [])) == REFUSED


def test_a_value_error_of_a_library_in_a_folder_of_our_name_is_a_crash(said_by: Any, tmp_path: Path) -> None:
    """A clone of this repository is called like the package, and its virtual environment lies inside."""
    file = tmp_path / "pytest_qvl" / "site-packages" / "library.py"
    file.parent.mkdir(parents=True)
    file.write_text("def fail():\n    raise ValueError('from beneath')\n")
    spec = importlib.util.spec_from_file_location("library", file)
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    assert said_by(library.fail) == CRASHED


def test_a_check_that_cannot_judge_is_neither(said_by: Any) -> None:
    def cannot() -> None:
        raise CannotJudge("no picture")

    assert said_by(cannot) == UNDECIDED


def test_cuda_has_the_check_of_memory_as_well() -> None:
    from pytest_qvl.faults.matrix.work import Plan, tasks

    assert set(module.all_checks("cuda")) - set(module.all_checks()) == {"peak_vram"}
    asked = {task.key for task in tasks(Plan(Subject.of("embedded", "cuda"))) if task.part == "health"}
    assert "peak_vram" in asked
