"""Thoughts in front of replies, where a chat template opens them: ``<think>`` ... ``</think>`` (Qwen3, Qwen3.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import CannotJudge
from pytest_qvl.samples.batch import ANSWER_HEADER, CLOSES, IGNORED, OPENS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_qvl.checks.support.turns import Turn
    from pytest_qvl.evidence import Judge

SWITCH = "enable_thinking"
KEEPS = "preserve_thinking"
_SHOWN_TOKENS = 8


@dataclass(frozen=True)
class ThinkingTemplate:
    r"""What a chat template puts between the header of a reply and the reply.

    Attributes:
        openings: What generation prompts write there, by default and with ``enable_thinking`` on and off, the default
            first: ``"<think>\n"``, ``"<think>\n\n</think>\n\n"``, or nothing (Qwen3 opens its own thoughts).
        opening_ids: The tokens of each.
        everywhere: Whether the template writes one of them in front of answers that another turn follows, too, also
            with ``preserve_thinking`` off.
        opens: Id of ``<think>``.
        closes: Id of ``</think>``.
    """

    openings: tuple[str, ...]
    opening_ids: tuple[tuple[int, ...], ...]
    everywhere: bool
    opens: int
    closes: int

    def begins(self, ids: Sequence[int], *, cut: bool) -> bool:
        """Whether an answer begins with the tokens that some generation prompt ends with.

        Args:
            ids: Of the answer, with its thought.
            cut: Whether the row ends inside of it: an opening that is cut off is none that is missing.
        """
        return any(_begin_alike(ids, each) and (cut or len(ids) >= len(each)) for each in self.opening_ids)


def _begin_alike(ids: Sequence[int], others: Sequence[int]) -> bool:
    return all(one == other for one, other in zip(ids, others, strict=False))


def thinking_template(processor: Any) -> ThinkingTemplate | None:
    """What the chat template of a processor (or tokenizer) does with thoughts, found by rendering it.

    The name of the family says nothing: Qwen3-VL has a template that thinks and one that does not over one vocabulary.

    Returns:
        ``None`` where no generation prompt holds a ``<think>``: thoughts are then text like any other.

    Raises:
        CannotJudge: It mentions ``<think>`` and cannot be rendered, or the tokenizer has no such token.
    """
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default", "".join(template.values()))
    written = template or ""
    if OPENS not in written:
        return None
    options: list[dict[str, bool]] = [{}]
    if SWITCH in written:
        options += [{SWITCH: True}, {SWITCH: False}]
    history: list[dict[str, bool]] = [{}, {KEEPS: False}] if KEEPS in written else [{}]
    question = {"role": "user", "content": "Why?"}
    answer = {"role": "assistant", "content": "So."}
    try:
        prompts = [_rendered(processor, [question], add_generation_prompt=True, **each) for each in options]
        openings = tuple(dict.fromkeys(_behind_header(text) for text in prompts))
        if not any(OPENS in each for each in openings):
            return None
        asked_twice = [question, answer, question, answer]
        earlier = [_behind_header(_rendered(processor, asked_twice, **each), first=True) for each in history]
    except Exception as error:
        raise CannotJudge(f"its chat template cannot be rendered ({type(error).__name__}: {error})") from error
    everywhere = all(any(each and said.startswith(each) for each in openings) for said in earlier)
    tokenizer = getattr(processor, "tokenizer", processor)
    opens, closes = (_id(tokenizer, token) for token in (OPENS, CLOSES))
    return ThinkingTemplate(openings, tuple(_ids(tokenizer, each) for each in openings), everywhere, opens, closes)


def with_thoughts(processor: Any, prompt: str) -> list[str]:
    """A prompt, and what else it may be: with whatever its chat template can open in front of the reply.

    Args:
        processor: Whose chat template wrote the prompt.
        prompt: Up to where a reply begins.
    """
    try:
        template = thinking_template(processor)
    except CannotJudge:
        return [prompt]
    asked, header, opened = prompt.rpartition(ANSWER_HEADER)
    if template is None or not header:
        return [prompt]
    return [prompt, *(asked + header + each for each in template.openings if each != opened)]


def _rendered(processor: Any, conversation: list[dict[str, str]], **options: bool) -> str:
    text: str = processor.apply_chat_template(conversation, tokenize=False, **options)
    return text


def _behind_header(text: str, *, first: bool = False) -> str:
    _before, header, behind = text.partition(ANSWER_HEADER) if first else text.rpartition(ANSWER_HEADER)
    if not header:
        raise ValueError(f"it writes no {ANSWER_HEADER!r}")
    return behind


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _id(tokenizer: Any, token: str) -> int:
    ids = _ids(tokenizer, token)
    if len(ids) != 1:
        raise CannotJudge(f"the chat template writes {token}, which is {len(ids)} tokens of the tokenizer and not one")
    return ids[0]


class ThoughtReader:
    """Sorts taught answers by what is taught of the thoughts in front of them.

    Args:
        template: Of the processor that made the rows.
        tokenizer: Its tokenizer.
    """

    _KINDS: Mapping[str, str] = {
        "answers without an opening": (
            "answers do not begin as a generation prompt of the chat template ends ({openings}), so they are learned "
            "in a context that generation never makes: render rows, thoughts included, by the chat template that you "
            "generate with"
        ),
        "thoughts without a taught end": (
            f"thoughts are taught without the {CLOSES} behind them, so the model does not learn to stop thinking"
        ),
        "ends of thoughts taught alone": (
            f"thoughts are not taught and the {CLOSES} behind them is, so the model learns to close a thought and "
            "never to go on with one: teach both or neither"
        ),
        "thoughts taught in part": (f"thoughts are taught in part: teach each with its {CLOSES}, or leave out both"),
        "thoughts that never end": (
            f"answers end inside of their thought, without {CLOSES}, so the model learns to end its turn there"
        ),
        "marks of thoughts in replies": (
            f"answers hold {OPENS} or {CLOSES} elsewhere than around one thought in front: did a template not find the "
            "thought, and put an empty one in front of it?"
        ),
    }

    def __init__(self, template: ThinkingTemplate, tokenizer: Any) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._found: dict[str, list[str]] = {kind: [] for kind in self._KINDS}
        self._counts = dict.fromkeys(("taught", "left out", "empty", "stripped", "as text"), 0)
        self._blank: dict[int, bool] = {}

    def read(self, where: str, ids: Sequence[int], labels: Sequence[int], turn: Turn, *, followed: bool) -> None:
        """Take note of an answer; one of which nothing is taught is left out on purpose.

        Args:
            where: Names it.
            ids: Of its row.
            labels: Of its row.
            turn: The answer.
            followed: Whether another turn of its conversation follows.
        """
        if all(labels[place] == IGNORED for place in turn.places):
            return
        if not self._template.begins(ids[turn.start : turn.stop], cut=not turn.closed):
            if followed and not self._template.everywhere:
                self._counts["stripped"] += 1
            else:
                shown = self._text(ids, turn.places[:_SHOWN_TOKENS])
                self._found["answers without an opening"].append(f"{where} begins with {shown!r}")
        self._read_thought(where, ids, labels, turn)

    def is_open_in(self, ids: Sequence[int], turn: Turn) -> bool:
        """Whether a turn ends inside of its thought."""
        own = {ids[place] for place in turn.places}
        return self._template.opens in own and self._template.closes not in own

    def _read_thought(self, where: str, ids: Sequence[int], labels: Sequence[int], turn: Turn) -> None:
        opens, closes = self._template.opens, self._template.closes
        marks = [place for place in turn.places if ids[place] in (opens, closes)]
        if marks and ids[marks[0]] == opens and self._are_blank(ids, range(turn.start, marks[0])):
            begin = marks[0] + 1
            end = next((place for place in marks if ids[place] == closes), None)
            if end is None:
                if turn.closed:
                    self._found["thoughts that never end"].append(where)
                return
            self._sort(where, ids, labels, range(begin, end))
            pieces = [range(begin, end), range(end + 1, turn.stop)]
        else:
            pieces = [turn.places]
        said = [[place for place in marks if place in piece] for piece in pieces]
        if any(self._is_thought(ids, piece.start, own) for piece, own in zip(pieces, said, strict=True)):
            self._found["marks of thoughts in replies"].append(where)
        elif any(said):
            self._counts["as text"] += 1

    def _is_thought(self, ids: Sequence[int], start: int, marks: Sequence[int]) -> bool:
        """Whether marks in a text that begins at `start` are those of a thought and not words of it.

        Words they may be inside of a text (an answer about chat templates), where each ``</think>`` has its
        ``<think>``: tokenizers make the same token of both.
        """
        open_marks = 0
        for place in marks:
            open_marks += 1 if ids[place] == self._template.opens else -1
            if open_marks < 0:
                return True
        return bool(marks) and self._are_blank(ids, range(start, marks[0]))

    def _are_blank(self, ids: Sequence[int], places: Iterable[int]) -> bool:
        return all(self._is_blank(ids[place]) for place in places)

    def _sort(self, where: str, ids: Sequence[int], labels: Sequence[int], inside: range) -> None:
        thought = [place for place in inside if not self._is_blank(ids[place])]
        taught = sum(labels[place] != IGNORED for place in thought)
        end_taught = labels[inside.stop] != IGNORED
        whole = bool(taught) and taught == len(thought)
        if not thought:
            self._counts["empty"] += 1
        elif whole and end_taught:
            self._counts["taught"] += 1
        elif not taught and not end_taught:
            self._counts["left out"] += 1
        elif whole:
            self._found["thoughts without a taught end"].append(where)
        elif not taught:
            self._found["ends of thoughts taught alone"].append(where)
        else:
            self._found["thoughts taught in part"].append(f"{where}, {taught} of {len(thought)} tokens")

    def judge(self, judge: Judge) -> None:
        """Enter what was found."""
        openings = " or ".join(repr(each) for each in self._template.openings)
        for kind, story in self._KINDS.items():
            places = self._found[kind]
            said = story.format(openings=openings)
            judge.equal(kind, len(places), 0, else_say=f"{len(places)} {said}: {some(places, '; ')}")
        for kind in ("taught", "left out", "empty"):
            judge.report(f"thoughts {kind}", self._counts[kind])
        if left_out := self._counts["left out"]:
            judge.note(f"{left_out} thoughts are not taught, with their {CLOSES}: only the replies behind them are")
        if as_text := self._counts["as text"]:
            judge.note(f"{as_text} answers hold {OPENS} inside of a thought or reply, which is taken for a word of it")
        if stripped := self._counts["stripped"]:
            judge.note(
                f"{stripped} answers that another turn follows are taught without a thought in front, as the chat "
                "template writes them there; no generation prompt does"
            )

    def _text(self, ids: Sequence[int], places: Sequence[int]) -> str:
        own = [ids[place] for place in places]
        text: str = self._tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._text([token], (0,)).strip()
        return self._blank[token]
