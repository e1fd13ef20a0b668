"""An output that cannot be written is one line and exit code 2, before any work."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_qvl.cli import main
from pytest_qvl.outputs import check_beside, check_file, check_folder, replace_file

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = {
    "--timeline": ["forecast", "--timeline", "{}/x.svg"],
    "--out": ["faults", "--matrix", "--out", "{}/x.json"],
    "--docs": ["faults", "--matrix", "--docs", "{}/docs"],
    "FOLDER": ["synthesize", "qwen2.5-vl-7b", "{}/made"],
}


@pytest.mark.parametrize(("option", "command"), COMMANDS.items())
def test_refused_before_the_work(
    option: str,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for work in (
        "vram.forecast.run.make_forecaster",
        "faults.matrix.runner.run",
        "models.sources.released.released_config",
    ):
        monkeypatch.delattr(f"pytest_qvl.{work}")
    file = tmp_path / "file"
    file.write_text("no folder")
    assert main([argument.format(file) for argument in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: {option}: " in line
    assert str(file) in line


def test_what_a_path_may_be(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    for name in ("there", "new"):
        check_file("--out", tmp_path / name)
    check_folder("--docs", tmp_path / "new/deep/er")
    with pytest.raises(ValueError, match=r"--out: there is no folder '.*/nope': make it first"):
        check_file("--out", tmp_path / "nope/x")
    for wrong in (tmp_path, tmp_path.__class__("/dev/null")):
        with pytest.raises(ValueError, match="not a regular file"):
            check_file("--out", wrong)
    with pytest.raises(ValueError, match=r"--docs: '.*/there' is not a folder"):
        check_folder("--docs", tmp_path / "there/docs")


def test_what_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written: it is read-only"):
        check_file("--out", tmp_path / "x")
    with pytest.raises(ValueError, match="cannot be written to: it is read-only"):
        check_folder("--docs", tmp_path / "x")
    with pytest.raises(ValueError, match=r"x' cannot be written: the folder '.*' is read-only for this user; name an"):
        check_beside(tmp_path / "new" / "x")


def test_a_file_below_a_file_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    check_beside(tmp_path / "there")
    check_beside(tmp_path / "new" / "er" / "x")
    with pytest.raises(ValueError, match=r"x' cannot be written: '.*/there' is not a folder"):
        check_beside(tmp_path / "there" / "x")


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "is a device or a pipe" in replace_file(pipe, "text")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
