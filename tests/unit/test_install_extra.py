"""What a message says to install is on the package index, before the first release of this package as after it."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pytest_qvl
from pytest_qvl.releases import install_extra

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", ["plots", "photos", "unsloth"])
def test_the_command_installs_what_the_extra_lists(extra: str) -> None:
    words = shlex.split(install_extra(extra))
    assert words[:2] == ["pip", "install"]
    assert {_pair(word) for word in words[2:]} == {_pair(text) for text in EXTRAS[extra]}


def test_without_metadata_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_qvl.releases.THIS", "pytest-qvl-that-is-not-installed")
    assert install_extra("plots") == "install what pytest-qvl-that-is-not-installed's extra 'plots' lists"


def test_no_message_installs_this_package_by_its_name() -> None:
    files = list(Path(pytest_qvl.__file__).parent.rglob("*.py"))
    assert len(files) > 100
    assert [file.name for file in files if re.search(r"install.*pytest-qvl\[", file.read_text(encoding="utf-8"))] == []


def _pair(text: str) -> tuple[str, str]:
    requirement = Requirement(text)
    return re.sub(r"[-_.]+", "-", requirement.name), str(requirement.specifier)
