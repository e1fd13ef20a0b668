"""A run in Markdown: for the summary of a CI job, or a comment on a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.records.compare_output import as_markdown, escaped
from pytest_qvl.records.page_data import page_data, symbol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.records.compare import Comparison
    from pytest_qvl.records.page_data import Page, Target

FAILURES_SHOWN = 20


def run_markdown(record: dict[str, Any], comparison: Comparison | None = None, refused: str = "") -> str:
    """Verdict, failures, promises and comparison of a record, as :func:`pytest_qvl.records.stored.as_newest` makes it.

    Every word that a model, a path or a sample said is escaped.

    Args:
        record: The run's.
        comparison: With a base; ``None`` for none.
        refused: Why it could not be compared.
    """
    page = page_data(record)
    symbol = {"good": "✅", "bad": "❌"}.get(page.tone, "➖")
    lines = [f"## {symbol} pytest-qvl: {page.verdict}", "", escaped(page.sentence), "", *_failures(page)]
    for target in page.targets:
        lines += _promises(target)
    if refused:
        lines += [f"**Cannot be compared:** {escaped(refused)}", ""]
    elif comparison is not None:
        lines.append(as_markdown(comparison))
    return "\n".join(lines)


def _failures(page: Page) -> Iterator[str]:
    for problem in page.problems:
        yield f"- ✗ {escaped(problem)}"
    for failure in page.failures[:FAILURES_SHOWN]:
        where = " ".join(filter(None, (failure.test, f"on {failure.target}" if failure.target else "")))
        yield f"- ✗ **{escaped(failure.check or failure.state)}** ({escaped(where)}): {escaped(failure.says)}"
        if failure.cause:
            yield f"  - usual cause: {escaped(failure.cause)}"
            yield f"  - what to do first: {escaped(failure.fix)}"
            yield f"  - more: `pytest-qvl explain {failure.check}`"
    if len(page.failures) > FAILURES_SHOWN:
        yield f"- and {len(page.failures) - FAILURES_SHOWN} more"
    if page.problems or page.failures:
        yield ""


def _promises(target: Target) -> Iterator[str]:
    yield from (
        f"### {escaped(target.name)}",
        "",
        "| | promise | state | weakest figure |",
        "| --- | --- | --- | --- |",
    )
    for row in target.rows:
        weakest = row.weakest
        shown = "; ".join(row.why) if weakest is None else f"{weakest.name}: {weakest.value} ({weakest.limit})"
        yield f"| {row.number} | {escaped(row.title)} | {symbol(row.state)} {row.state} | {escaped(shown)} |"
    yield ""
