"""The loss counts answers, and nothing else of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.packing import samples_in_rows
from pytest_qvl.checks.support.placeholders import attended
from pytest_qvl.checks.support.teaching import NO_LABELS
from pytest_qvl.checks.support.thoughts import ThoughtReader, thinking_template
from pytest_qvl.checks.support.turns import ANSWERS, TurnReader
from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.samples.batch import ANSWER_HEADER, IGNORED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_qvl.checks.support.teaching import Batch
    from pytest_qvl.checks.support.turns import Turn


@check(promise=10)
def label_mask(model: Any, batch: Batch, processor: Any) -> Evidence:
    """Prove that the loss counts answers only: no prompt, no placeholder or other vision token, no padding.

    Works on the ids alone; all comparisons are exact. An answer is what follows ``<|im_start|>assistant`` and
    a line break, up to and with ``<|im_end|>`` (the ChatML of every Qwen-VL release); the line break that the
    template puts behind it may be supervised too. An answer of which anything is taught must be taught to its
    end; a turn of which nothing is taught is left out on purpose.

    Where generation prompts of the processor's own chat template open a thought (Qwen3.5, Qwen3-VL-Thinking; rendered
    with ``enable_thinking`` on, off and by default), thoughts have rules too; of another template nothing is asked:

    - An answer begins with the tokens that one of these prompts puts behind the header: ``<think>`` and a line break,
      or a whole empty thought. Any other is learned in a context that generation never makes
      (hiyouga/LlamaFactory#10326), as an empty thought is whose template always opens one: its line breaks are another
      token (modelscope/ms-swift#5927). An answer that another turn follows may do without where the template itself
      writes such answers so; they are counted. Where a prompt may open nothing (Qwen3) nothing is asked here.
    - A thought is taught whole with its ``</think>``, or left out with it, which is noted. Without its end the model
      does not learn to stop thinking. The end alone is a broken promise too: of all tokens that follow one in a
      thought it is the only one with a label, so nothing weighs against closing early.
    - ``<think>`` itself, line breaks beside the marks and empty thoughts may be taught or not: prompts give them
      (modelscope/ms-swift#9875).
    - No other thought stands in an answer (huggingface/trl#6361): a ``<think>`` that begins the thought or the reply
      once more, or a ``</think>`` without one. Inside of a text ``<think>`` is a word of it, and noted.

    Args:
        model: Gives the ids of the vision tokens.
        batch: ``input_ids`` and ``labels``, (rows, length) int64, labels not shifted; without an
            ``attention_mask`` nothing is padding.
        processor: The processor (or tokenizer) that made the batch, with the chat template that generation will use.

    Raises:
        CheckFailed: Names row, place and token: supervised outside an answer, a label that is another token
            than the one at its place, a row that teaches nothing, an answer whose end is not taught, or one that breaks
            a rule of thoughts.
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
    reader = _LabelReader(parts, tokenizer, _thoughts(judge, processor, tokenizer))
    rows = zip(
        *(batch["input_ids"].tolist(), batch["labels"].tolist(), attended(batch).tolist()),
        samples_in_rows(batch).tolist(),
        strict=True,
    )
    for row, (ids, labels, mask, samples) in enumerate(rows):
        reader.read(row, ids, labels, mask, samples)
    reader.judge(judge)
    return judge.verdict()


def _thoughts(judge: Judge, processor: Any, tokenizer: Any) -> ThoughtReader | None:
    try:
        template = thinking_template(processor)
    except CannotJudge as reason:
        judge.note(f"thoughts are not judged: {reason}")
        return None
    return None if template is None else ThoughtReader(template, tokenizer)


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

    def __init__(self, parts: Parts, tokenizer: Any, thoughts: ThoughtReader | None) -> None:
        self._vision = set(parts.vision_token_ids)
        self._tokenizer = tokenizer
        self._reader, self._thoughts = TurnReader(tokenizer), thoughts
        self._break = self._reader.breaks
        self._found: dict[str, list[str]] = {kind: [] for kind in self._KINDS}
        self._supervised = 0

    def read(self, row: int, ids: list[int], labels: list[int], mask: list[bool], samples: list[int]) -> None:
        turns = self._reader.turns(ids, mask)
        answers = [turn for turn in turns if turn.role == ANSWERS]
        if not answers:
            raise CannotJudge(f"row {row} has no {ANSWER_HEADER!r} in it, so where its answer begins is unknown")
        inside = {place for answer in answers for place in answer.places}
        after = {answer.stop for answer in answers if answer.closed}
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
        for number, answer in enumerate(answers):
            where = f"row {row}, answer {number}" if len(answers) > 1 else f"row {row}"
            self._read_answer(where, ids, labels, answer)
            if self._thoughts is not None:
                followed = _is_followed(answer, turns, samples)
                self._thoughts.read(where, ids, labels, answer, followed=followed)

    def _read_answer(self, where: str, ids: list[int], labels: list[int], answer: Turn) -> None:
        taught = any(labels[place] != IGNORED for place in answer.places)
        if taught and not (answer.closed and labels[answer.stop - 1] != IGNORED):
            in_thought = self._thoughts is not None and self._thoughts.is_open_in(ids, answer)
            self._found["no end"].append(where + (", cut off inside of its thought" if in_thought else ""))

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
        if self._thoughts is not None:
            self._thoughts.judge(judge)

    def _kind(self, token: int, label: int, is_attended: bool) -> str | None:
        if not is_attended:
            return "padding"
        if token in self._vision or label in self._vision:
            return "vision"
        return "other token" if label != token else None


def _is_followed(answer: Turn, turns: Sequence[Turn], samples: Sequence[int]) -> bool:
    """Whether another turn of the same packed sample follows, also one cut off in its header if it is no reply."""
    later = (turn for turn in turns if turn.header >= answer.stop and (turn.role != ANSWERS or turn.stop > turn.start))
    return any(samples[turn.header] == samples[answer.header] for turn in later)
