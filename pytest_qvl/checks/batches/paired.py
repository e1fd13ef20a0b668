"""Rows against what they were made of: whose question, images and answers stand in which row."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.turns import ANSWERS, TurnReader
from pytest_qvl.evidence import InputError
from pytest_qvl.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from PIL.Image import Image

    from pytest_qvl.checks.batches.facts import View
    from pytest_qvl.checks.batches.findings import Findings

TAKES = 'samples are pytest_qvl.samples.Sample or mappings with "messages" (and "images")'


@dataclass(frozen=True)
class Conversation:
    """A sample, whoever holds it.

    Attributes:
        images: Images in their order; None for one that was not read (an address).
        questions: What the user says, turn by turn.
        answers: What the assistant says.
    """

    images: tuple[Image | None, ...] = ()
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    videos: int = field(default=0)


def conversations(samples: Sequence[Any]) -> list[Conversation]:
    """Samples of this package, or chat messages as TRL, Unsloth and Transformers take them.

    Raises:
        InputError: One is neither.
    """
    return [_conversation(number, sample) for number, sample in enumerate(samples)]


def is_comparable(sample: Any) -> bool:
    """Whether a batch can be compared with a sample: one of this package, or chat messages."""
    return isinstance(sample, Sample) or _messages(sample) is not None


def _conversation(number: int, sample: Any) -> Conversation:
    if isinstance(sample, Sample):
        return Conversation(sample.images, (sample.question,), (sample.answer,))
    messages = _messages(sample)
    if messages is None:
        raise InputError(f"batch: {TAKES}; samples[{number}] is of type {type(sample).__name__} and is neither")
    parts = [part for message in messages for part in _parts(message)]
    own = sample.get("images") if hasattr(sample, "get") else None
    inside = [part for part in parts if part.get("type") in ("image", "image_url")]
    given = own if own is not None else [_source(part) for part in inside]
    given = given if isinstance(given, list | tuple) else [given]
    return Conversation(
        tuple(_read(image) for image in given),
        tuple(_texts(messages, "user")),
        tuple(_texts(messages, ANSWERS)),
        sum(part.get("type") == "video" for part in parts),
    )


def _messages(sample: Any) -> list[Mapping[str, Any]] | None:
    if hasattr(sample, "keys"):
        names = set(sample.keys())
        if "messages" in names:
            return list(sample["messages"])
        if "prompt" in names and isinstance(sample["prompt"], list):
            return [*sample["prompt"], *(sample["completion"] if "completion" in names else [])]
        return None
    if isinstance(sample, list) and all(hasattr(message, "keys") for message in sample):
        return sample
    return None


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part if hasattr(part, "get") else {"type": "text", "text": str(part)} for part in content or ()]


def _texts(messages: Iterable[Mapping[str, Any]], role: str) -> Iterator[str]:
    for message in messages:
        if message.get("role") == role:
            yield "".join(str(part.get("text") or "") for part in _parts(message) if part.get("type") == "text")


def _source(part: Mapping[str, Any]) -> Any:
    return next((part[name] for name in ("image", "url", "path", "image_url") if part.get(name) is not None), None)


def _read(image: Any) -> Image | None:
    """The image itself, or from its file; None where it is an address or something else."""
    from PIL import Image as Pillow

    if isinstance(image, Pillow.Image):
        return image.convert("RGB")
    name = str(image).removeprefix("file://") if isinstance(image, str | Path) else ""
    if name and "://" not in name and len(name) < 4096 and Path(name).is_file():
        with Pillow.open(name) as opened:
            return opened.convert("RGB")
    return None


def plain(text: str) -> str:
    """Text as tokenizers of this family normalise it, without white space around it."""
    return unicodedata.normalize("NFC", text).strip()


def judge_rows(view: View, findings: Findings, given: Sequence[Conversation]) -> bool:
    """Each row holds its own sample's questions; returns whether rows and samples belong to each other one by one."""
    if len(given) != view.rows or view.is_packed:
        findings.unjudged["rows against samples"] = f"{len(given)} samples were given for {view.rows} rows" + (
            ", some of them packed" if view.is_packed else ""
        )
        return False
    reader = TurnReader(view.tokenizer)
    texts = [_users(view, reader, row) for row in range(view.rows)]
    for row, own in enumerate(given):
        wanted = [plain(question) for question in own.questions if plain(question)]
        if all(question in texts[row] for question in wanted):
            continue
        owner = next(
            (
                number
                for number, other in enumerate(given)
                if number != row and other.questions and all(plain(text) in texts[row] for text in other.questions)
            ),
            None,
        )
        if owner is None:
            findings.notes.append(f"row {row} does not hold the text of its sample word by word")
            continue
        findings.add(
            "row-of-another-sample",
            row,
            None,
            found=f"the question of sample {owner}: {given[owner].questions[0][:60]!r}",
            expected=f"that of sample {row}: {wanted[0][:60]!r}",
            cause="rows were sorted or shuffled (by length, say) and what belongs to them was not",
        )
    return True


def _users(view: View, reader: TurnReader, row: int) -> str:
    ids = view.ids[row].tolist()
    turns = [turn for turn in reader.turns(ids, view.text[row].tolist()) if turn.role == "user"]
    vision = set(view.known.vision)
    kept = [ids[place] for turn in turns for place in turn.places if ids[place] not in vision]
    return plain(view.tokenizer.decode(kept, skip_special_tokens=False))


def judge_answers(view: View, findings: Findings, given: Sequence[Conversation]) -> None:
    """Each unbroken run of learned tokens is an answer of the row's own sample, or holds one."""
    if view.labels is None:
        return
    for row, own in enumerate(given):
        runs = list(_learned(view, row))
        answers = [plain(answer) for answer in own.answers]
        if not runs or not answers or any(answer in text for _, text in runs for answer in answers):
            continue
        place, text = runs[-1]
        owner = next((n for n, other in enumerate(given) if n != row and text in map(plain, other.answers)), None)
        cut = next((answer for answer in answers if text and answer.endswith(text)), None)
        cause = "the collator paired prompts with answers of other rows" if owner is not None else (
            "the first tokens of the answer are masked: the response template matched too late"
            if cut
            else "labels were made of another text than the sample's"
        )  # fmt: skip
        whose = "" if owner is None else f", the answer of sample {owner}"
        findings.add(
            "another-answer",
            row,
            place,
            found=f"learned text {text[:60]!r}{whose}",
            expected=f"{answers[-1][:60]!r}",
            cause=cause,
        )


def _learned(view: View, row: int) -> Iterator[tuple[int, str]]:
    """Each unbroken run of learned tokens of a row: its place, and its text without what ends it."""
    assert view.labels is not None
    ids, run = view.labels[row].tolist(), []
    for place, label in enumerate([*ids, -100]):
        if label != -100:
            run.append(label)
        elif run:
            text = view.tokenizer.decode(run, skip_special_tokens=True)
            yield place - len(run), plain(text)
            run = []
