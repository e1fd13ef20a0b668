"""The loss counts answers, and nothing else of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.placeholders import attended
from pytest_qvl.checks.support.teaching import NO_LABELS
from pytest_qvl.checks.support.turns import ANSWERS, BEGIN_OF_TURN, TurnReader
from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qvl.checks.support.teaching import Batch

ANSWER_HEADER = f"{BEGIN_OF_TURN}{ANSWERS}\n"


@check(promise=10)
def label_mask(model: Any, batch: Batch, processor: Any) -> Evidence:
    """Prove that the loss counts answers only: no prompt, no placeholder or other vision token, no padding.

    Works on the ids alone; all comparisons are exact. An answer is what follows ``<|im_start|>assistant`` and
    a line break, up to and with ``<|im_end|>`` (the ChatML of every Qwen-VL release); the line break that the
    template puts behind it may be supervised too. An answer of which anything is taught must be taught to its
    end; a turn of which nothing is taught is left out on purpose.

    Args:
        model: Gives the ids of the vision tokens.
        batch: ``input_ids`` and ``labels``, (rows, length) int64, labels not shifted; without an
            ``attention_mask`` nothing is padding.
        processor: The processor (or tokenizer) that made the batch.

    Raises:
        CheckFailed: Names row, place and token: supervised outside an answer, a label that is another token
            than the one at its place, a row that teaches nothing, or an answer whose end is not taught.
        CannotJudge: A row has no answer in it that can be found.
        ValueError: No labels, or of another shape than the ids.
    """
    parts = anatomy(model)
    if "labels" not in batch:
        raise InputError(f"label_mask: {NO_LABELS}")
    if batch["labels"].shape != batch["input_ids"].shape:
        raise InputError(
            f"labels are {tuple(batch['labels'].shape)} but input_ids are {tuple(batch['input_ids'].shape)}"
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    judge = Judge("label_mask", "only answers are learned")
    reader = _LabelReader(parts, tokenizer)
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), attended(batch).tolist(), strict=True)
    for row, (ids, labels, mask) in enumerate(rows):
        reader.read(row, ids, labels, mask)
    reader.judge(judge)
    return judge.verdict()


class _LabelReader:
    """Sorts the supervised tokens of each row by what they are."""

    _KINDS: Mapping[str, str] = {
        "vision": "are vision tokens, which a model then learns to write",
        "padding": "are padding",
        "prompt": "belong to the prompt",
        "other token": "are labelled with another token than the one at their place (labels must not be shifted)",
        "no answer token": "rows have no supervised token, so they teach nothing",
        "no end": "answers end without a supervised <|im_end|>, so the model does not learn to stop",
    }

    def __init__(self, parts: Parts, tokenizer: Any) -> None:
        self._vision = set(parts.vision_token_ids)
        self._tokenizer = tokenizer
        self._reader = TurnReader(tokenizer)
        self._end, self._break = self._reader.end, self._reader.breaks
        self._found: dict[str, list[str]] = {kind: [] for kind in self._KINDS}
        self._supervised = 0

    def read(self, row: int, ids: list[int], labels: list[int], mask: list[bool]) -> None:
        answers = self._answers(row, ids, mask)
        inside = {place for answer in answers for place in answer}
        after = {answer[-1] + 1 for answer in answers if answer and ids[answer[-1]] == self._end}
        supervised = [place for place, label in enumerate(labels) if label != IGNORED]
        self._supervised += len(supervised)
        for place in supervised:
            kind = self._kind(ids[place], labels[place], mask[place])
            if kind is None and place not in inside and not (place in after and ids[place] in self._break):
                kind = "prompt"
            if kind is not None:
                token = self._tokenizer.convert_ids_to_tokens(ids[place])
                self._found[kind].append(f"row {row}, token {place} {token!r}")
        if not supervised:
            self._found["no answer token"].append(f"row {row}")
        self._found["no end"] += [
            f"row {row}, answer {number}" if len(answers) > 1 else f"row {row}"
            for number, answer in enumerate(answers)
            if any(labels[place] != IGNORED for place in answer)
            and (ids[answer[-1]] != self._end or labels[answer[-1]] == IGNORED)
        ]

    def judge(self, judge: Judge) -> None:
        judge.report("supervised tokens", self._supervised)
        for kind, story in self._KINDS.items():
            places = self._found[kind]
            of_tokens = "" if kind.startswith("no ") else " supervised tokens"
            judge.equal(
                f"supervised: {kind}" if of_tokens else f"rows with {kind}",
                len(places),
                0,
                else_say=f"{len(places)}{of_tokens} {story}: {some(places, '; ')}",
            )

    def _kind(self, token: int, label: int, is_attended: bool) -> str | None:
        if not is_attended:
            return "padding"
        if token in self._vision or label in self._vision:
            return "vision"
        return "other token" if label != token else None

    def _answers(self, row: int, ids: list[int], mask: list[bool]) -> list[list[int]]:
        """Places of each answer with its closing token; an answer that is cut off ends with its row."""
        found = [list(turn.places) for turn in self._reader.turns(ids, mask) if turn.role == ANSWERS]
        if not found:
            raise CannotJudge(f"row {row} has no {ANSWER_HEADER!r} in it, so where its answer begins is unknown")
        return found
