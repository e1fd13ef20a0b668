"""A user's own probes: a folder with pictures and a ``samples.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.samples.sample import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLES_FILE = "samples.jsonl"
FIELDS = ("image", "images", "question", "answer", "skill", "id", "swapped", "swapped_answer")


class _Line:
    """One line of the file: reads its fields, and says where it stands when one is bad."""

    def __init__(self, folder: Path, number: int, text: str) -> None:
        self.folder = folder
        self.number = number
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise self.error(
                f"not JSON ({error.msg} at column {error.colno})", "write one JSON object per line"
            ) from None
        if not isinstance(fields, dict):
            raise self.error(f"{_short(fields)} is not an object", 'write {"image": …, "question": …, "answer": …}')
        if unknown := [name for name in fields if name not in FIELDS]:
            raise self.error(f"unknown field {unknown[0]!r}", f"known fields are {', '.join(FIELDS)}")
        self.fields: dict[str, Any] = fields

    def error(self, what: str, mend: str) -> ValueError:
        return ValueError(f"{self.folder / SAMPLES_FILE}, line {self.number}: {what}; {mend}")

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{name} is {_short(value)}", "give a non-empty string")
        return value

    def required_text(self, name: str) -> str:
        value = self.text(name)
        if value is None:
            raise self.error(f"{name} is missing", f'add "{name}"')
        return value

    def pictures(self, name: str) -> tuple[Image, ...]:
        """The pictures that a field names: one path, or a list of paths."""
        value = self.fields.get(name)
        paths = [] if value is None else value if isinstance(value, list) else [value]
        return tuple(self._picture(name, path) for path in paths)

    def _picture(self, field: str, value: object) -> Image:
        from PIL import Image, UnidentifiedImageError

        if not isinstance(value, str) or not value:
            raise self.error(f"{field} has {_short(value)}", "give the picture's path as a string")
        path = (self.folder / value).resolve()
        if not path.is_relative_to(self.folder):
            raise self.error(f"{field} {value!r} leaves the folder", f"put the picture under {self.folder}")
        if not path.is_file():
            raise self.error(f"{field} {value!r} does not exist", f"paths are relative to {self.folder}")
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise self.error(f"{field} {value!r} cannot be read ({error})", "save it as PNG or JPEG") from None

    def sample(self) -> Sample:
        if "image" in self.fields and "images" in self.fields:
            raise self.error("both image and images are given", "keep one of them")
        answer = self.required_text("answer")
        images = self.pictures("image" if "image" in self.fields else "images")
        swapped, swapped_answer = self._swapped(images, answer)
        return Sample(
            images=images,
            question=self.required_text("question"),
            answer=answer,
            skill=self.text("skill") or "custom",
            id=self.text("id") or f"line-{self.number}",
            swapped=swapped,
            swapped_answer=swapped_answer,
        )

    def _swapped(self, images: tuple[Image, ...], answer: str) -> tuple[tuple[Image, ...] | None, str | None]:
        swapped, swapped_answer = self.pictures("swapped"), self.text("swapped_answer")
        if not swapped and swapped_answer is None:
            return None, None
        if not swapped or swapped_answer is None:
            raise self.error("one of swapped and swapped_answer is missing", "give both or neither")
        if swapped_answer == answer:
            raise self.error(f"swapped_answer {answer!r} is the answer itself", "swap in pictures with another answer")
        sizes, swapped_sizes = [image.size for image in images], [image.size for image in swapped]
        if sizes != swapped_sizes:
            raise self.error(f"swapped has sizes {swapped_sizes}, not {sizes}", "give pictures of the same sizes")
        return swapped, swapped_answer


def folder_samples(path: str | Path) -> list[Sample]:
    """The probes of a user's folder: pictures, and a ``samples.jsonl`` with one object per line.

    Fields: ``image`` (a path) or ``images`` (a list; neither for a text-only probe), ``question``,
    ``answer``, and optionally ``skill`` (default ``custom``), ``id`` (default ``line-<number>``), ``swapped``
    with ``swapped_answer`` (pictures of the same sizes for which the question has that other answer). Paths
    are relative to the folder and stay inside it, symbolic links followed. Empty lines are passed over.

    Raises:
        ValueError: What is wrong, naming file, line, value and mend.
    """
    folder = Path(path).resolve()
    file = folder / SAMPLES_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist; write one JSON object per line with image, question and answer")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        line = _Line(folder, number, text)
        sample = line.sample()
        if sample.id in seen:
            raise line.error(f"id {sample.id!r} was given in line {seen[sample.id]}", "make every id different")
        seen[sample.id] = number
        samples.append(sample)
    if not samples:
        raise ValueError(f"{file} has no samples; write one JSON object per line with image, question and answer")
    return samples


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
