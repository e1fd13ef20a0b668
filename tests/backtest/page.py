"""docs/backtest.md, made of the pairs, the shipped defects and the record, and the table of defects in docs/releases.md."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_qvl.releases import DEFECTS
from tests.backtest.pairs import OUTSIDE, PAIRS, UNSEEN, Pair
from tests.backtest.record import Record, defect_of, flagged, green, outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

HEAD = """# Backtest on history

Releases of Transformers, PEFT, TRL and Unsloth Zoo with a real bug, each beside one without it, from the package index: the named
check has to flag the one, in words that point at the cause, and to pass on the other. {pairs} pairs of {bugs} bugs: **{flagged} of
{pairs} bad releases flagged, {green} of {pairs} good ones green** ([record](records/backtest.json)). Bugs that no check
[sees](#bugs-that-no-check-sees) or that [cannot be shown](#bugs-that-cannot-be-shown-here) on a CPU, all of bitsandbytes' among them,
count nowhere.

<!-- block: network {environments} environments -->
```console
pip install uv
python -m tests.backtest --again --index https://download.pytorch.org/whl/cpu
```

from the repository's root makes each environment with uv (a base once, releases laid over it, deleted afterwards), runs the cases on
the CPU in float32 on the embedded model or a small random one of the family (`tests/backtest/scenarios.py`), and writes
`docs/records/backtest.json`, this page and the table of [known defects](releases.md#known-defects). It exits with 1 where a pair is
not as it should be. `--only TEXT` runs some of them; without `--again` those that the record has as they should be are not run. CI
runs all of them every night. The bugs are listed in the package, and every session that uses a model looks up what is installed; a
failure names the release that fixes it, where there is one (`tests/backtest/test_pairs.py`).

Several releases with one bug, and the same bug in the classes of two families, are pairs of their own: each was run. "Good" is the
release that was run; the first one without the bug, which is what a failure names, may be an earlier one. Where no
release has a bug fixed, the good one is an earlier one. Of Unsloth Zoo the collator alone is imported: its package asks for a GPU.

"""

# The table of defects in docs/releases.md, from its head to the next empty line.
_TABLE = re.compile(r"^\| releases \| what \| fixed in \| checks \|\n(?:\|.*\n)+", flags=re.MULTILINE)


def page(record: Record) -> str:
    """The whole page."""
    bugs = {pair.thread for pair in PAIRS}
    counts = {
        "pairs": len(PAIRS),
        "bugs": len(bugs),
        "environments": len({pair.environment(release) for pair in PAIRS for release in (pair.bad, pair.good)}),
        "flagged": sum(flagged(pair, record) for pair in PAIRS),
        "green": sum(green(pair, record) for pair in PAIRS),
    }
    parts = [HEAD.format(**counts), *_table(record), *_unseen(), *_outside()]
    return "".join(parts).rstrip("\n") + "\n"


def with_defects(text: str) -> str:
    """docs/releases.md with the table of the shipped defects."""
    rows = [
        f"| {defect.package} {defect.versions} | {defect.summary} ([thread]({defect.thread})) "
        f"| {defect.fixed_in or 'none yet'} | {', '.join(f'`{check}`' for check in defect.checks)} |\n"
        for defect in DEFECTS
    ]
    table = "".join(("| releases | what | fixed in | checks |\n| --- | --- | --- | --- |\n", *rows))
    made, found = _TABLE.subn(lambda _: table, text)
    assert found == 1, "docs/releases.md has no table of known defects"
    return made


def _table(record: Record) -> Iterable[str]:
    yield "## Pairs\n\n"
    yield "| bug | bad | flagged by | in these words | good |\n| --- | --- | --- | --- | --- |\n"
    for pair in PAIRS:
        yield _row(pair, record)
    yield "\n"


def _row(pair: Pair, record: Record) -> str:
    defect = defect_of(pair)
    family = next((f" ({label})" for end, label in FAMILIES.items() if pair.scenario.endswith(end)), "")
    bad = (
        f"`{pair.check}`"
        if flagged(pair, record)
        else f"**{outcome(pair, pair.bad, record).get('verdict', 'not run')}**"
    )
    good = "green" if green(pair, record) else f"**{outcome(pair, pair.good, record).get('verdict', 'not run')}**"
    return (
        f"| [{defect.summary}]({defect.thread}){family} | {pair.package} {pair.bad} | {bad} | {pair.words} "
        f"| {pair.good}: {good} |\n"
    )


FAMILIES = {"_qwen2": "Qwen2-VL", "_qwen3": "Qwen3-VL"}


def _unseen() -> Iterable[str]:
    yield "## Bugs that no check sees\n\nFound on the way, each in releases that were looked at; they count nowhere above.\n\n"
    yield "| bug | releases | why |\n| --- | --- | --- |\n"
    yield from (f"| {each.what} | {each.releases} | {each.why} |\n" for each in UNSEEN)
    yield "\n"


def _outside() -> Iterable[str]:
    yield "## Bugs that cannot be shown here\n\nNot counted either.\n\n| bug | releases | why |\n| --- | --- | --- |\n"
    yield from (f"| {each.what} | {each.releases} | {each.why} |\n" for each in OUTSIDE)
