"""The workflows are valid for GitHub, by its published schema, and call the plugin with flags that it has."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qvl.cli import parser
from pytest_qvl.faults.command import MATRIX_ONLY
from pytest_qvl.options import SETTINGS

ROOT = Path(__file__).parents[2]
TO_COPY = ROOT / "docs" / "gpu-workflow.yml"
CI = ROOT / ".github" / "workflows" / "ci.yml"
RELEASE = ROOT / ".github" / "workflows" / "release.yml"
WORKFLOWS = (TO_COPY, CI, RELEASE)


def job(name: str) -> str:
    """The text of one job of ``ci.yml``."""
    (found,) = re.findall(rf"^  {name}:\n(?:(?:    .*)?\n)+", CI.read_text(), flags=re.MULTILINE)
    return str(found)


def command(text: str) -> argparse.Namespace:
    """What the one call of ``pytest-qvl`` in a job asks for, read by the real parser."""
    (line,) = re.findall(r"run: pytest-qvl (.*)$", text, flags=re.MULTILINE)
    return parser().parse_args(shlex.split(line))


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


def test_every_night_the_whole_matrix_is_run_and_kept() -> None:
    asked, text = command(job("faults")), job("faults")
    assert asked.matrix
    assert not [name for name in (*MATRIX_ONLY, "isa") if name != "out" and getattr(asked, name)], "the whole matrix"
    assert asked.docs == Path("docs")
    assert {f"{asked.out}*", "docs/faults.md", "docs/faults.svg"} <= set(text.split())
    assert "github.event_name == 'schedule'" in text
    assert "[plots]" in text, "the figure is drawn"


def test_every_night_a_thousand_healthy_variations_are_run_and_kept() -> None:
    asked, text = command(job("healthy")), job("healthy")
    assert (asked.healthy, asked.isa, asked.minutes) == (1000, "all", None)
    assert f"{asked.out}*" in text.split()
    assert "github.event_name == 'schedule'" in text


def test_the_page_has_the_commands_of_the_nightly_jobs() -> None:
    page = (ROOT / "docs" / "ci.md").read_text()
    for name in ("faults", "healthy"):
        (line,) = re.findall(r"run: (pytest-qvl .*)$", job(name), flags=re.MULTILINE)
        assert f"| `{name}` | `{line}` |" in page


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_actions_are_pinned_to_a_commit_and_say_which_release_it_is(file: Path) -> None:
    used = re.findall(r"uses: (.*)$", file.read_text(), flags=re.MULTILINE)
    assert used
    assert not [one for one in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one)]


def test_one_action_has_one_commit() -> None:
    used = {
        one
        for file in WORKFLOWS
        for one in re.findall(r"uses: ([^/]+/[^/@]+)[^@]*@(.*)$", file.read_text(), re.MULTILINE)
    }
    assert len(used) == len(dict(used))


def test_environments_of_tox_that_workflows_ask_for_exist() -> None:
    defined = set(re.findall(r"^\[testenv:(.*)\]$", (ROOT / "tox.ini").read_text(), flags=re.MULTILINE))
    asked = {
        name for file in WORKFLOWS for name in re.findall(r"run: tox -e ([\w-]+)$", file.read_text(), re.MULTILINE)
    }
    assert {"audit", "prereleases", "release"} <= asked <= defined


def test_only_the_job_that_uploads_may_sign_and_nothing_else() -> None:
    before, publish = RELEASE.read_text().split("  publish:\n")
    assert "permissions: {}" in before and "id-token" not in before and "attestations" not in before
    assert "checkout" not in publish and "run:" not in publish, "no code of the repository runs where it may sign"
