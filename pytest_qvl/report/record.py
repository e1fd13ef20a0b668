"""The JSON record of one run: what was measured, and on what.

Schema ``pytest-qvl/record/2``. Checks are keyed by model, device, check and parameters, not by node id, which changes
with the folder that pytest was started in. ``seconds_by_test`` has set-up, call and tear-down of every test that uses
a model: shared fixtures count for the test that came first. ``promises`` has the state of every promise for every
model, as in the summary (since version 2). ``vram`` has the peaks of the whole process and of each
phase. Written atomically, also when tests fail, as the last thing of the session: the exit status is the process's.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.session.report_data import report_data

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

SCHEMA = "pytest-qvl/record/2"
PACKAGES = (
    "pytest-qvl",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "unsloth",
    "unsloth_zoo",
    "triton",
    "tokenizers",
    "pillow",
    "numpy",
    "pytest",
)
# What changes how torch, CUDA's libraries and Unsloth compute or allocate, where it is set.
VARIABLES = (
    "CI",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "UNSLOTH_COMPILE_DISABLE",
)


class Record:
    """Listens to reports (on the controller under xdist) and writes the file at the end of the run.

    Args:
        path: The file.
        settings: As the header shows them.
        parts: Asked at the end for what else belongs into the record, by key.
    """

    def __init__(self, path: Path, settings: list[str], parts: Sequence[Callable[[], dict[str, Any]]] = ()) -> None:
        self._path = path
        self._settings = settings
        self._parts = parts
        self._seconds: dict[tuple[str | None, str], dict[str, float]] = {}
        self._checks: list[dict[str, Any]] = []
        self._tests: dict[str, int] = {}
        self._skipped: dict[str, int] = {}
        self._started = datetime.now(UTC)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take outcome, seconds and evidence off a report."""
        data = report_data(report)
        if data.session_verdict is not None:  # has an entry of its own
            return
        if report.when == "call" or report.outcome != "passed":
            outcome = report.outcome if report.when == "call" or report.skipped else "error"
            self._tests[outcome] = self._tests.get(outcome, 0) + 1
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._skipped[reason] = self._skipped.get(reason, 0) + 1
        finding = data.finding
        if finding is None:
            return
        test = report.nodeid.rsplit("::", 1)[-1]
        if report.when in ("setup", "call", "teardown"):  # not the report of a worker that crashed
            self._seconds.setdefault((finding.target, test), {})[report.when] = round(report.duration, 3)
        common = {
            "target": finding.target,
            "test": test,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
        }
        for evidence in finding.evidence:
            self._checks.append({**common, **evidence.as_dict()})
        for check, reason in finding.not_judged:
            self._checks.append({**common, "check": check, "not_judged": reason})

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Write the file, after whoever may still change the exit status; without a record it is not green."""
        try:
            return (yield)
        finally:
            problem = self._write(session)
            if problem:
                if session.exitstatus == pytest.ExitCode.OK:
                    session.exitstatus = pytest.ExitCode.TESTS_FAILED
                self._say(session.config, f"qvl_record: {problem}")

    @staticmethod
    def _say(config: pytest.Config, line: str) -> None:
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None:
            print(line, file=sys.stderr)
        else:
            reporter.ensure_newline()
            reporter.write_line(line, red=True, bold=True)

    def _write(self, session: pytest.Session) -> str:
        finished = datetime.now(UTC)
        return write_json(
            self._path,
            {
                "schema": SCHEMA,
                "started": self._started.isoformat(timespec="seconds"),
                "seconds": round((finished - self._started).total_seconds(), 1),
                "exit_status": int(session.exitstatus),
                "command": ["pytest", *map(str, session.config.invocation_params.args)],
                "settings": self._settings,
                "environment": environment(session.config.rootpath),
                "tests": self._tests,
                "skipped": self._skipped,
                "checks": self._checks,
                "seconds_by_test": [
                    {"target": target, "test": test, **seconds} for (target, test), seconds in self._seconds.items()
                ],
                **{key: value for part in self._parts for key, value in part().items()},
            },
        )


def vram_for_record(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """VRAM of the one process that ran the tests; of each, by name, where it started others for that."""
    started = [{"process": one["process"], **one["vram"]} for one in facts if one["process"]]
    return {"vram": {"processes": started} if started else next((one["vram"] for one in facts), {})}


def environment(folder: Path) -> dict[str, Any]:
    """Versions, machine, GPUs and the commit of ``folder``; nothing that names a host or a user."""
    from pytest_qvl.gpu.nvml import driver

    inventory = driver().inventory()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "driver": inventory.driver or None,
        "gpus": [
            {"name": gpu.name, "total": gpu.total, "compute_capability": list(gpu.compute_capability)}
            for gpu in inventory.gpus
        ],
        "commit": _commit(folder),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit that a CI service names (a checkout may have no history there), else what git says of the folder."""
    named = next((os.environ[name] for name in ("GITHUB_SHA", "CI_COMMIT_SHA") if os.environ.get(name)), None)
    if named:
        return named
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def write_json(path: Path, data: Any) -> str:
    """Write JSON so that a reader sees the old file or the new one, never half of one.

    Args:
        path: The file; made with the permissions that the process's umask leaves.
        data: What to write.

    Returns:
        Why it could not be written, in one sentence; nothing is left beside the old file then. Empty if it was.
    """
    text = json.dumps(data, indent=1, sort_keys=False, default=str, allow_nan=True) + "\n"
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("x", encoding="utf-8") as stream:
            stream.write(text)
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        return f"{path} could not be written: {error.strerror or error}"
    return ""
