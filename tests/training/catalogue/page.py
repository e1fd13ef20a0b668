"""The page of planted mistakes: ``python tests/training/catalogue/page.py`` writes docs/guard-mistakes.md again."""

from __future__ import annotations

import sys
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "guard-mistakes.md"
HEAD = """\
# Mistakes that the guard stops

{count} mistakes of training scripts and collators, each planted into a training by the real `transformers.Trainer` on the embedded
model and stopped by [the guard](guard.md) at or before its first step, by the check that is named and in words that point at the
cause (`pytest --slow tests/training/test_catalogue.py`). The source is where it cost somebody a training, or warns of it.

| mistake | check | source |
| --- | --- | --- |
"""


def page(mistakes):
    """The page's text."""
    rows = [f"| {mistake.name} | `{mistake.check}` | {linked(mistake.source)} |" for mistake in mistakes.values()]
    return HEAD.format(count=len(mistakes)) + "\n".join(rows) + "\n"


def linked(source):
    """Threads on GitHub as links."""
    return ", ".join(link(each.strip()) for each in source.split(","))


def link(thread):
    repository, number, issue = thread.partition("#")
    if not number or not issue.isdigit():
        return f"[{thread.rpartition('/')[2]}]({thread})"
    return f"[{thread}](https://github.com/{repository}/issues/{issue})"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from catalogue import MISTAKES

    PAGE.write_text(page(MISTAKES), encoding="utf-8")
