"""Rows against what they were made of: whose question and whose answer stand where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.checks.support.turns import ANSWERS, plain
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qvl.checks.batches.conversations import Conversation
    from pytest_qvl.checks.batches.facts import View
    from pytest_qvl.checks.batches.findings import Findings
    from pytest_qvl.checks.support.turns import Turn

SHOWN = 60


@dataclass(frozen=True)
class Unit:
    """One sample in the batch: a row, or a part of a packed row.

    Attributes:
        row: Its row.
        first: Its first token.
        stop: Behind its last one.
        asked: What the user says in it.
        said: What the assistant says.
        turns: Its turns.
    """

    row: int
    first: int
    stop: int
    asked: str
    said: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Pair:
    """A unit and the sample that it was made of.

    Attributes:
        unit: In the batch.
        number: Of the sample.
        sample: The sample itself.
    """

    unit: Unit
    number: int
    sample: Conversation


def pair(view: View, findings: Findings, found: Sequence[Unit], given: Sequence[Conversation]) -> list[Pair] | None:
    """Which unit was made of which sample, by their words; None where they cannot be paired.

    Rows in another order than the samples (sorted by length, packed) are no defect, and noted.
    """
    if len(found) != len(given):
        what = "packed sample" if view.is_packed else "row"
        many = "s" if len(found) != 1 else ""
        findings.unjudged["batch against samples"] = f"{len(given)} samples were given for {len(found)} {what}{many}"
        return None
    chosen = _chosen(found, given)
    for number, unit in enumerate(found):
        if number in chosen:
            continue
        owner = next((other for other, sample in enumerate(given) if _asks(unit, sample)), None)
        left = next(other for other in range(len(given)) if other not in chosen.values())
        if owner is None:
            chosen[number] = number if number not in chosen.values() else left
            findings.notes.append(f"row {unit.row} does not hold the text of its sample word by word")
            continue
        findings.add(
            "row-of-another-sample",
            unit.row,
            unit.first if view.is_packed else None,
            found=f"the question of sample {owner}, which another row holds too: {given[owner].questions[0][:SHOWN]!r}",
            expected=f"that of sample {left}, which no row holds",
            cause="the collator put one sample into two rows and lost another",
        )
    if any(number != owner for number, owner in chosen.items()):
        findings.notes.append("rows stand in another order than the samples; each was compared with its own")
    return [Pair(unit, chosen[number], given[chosen[number]]) for number, unit in enumerate(found) if number in chosen]


def _chosen(units: Sequence[Unit], given: Sequence[Conversation]) -> dict[int, int]:
    """The sample of each unit: its own number if the words fit, else the first one left whose words do."""
    chosen: dict[int, int] = {}
    for exact in (True, False):
        for own in (True, False):
            for number, unit in enumerate(units):
                if number in chosen:
                    continue
                candidates = [number] if own else range(len(given))
                fitting = (
                    each
                    for each in candidates
                    if each not in chosen.values()
                    and _asks(unit, given[each])
                    and (not exact or _answers(unit, given[each]))
                )
                if (found := next(fitting, None)) is not None:
                    chosen[number] = found
    return chosen


def _asks(unit: Unit, sample: Conversation) -> bool:
    wanted = [plain(text) for text in sample.questions]
    return any(wanted) and all(text in unit.asked for text in wanted)


def _answers(unit: Unit, sample: Conversation) -> bool:
    return all(plain(text) in unit.said for text in sample.answers)


def units(view: View) -> Iterator[Unit]:
    """The samples of a batch: its rows, or the parts of packed rows."""
    for row, first, stop, turns in turns_of_units(view):
        asked, said = (
            plain("".join(view.said_in(row, turn) for turn in turns if turn.role == role)) for role in ("user", ANSWERS)
        )
        yield Unit(row, first, stop, asked, said, turns)


def turns_of_units(view: View) -> Iterator[tuple[int, int, int, tuple[Turn, ...]]]:
    """Row, first token, token behind the last one, and turns of each unit."""
    for row in range(view.rows):
        ids, numbers = view.ids[row].tolist(), view.segments[row]
        kept = ~view.padding[row]
        turns = view.reader.turns(ids, kept.tolist())
        for number in range(int(numbers.max()) + 1):
            places = (kept & (numbers == number)).nonzero().flatten().tolist()
            if places:
                first, stop = places[0], places[-1] + 1
                yield row, first, stop, tuple(turn for turn in turns if first <= turn.header < stop)


def judge_answers(view: View, findings: Findings, pairs: Sequence[Pair]) -> None:
    """Each unbroken run of learned tokens is an answer of the own sample, or holds one."""
    if view.labels is None:
        return
    for each in pairs:
        runs = list(_learned(view, each.unit))
        answers = [plain(answer) for answer in each.sample.answers]
        if not runs or not answers or any(answer in text for _, text in runs for answer in answers):
            continue
        place, text = runs[-1]
        owner = next((o.number for o in pairs if o is not each and text in map(plain, o.sample.answers)), None)
        cause = "labels were made of another text than the sample's"
        if owner is not None:
            cause = "the collator paired prompts with answers of other rows"
        elif any(text and answer.endswith(text) for answer in answers):
            cause = "the first tokens of the answer are masked: the response template matched too late"
        findings.add(
            "another-answer",
            each.unit.row,
            place,
            found=f"learned text {text[:SHOWN]!r}" + ("" if owner is None else f", the answer of sample {owner}"),
            expected=f"{answers[-1][:SHOWN]!r}",
            cause=cause,
        )


def _learned(view: View, unit: Unit) -> Iterator[tuple[int, str]]:
    """Each unbroken run of learned tokens: its place, and its text without what ends it."""
    assert view.labels is not None
    run: list[int] = []
    for place, label in enumerate([*view.labels[unit.row, unit.first : unit.stop].tolist(), IGNORED]):
        if label != IGNORED:
            run.append(label)
        elif run:
            yield unit.first + place - len(run), plain(view.decoded(run, special=False))
            run = []
