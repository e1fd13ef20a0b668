"""Reproducers for maintainers of other projects: short, whole, and with the output of a release."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qvl.releases import installed

PAGES = sorted((Path(__file__).parents[2] / "docs/upstream").glob("*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])


def parts(page: Path) -> tuple[str, dict[str, str]]:
    """The lines to run, and what they print in each release that the page has."""
    text = page.read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    said = re.findall(
        r"(?:^|Transformers )(\d+\.\d+\.\d+)[^\n]*\n\n```text\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE
    )
    return lines, dict(said)


@every_page
def test_a_reproducer_is_short_and_stands_alone(page: Path) -> None:
    lines, said = parts(page)
    compile(lines, page.name, "exec")
    assert len([line for line in lines.splitlines() if line.strip()]) <= 20
    assert "pytest_qvl" not in lines
    assert "5.24.0" in said


@pytest.mark.slow
@every_page
def test_it_still_prints_what_the_page_says(page: Path, tmp_path: Path) -> None:
    lines, said = parts(page)
    version = installed("transformers")
    if version not in said:
        pytest.skip(f"the page has no output of Transformers {version}")
    environ = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", lines]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    kept = [line for line in done.stdout.splitlines() if not line.startswith("{'")]  # what the Trainer logs
    assert kept == said[version].splitlines()
