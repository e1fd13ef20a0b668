"""What a batch was made of, whoever holds it: samples of this package, or chat messages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.turns import ANSWERS
from pytest_qvl.evidence import InputError
from pytest_qvl.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from PIL.Image import Image

# What stands for an image or a video inside of a text, in data sets (LLaVA, LLaMA-Factory) and in ChatML.
_PLACEHOLDERS = re.compile(r"<image>|<video>|<\|vision_start\|><\|(?:image|video)_pad\|><\|vision_end\|>")
TAKES = 'samples are pytest_qvl.samples.Sample or mappings with "messages" (and "images")'


@dataclass(frozen=True)
class Conversation:
    """A sample, whoever holds it.

    Attributes:
        images: Images in their order; None for one that was not read (an address).
        questions: What the user says, turn by turn, without what stands for images and videos.
        answers: What the assistant says.
    """

    images: tuple[Image | None, ...] = ()
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


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
        tuple(_PLACEHOLDERS.sub("", text) for text in _texts(messages, "user")),
        tuple(_texts(messages, ANSWERS)),
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
    """The image itself, or from its file, turned as EXIF says; None where it is an address or something else."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    if isinstance(image, Pillow.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    name = str(image).removeprefix("file://") if isinstance(image, str | Path) else ""
    if name and "://" not in name and len(name) < 4096 and Path(name).is_file():
        with Pillow.open(name) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    return None
