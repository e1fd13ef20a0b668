"""The blocks of code in README and the documentation, and what a comment before each says about running it.

A block without a comment is run as it stands. ``<!-- block: slow; given adapter -->`` before it says more, in parts
that are separated by semicolons:

=================  =====================================================================================
``slow``           takes seconds or minutes: run with ``--slow``
``gpu``            computes on CUDA: run where there is one, and with ``--slow``
``network``        fetches something: never run by the tests
``needs NAME``     imports packages that the tests do not require: skipped where one is missing
``shown REASON``   never run by the tests, and why
``given NAME``     files that the reader has: a function of :mod:`givens`
``before NAME``    names that the script has: a function of :mod:`givens`
``as FILE``        Python that stands in a file of this name ...
``run COMMAND``    ... and the command that shows that it works
``exits N``        the exit status of the last command; 0 if nothing is said
``raises NAME``    the exception that the Python block ends with
=================  =====================================================================================

In a console block ``$`` begins a command and other lines are its output, in which ``...`` stands for anything; a block
without ``$`` has commands only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from sybil.document import Document
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("python", "console", "bash")
WORDS = ("slow", "gpu", "network", "needs", "shown", "given", "before", "as", "run", "exits", "raises")
COMMENT = re.compile(r"^<!-- block: (.*) -->\s*", re.MULTILINE)
GENERATED = ("docs/reference/", "docs/_build/")


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        page: Its page, relative to the repository.
        line: Where its code begins, from 1.
        language: One of :data:`LANGUAGES`.
        source: Its code.
        said: What the comment before it says, by word.
    """

    page: str
    line: int
    language: str
    source: str
    said: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``README.md:12``."""
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Commands of a console block, each with the output that is shown."""
        text = self.source.replace("\\\n", "")
        if not re.search(r"^\$ ", text, re.MULTILINE):
            return [(text, "")]
        parts = [part.partition("\n") for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]
        return [(command, output) for command, _, output in parts]


def pages() -> list[Path]:
    """Every page that is committed and has prose of the project."""
    found = [*ROOT.glob("*.md"), ROOT / "tests" / "README.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(page for page in found if not str(page.relative_to(ROOT)).startswith(GENERATED))


def blocks_of(page: Path) -> list[Block]:
    """The blocks of one page.

    Raises:
        ValueError: A comment says what nobody understands, or stands before no block.
    """
    return read(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))


def read(text: str, page: str) -> list[Block]:
    """The blocks of a text; see :func:`blocks_of`."""
    comments = {comment.end(): comment[1] for comment in COMMENT.finditer(text)}
    found = []
    for region in FencedCodeBlockLexer("|".join(LANGUAGES))(Document(text, page)):
        said = _said(comments.pop(region.start, ""), page)
        line = text[: region.start].count("\n") + 2
        found.append(Block(page, line, region.lexemes["language"], str(region.lexemes["source"]), said))
    if comments:
        raise ValueError(f"{page}: the comment {next(iter(comments.values()))!r} stands before no block")
    return found


def _said(text: str, page: str) -> dict[str, str]:
    found = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        word, _, value = part.partition(" ")
        if word not in WORDS:
            raise ValueError(f"{page}: nobody understands {word!r} in the comment {text!r}: {', '.join(WORDS)}")
        found[word] = value.strip()
    return found
