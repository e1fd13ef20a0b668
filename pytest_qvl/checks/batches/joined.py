"""Several conversations in one row, or in one part of a packed row, that nothing keeps apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pytest_qvl.checks.batches.paired import turns_of_units
from pytest_qvl.checks.batches.places import PARTED, brings
from pytest_qvl.checks.support.turns import ANSWERS, plain
from pytest_qvl.checks.support.wording import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qvl.checks.batches.conversations import Conversation
    from pytest_qvl.checks.batches.facts import View
    from pytest_qvl.checks.batches.findings import Findings
    from pytest_qvl.checks.batches.paired import Unit

# Names by which trainers hand on where samples begin ("packed_seq_lengths", "segment_ids"); Transformers' own is read.
_SAYS_WHERE = re.compile(r"seq|segment|pack|boundar")
_READ = re.compile(r"cu_seq_lens_[qk]|max_length_[qk]")


@dataclass(frozen=True)
class _Exchange:
    """What the user says in one turn and what the assistant answers.

    Attributes:
        begin: Where its conversation begins, if it is the first: at a system turn before it, or at its own header.
        asked: The user's text.
        said: The assistant's; empty where nothing follows.
        cut: Whether its last turn has no end.
    """

    begin: int
    asked: str
    said: str
    cut: bool


def note_system_turns(view: View, findings: Findings) -> None:
    """Say where a second system turn may begin another conversation, which only samples tell."""
    for row, _, _, turns in turns_of_units(view):
        if sum(turn.role == "system" for turn in turns) > 1:
            findings.unjudged["conversations in one row"] = (
                f"row {row} has several system turns, and without `samples` nobody knows whether they are those of "
                "several conversations that nothing keeps apart"
            )
            return


def judge_joined(view: View, findings: Findings, found: Sequence[Unit], given: Sequence[Conversation]) -> None:
    """No unit holds the conversations of several samples, one after the other.

    A conversation of several turns is one sample, also where it was cut.
    """
    if len(found) >= len(given):
        return
    told = _says_where(view)
    for unit in found:
        exchanges = list(_exchanges(view, unit))
        runs = _several(exchanges, given)
        if not runs:
            continue
        held = f"{len(runs)} conversations (samples {listed([str(number) for _, number in runs])})"
        if told:
            findings.unjudged["packed samples"] = (
                f"row {unit.row} holds {held}, and what keeps them apart may be {listed(told)}, which is not read here"
            )
            continue
        where = "one sample of a packed row" if view.is_packed else "one row"
        findings.add(
            "packed-not-separated",
            unit.row,
            exchanges[runs[1][0]].begin,
            found=f"{held} in {where}, and nothing that keeps them apart "
            f"({brings(view) or 'neither position_ids nor an attention_mask'})",
            expected=PARTED,
            cause="the collator, or the trainer's packing, joined samples and said nowhere where the next one begins: "
            "each attends to those before it, and its positions go on from theirs",
        )


def _says_where(view: View) -> list[str]:
    """What the batch brings that may say where samples begin and is not read."""
    found = [
        name
        for name in view.batch
        if _SAYS_WHERE.search(name) and not (view.parted_by == "lengths" and _READ.fullmatch(name))
    ]
    mask = view.batch.get("attention_mask")
    if mask is not None and mask.ndim != 2 and view.parted_by != "mask":
        found.append(f"attention_mask {tuple(mask.shape)}")
    return found


def _exchanges(view: View, unit: Unit) -> Iterator[_Exchange]:
    users = [number for number, turn in enumerate(unit.turns) if turn.role == "user"]
    for number, following in pairwise([*users, len(unit.turns)]):
        turn, behind = unit.turns[number], [each for each in unit.turns[number:following] if each.role != "system"]
        said = "".join(view.said_in(unit.row, each) for each in behind if each.role == ANSWERS)
        has_system = number > 0 and unit.turns[number - 1].role == "system"
        begin = unit.turns[number - has_system].header
        yield _Exchange(begin, plain(view.said_in(unit.row, turn)), plain(said), not behind[-1].closed)


def _several(exchanges: Sequence[_Exchange], given: Sequence[Conversation]) -> list[tuple[int, int]]:
    """First exchange and number of each sample whose whole conversation is in there; none where it is one sample.

    By questions and answers first, then by questions alone: data sets ask one question of every image, and collators
    word answers anew.
    """
    for exact in (True, False):
        if any(_is_part_of(exchanges, sample, exact=exact) for sample in given):
            return []
        runs: list[tuple[int, int]] = []
        place = 0
        while place < len(exchanges):
            taken = {number for _, number in runs}
            fitting = [
                number
                for number, sample in enumerate(given)
                if number not in taken and _begins_with(exchanges[place:], sample, exact=exact)
            ]
            if fitting:
                longest = max(fitting, key=lambda number: len(given[number].questions))
                runs.append((place, longest))
                place += len(given[longest].questions)
            else:
                place += 1
        if len(runs) > 1:
            return runs
    return []


def _begins_with(exchanges: Sequence[_Exchange], sample: Conversation, *, exact: bool) -> bool:
    length = len(sample.questions)
    return 0 < length <= len(exchanges) and _fits(exchanges[:length], sample, 0, exact=exact)


def _is_part_of(exchanges: Sequence[_Exchange], sample: Conversation, *, exact: bool) -> bool:
    """Whether the exchanges follow one another in the sample, which may have been cut at either end."""
    starts = range(len(sample.questions) - len(exchanges) + 1)
    return any(_fits(exchanges, sample, start, exact=exact) for start in starts)


def _fits(exchanges: Sequence[_Exchange], sample: Conversation, start: int, *, exact: bool) -> bool:
    stop = start + len(exchanges)
    questions, answers = (
        [(plain(text), each) for text, each in zip(texts[start:stop], exchanges, strict=False)]
        for texts in (sample.questions, sample.answers if exact else ())
    )
    return (
        any(text for text, _ in (*questions, *answers))
        and all(_holds(each.asked, text, cut=each.cut and not each.said) for text, each in questions)
        and all(_holds(each.said, text, cut=each.cut or not each.said) for text, each in answers)
    )


def _holds(text: str, wanted: str, *, cut: bool) -> bool:
    return wanted in text or (cut and wanted.startswith(text))
