"""Whose code a frame runs and what its file is called, wherever it was installed."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.checks.support import code_places
from pytest_qvl.checks.support.code_places import file_of, is_own

if TYPE_CHECKING:
    from pathlib import Path


def frame_of(function: Any, *arguments: Any) -> types.FrameType:
    """The innermost frame of a call that raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it raises
        function(*arguments)
    found = caught.value.__traceback__
    while found is not None and found.tb_next is not None:
        found = found.tb_next
    assert found is not None
    return found.tb_frame


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("overlay/site_like/pack/models/modeling_x.py", "pack.models.modeling_x"),
        ("overlay/pack/models/__init__.py", "pack.models"),
        ("overlay/alone.py", "alone"),
    ],
)
def test_a_file_is_named_as_its_module_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, module: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("def fail():\n    raise RuntimeError\n")
    namespace: dict[str, Any] = {"__name__": module}
    exec(compile(path.read_text(), path, "exec"), namespace)
    frame = frame_of(namespace["fail"])
    assert file_of(frame) == file.partition("/")[2].removeprefix("site_like/")
    assert not is_own(frame)


def test_a_script_keeps_its_path(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def fail():\n    raise RuntimeError\n", path, "exec"), namespace)
    assert file_of(frame_of(namespace["fail"])) == str(path)


def test_own_code_is_told_by_the_folder_of_the_package() -> None:
    frame = frame_of(code_places.is_own, None)
    assert is_own(frame)
    assert file_of(frame) == "pytest_qvl/checks/support/code_places.py"
    assert not is_own(sys._getframe())
