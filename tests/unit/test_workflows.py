"""The workflows are valid for GitHub, by its published schema, and call the plugin with flags that it has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qvl.options import SETTINGS

ROOT = Path(__file__).parents[2]
TO_COPY = ROOT / "docs" / "gpu-workflow.yml"
WORKFLOWS = (TO_COPY, ROOT / ".github" / "workflows" / "ci.yml")


def lint(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        *map(str, files),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_workflows_are_valid() -> None:
    done = lint(*WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("runs-on:", "run-on:", "'runs-on' is a required property"),
        ("permissions:\n  contents: read\n", "permissions:\n  contents: sometimes\n", "permissions"),
        ("  push:\n", "  push:\n  push:\n", "duplicate key"),
    ],
    ids=["no runner", "no such permission", "key twice"],
)
def test_the_linter_sees_what_is_wrong(tmp_path: Path, right: str, wrong: str, says: str) -> None:
    text = TO_COPY.read_text()
    assert right in text
    (tmp_path / "broken.yml").write_text(text.replace(right, wrong))
    done = lint(tmp_path / "broken.yml")
    assert done.returncode == 1
    assert says in done.stdout + done.stderr


def test_flags_in_the_workflow_exist() -> None:
    flags = set(re.findall(r"--qvl-[a-z-]+", TO_COPY.read_text()))
    assert {"--qvl-require-gpu", "--qvl-record"} <= flags <= {setting.flag for setting in SETTINGS}
