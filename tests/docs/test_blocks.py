"""Every block of code in README and the documentation does what the page says."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sybil", reason="sybil, of the extra test, is not installed")

from pytest_qvl.cli import parser
from pytest_qvl.options import SETTINGS

from . import givens
from .blocks import ROOT, Block, blocks_of, pages, read

BLOCKS = [block for page in pages() for block in blocks_of(page)]
FLAGS = {setting.flag for setting in SETTINGS} | {f"--no-{s.flag[2:]}" for s in SETTINGS if s.switch}
COMMAND_TIMEOUT_S = 900


def parameter(block: Block) -> Any:
    """The block with its marks: whether it is run here, and if not, why."""
    said, marks = block.said, []
    if reason := said.get("shown"):
        marks.append(pytest.mark.skip(reason=f"shown: {reason}"))
    elif "network" in said:
        marks.append(pytest.mark.skip(reason=f"needs the network{': ' * bool(said['network'])}{said['network']}"))
    elif missing := [name for name in re.split(r"[,\s]+", said.get("needs", "")) if name and not find_spec(name)]:
        marks.append(pytest.mark.skip(reason=f"needs {', '.join(missing)}, which is not installed"))
    if "gpu" in said:
        marks += [pytest.mark.gpu, pytest.mark.skipif(not _cuda(), reason=f"needs a GPU: {said['gpu'] or 'CUDA'}")]
    if said.keys() & {"slow", "gpu"}:
        marks.append(pytest.mark.slow)
    return pytest.param(block, id=block.name, marks=marks)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.mark.parametrize("block", [parameter(block) for block in BLOCKS])
def test_block(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "given" in block.said:
        for name in block.said["given"].split(", "):
            getattr(givens, name.replace("-", "_"))(tmp_path)
    if block.language != "python":
        run_console(block)
    elif "as" in block.said:
        (tmp_path / block.said["as"]).write_text(block.source, encoding="utf-8")
        run_console(Block(block.page, block.line, "console", block.said["run"], block.said))
    else:
        monkeypatch.syspath_prepend(tmp_path)
        run_python(block, getattr(givens, block.said["before"])(tmp_path) if "before" in block.said else {})
        for name in {file.stem for file in tmp_path.glob("*.py")}:
            sys.modules.pop(name, None)


def run_console(block: Block) -> None:
    """Run each command by bash in the current folder, and compare output that is shown."""
    folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "80"}
    environment = {name: value for name, value in environment.items() if not name.startswith(("PYTEST_", "QVL_"))}
    commands = block.commands
    for number, (command, output) in enumerate(commands):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=COMMAND_TIMEOUT_S,
        )
        said = f"{block.name}: {command}\n{done.stdout}{done.stderr}"
        expected = int(block.said.get("exits", 0)) if number == len(commands) - 1 else 0
        assert done.returncode == expected, f"exit status {done.returncode} of {said}"
        assert shown(output, done.stdout), f"other output than the page shows:\n{output}\nof {said}"


def shown(expected: str, got: str) -> bool:
    """Whether the output is what a page shows of it; ``...`` stands for anything."""
    rest = " ".join(got.split())
    for part in filter(None, (" ".join(part.split()) for part in expected.split("..."))):
        _, found, rest = rest.partition(part)
        if not found:
            return False
    return True


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block of Python; its lines in a traceback are those of the page."""
    code = compile("\n" * (block.line - 1) + block.source, str(ROOT / block.page), "exec")
    wanted = block.said.get("raises")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a reader's script does not make errors of what libraries warn of
            exec(code, {"__name__": "block", **names})
    except Exception as error:
        if type(error).__name__ != wanted:
            pytest.fail(f"{block.name}: {''.join(traceback.format_exception(error)[-3:])}", pytrace=False)
    else:
        assert wanted is None, f"{block.name} raised no {wanted}"


def commands_in(block: Block) -> list[list[str]]:
    """Words of the commands of this package in a console block."""
    lines = [line for command, _ in block.commands for line in command.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if re.search(r"\b(pytest|pytest-qvl)\b", line)]
    return [word for word in words if word]


@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in BLOCKS if b.language == "python"])
def test_python_can_be_read(block: Block) -> None:
    ast.parse(block.source)


@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in BLOCKS if b.language != "python"])
def test_commands_can_be_read(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags of pytest exist, and the real parser reads the subcommands."""
    for words in commands_in(block):
        flags = {word.partition("=")[0] for word in words if word.startswith(("--qvl", "--no-qvl"))}
        assert flags <= FLAGS, f"{block.name}: no such flag"
        if words[0].endswith("pytest-qvl"):
            try:
                parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{block.name}: {capsys.readouterr().err}", pytrace=False)


def test_a_comment_that_nobody_understands_is_refused() -> None:
    with pytest.raises(ValueError, match="nobody understands 'slwo'"):
        read("<!-- block: slwo -->\n```python\n1\n```\n", "page.md")
    with pytest.raises(ValueError, match="stands before no block"):
        read("<!-- block: slow -->\nText.\n\n```python\n1\n```\n", "page.md")


def test_what_a_comment_says_is_read() -> None:
    text = "Text\n\n<!-- block: slow; given adapter; exits 1 -->\n```console\n$ false\na ... b\n```\n"
    (block,) = read(text, "page.md")
    assert (block.line, block.said) == (5, {"slow": "", "given": "adapter", "exits": "1"})
    assert block.commands == [("false", "a ... b\n")]
    assert shown("a ... b\n", "a c\n d b\ne")
    assert not shown("a ... b\n", "a c")
    assert not shown("... " + "a ... " * 20 + "c", "a b " * 100), "in one pass, however often anything may stand"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (("console", "false\n", {}), "exit status 1"),
        (("console", "$ echo a\nb\n", {}), "other output than the page shows"),
        (("python", "1 / 0\n", {}), "ZeroDivisionError"),
        (("python", "pass\n", {"raises": "ValueError"}), "raised no ValueError"),
    ],
)
def test_a_block_that_does_something_else_is_red(source: Any, says: str) -> None:
    block = Block("page.md", 1, *source)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=says):
        run_console(block) if block.language == "console" else run_python(block, {})
