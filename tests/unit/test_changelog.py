"""News of the next release: files that towncrier takes, of the kinds that their page explains."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEWS = ROOT / "changelog.d"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["towncrier"]
KINDS = [kind["directory"] for kind in SETTINGS["type"]]


def test_news_have_names_that_towncrier_takes() -> None:
    """It leaves out, without a word, what has another kind."""
    named = re.compile(rf"(\d+|\+[\w-]+)(\.\d+)?\.({'|'.join(KINDS)})\.md")
    files = [file.name for file in NEWS.iterdir() if file.name != "README.md"]
    assert not [name for name in files if not named.fullmatch(name)]


def test_the_page_of_news_has_every_kind() -> None:
    assert re.findall(r"^\| `(\w+)` \|", (NEWS / "README.md").read_text(encoding="utf-8"), re.MULTILINE) == KINDS


def test_a_release_has_a_place_in_the_changelog() -> None:
    assert (ROOT / SETTINGS["filename"]).read_text(encoding="utf-8").count(SETTINGS["start_string"]) == 1
