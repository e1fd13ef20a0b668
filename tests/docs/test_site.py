"""The documentation site builds without a warning, and its reference says what the code says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qvl.checks.declared import declared
from pytest_qvl.options import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns("__pycache__", ".*", "_build", "*.safetensors", "dist", "build")


def build(source: Path, out: Path, builder: str = "html") -> subprocess.CompletedProcess[str]:
    """The command of ``tox -e docs``."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", builder]
    return subprocess.run(
        [*command, "-d", str(out / "doctrees"), str(source), str(out / builder)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo", reason="the extra docs is not installed")
    pytest.importorskip("myst_parser", reason="the extra docs is not installed")
    source = copy(tmp_path)
    made = build(source, tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    page = (tmp_path / "html" / "reference" / "checks.html").read_text(encoding="utf-8")
    assert set(declared()) <= set(re.findall(r'id="pytest_qvl\.checks\.(\w+)"', page))
    page = (tmp_path / "html" / "reference" / "command-line.html").read_text(encoding="utf-8")
    assert all(setting.flag in page and setting.env in page for setting in SETTINGS)
    checked = build(source, tmp_path, "linkcheck")
    assert (checked.returncode, checked.stderr) == (0, "")

    (source / "start.md").write_text("# Start\n\n[gone](nowhere.md) and [no section](limits.md#nothing)\n", "utf-8")
    broken = build(source, tmp_path)
    assert broken.returncode == 1
    assert "nowhere.md" in broken.stderr
    assert "limits#nothing" in broken.stderr or "'nothing'" in broken.stderr


def copy(to: Path) -> Path:
    """The documentation with what it links to, so that a build writes nothing into the checkout."""
    for name in ("docs", "examples", ".github", "changelog.d", "tests", "pytest_qvl", "tools", "fixtures"):
        shutil.copytree(ROOT / name, to / name, ignore=NOT_COPIED)
    for file in ROOT.glob("*.*"):
        if file.is_file():
            shutil.copy2(file, to)
    return to / "docs"
