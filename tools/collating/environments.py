"""One environment for each framework, outside the checkout. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from collating.frameworks import COMMON

if TYPE_CHECKING:
    from collating.frameworks import Framework

MARK = "qvl-collators.json"  # what an environment was made of
TOOLS = Path(__file__).resolve().parents[1]


def default_folder() -> Path:
    """Where environments are kept unless the command says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pytest-qvl" / "collators"


def environment(framework: Framework, envs: Path, index: str | None = None) -> Path:
    """The Python of a framework's environment, which is made where it is missing or was made of other versions.

    Args:
        framework: One of :data:`collating.frameworks.FRAMEWORKS`.
        envs: Folder of the environments.
        index: Searched beside the configured package index; PyTorch's own has CPU builds.

    Raises:
        subprocess.CalledProcessError: Something cannot be installed.
    """
    folder = envs / f"coll-{framework.name}"
    python, mark = folder / "bin" / "python", folder / MARK
    wanted = _digest(framework)
    if python.is_file() and mark.is_file() and json.loads(mark.read_text(encoding="utf-8"))["digest"] == wanted:
        return python
    uv = shutil.which("uv")
    _run([uv, "venv", "--clear", "--python", sys.executable, folder] if uv else [sys.executable, "-m", "venv", folder])
    install = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install", "-q"]
    install += ["--extra-index-url", index] if index else []
    _run([*install, *COMMON, *framework.requirements])
    if framework.bare:
        _run([*install, "--no-deps", *framework.bare])
    mark.write_text(json.dumps({"digest": wanted}) + "\n", encoding="utf-8")
    return python


def judge(framework: Framework, python: Path) -> dict[str, object]:
    """Run the judging of a framework in its environment; its record.

    Raises:
        RuntimeError: It ended without a record.
    """
    paths = os.pathsep.join((str(TOOLS), str(TOOLS.parent)))
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **framework.environ,
        "PYTHONPATH": paths,
    }
    command = [python, "-m", "collating.judging", framework.name]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{framework.title}: its judging ended with {done.returncode}:\n{done.stderr[-3000:]}")
    record: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return record


def _digest(framework: Framework) -> str:
    of = json.dumps([COMMON, framework.requirements, framework.bare])
    return hashlib.sha256(of.encode()).hexdigest()


def _run(command: list[object]) -> None:
    subprocess.run([str(part) for part in command], check=True)
