"""A user's own probes: a folder with images and a ``samples.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.samples.batch import reserved_token
from pytest_qvl.samples.sample import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLES_FILE = "samples.jsonl"
# Qwen-VL's image processor refuses images more oblong than this (``smart_resize`` in Transformers).
MAX_ASPECT_RATIO = 200
OBJECT = 'write {"image": …, "question": …, "answer": …}'
FIELDS = ("image", "images", "question", "answer", "skill", "id", "swapped", "swapped_answer")


class _Line:
    """One line of ``samples.jsonl``: reads its fields; an error names the file and the line."""

    def __init__(self, folder: Path, number: int, text: str) -> None:
        self.folder = folder
        self.number = number
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise self.error(
                f"not JSON ({error.msg} at column {error.colno})", "write one JSON object per line"
            ) from None
        except (RecursionError, ValueError):  # nested too deeply; a number of thousands of digits
            raise self.error("JSON that Python cannot read (nested too deeply, or a number too long)", OBJECT) from None
        if not isinstance(fields, dict):
            raise self.error(f"{_short(fields)} is not an object", OBJECT)
        if unknown := [name for name in fields if name not in FIELDS]:
            raise self.error(f"unknown field {unknown[0]!r}", f"known fields are {', '.join(FIELDS)}")
        self.fields: dict[str, Any] = fields

    def error(self, what: str, fix: str) -> ValueError:
        return ValueError(f"{self.folder / SAMPLES_FILE}, line {self.number}: {what}; {fix}")

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{name} is {_short(value)}", "give a non-empty string")
        if not _encodes(value):
            raise self.error(f"{name} is {_short(value)}, which is no text in UTF-8", "write whole characters")
        return value

    def prompt_text(self, name: str) -> str | None:
        """A text that becomes part of a prompt."""
        value = self.text(name)
        if value is not None and (token := reserved_token(value)):
            raise self.error(f"{name} holds {token}", "leave it out: the chat template writes the special tokens")
        return value

    def required_text(self, name: str) -> str:
        value = self.prompt_text(name)
        if value is None:
            raise self.error(f"{name} is missing", f'add "{name}"')
        return value

    def images(self, name: str) -> tuple[Image, ...]:
        """The images that a field names: one path, or a list of paths."""
        value = self.fields.get(name)
        paths = [] if value is None else value if isinstance(value, list) else [value]
        return tuple(self._image(name, path) for path in paths)

    def _image(self, field: str, value: object) -> Image:
        from PIL import Image, ImageOps, UnidentifiedImageError

        path = self._path(field, value)
        try:
            with Image.open(path) as stored:
                self._check_shape(field, value, stored.size)
                # As Transformers' own loader does (transformers.image_utils.load_image): cameras store an image as
                # the sensor lay and say in EXIF how to turn it.
                return ImageOps.exif_transpose(stored).convert("RGB")
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise self.error(f"{field} {value!r} cannot be read ({error})", "save it as PNG or JPEG") from None

    def _path(self, field: str, value: object) -> Path:
        if not isinstance(value, str) or not value:
            raise self.error(f"{field} has {_short(value)}", "give the image's path as a string")
        if "\0" in value or not _encodes(value):
            raise self.error(f"{field} {_short(value)} can be no file name", "give the image's path")
        path = self.folder / value
        try:
            path = path.resolve()
            inside, exists = path.is_relative_to(self.folder), path.is_file()
        except (OSError, RuntimeError) as error:  # a name too long, links in a circle
            raise self.error(f"{field} {_short(value)} is no path ({error})", "give the image's path") from None
        if not inside:
            raise self.error(f"{field} {value!r} leaves the folder", f"put the image under {self.folder}")
        if not exists:
            raise self.error(f"{field} {value!r} does not exist", f"paths are relative to {self.folder}")
        return path

    def _check_shape(self, field: str, value: object, size: tuple[int, int]) -> None:
        if max(size) > MAX_ASPECT_RATIO * min(size):
            raise self.error(
                f"{field} {value!r} is {size[0]}x{size[1]} px",
                f"crop it: Qwen-VL's image processor refuses sides that differ by more than {MAX_ASPECT_RATIO} times",
            )

    def sample(self) -> Sample:
        if "image" in self.fields and "images" in self.fields:
            raise self.error("both image and images are given", "keep one of them")
        answer = self.required_text("answer")
        images = self.images("image" if "image" in self.fields else "images")
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
        swapped, swapped_answer = self.images("swapped"), self.prompt_text("swapped_answer")
        if not swapped and swapped_answer is None:
            return None, None
        if not swapped or swapped_answer is None:
            raise self.error("one of swapped and swapped_answer is missing", "give both or neither")
        if swapped_answer == answer:
            raise self.error(f"swapped_answer {answer!r} is the answer itself", "swap in images with another answer")
        sizes, swapped_sizes = [image.size for image in images], [image.size for image in swapped]
        if sizes != swapped_sizes:
            raise self.error(f"swapped has sizes {swapped_sizes}, not {sizes}", "give images of the same sizes")
        return swapped, swapped_answer


def folder_samples(path: str | Path) -> list[Sample]:
    """The probes of a user's folder: images, and a ``samples.jsonl`` (UTF-8) with one object per line.

    Fields: ``image`` (a path) or ``images`` (a list; neither for a text-only probe), ``question``,
    ``answer``, and optionally ``skill`` (default ``custom``), ``id`` (default ``line-<number>``), ``swapped``
    with ``swapped_answer`` (images of the same sizes for which the question has that other answer). Paths
    are relative to the folder and stay inside it, symbolic links followed, so that a folder is complete wherever
    it is copied. Empty lines are passed over.

    Images are read as ``transformers.image_utils.load_image`` reads them: turned the way that EXIF says, then
    converted to RGB.

    Raises:
        ValueError: What is wrong, naming file, line, value and fix.
    """
    folder = Path(path).resolve()
    file = folder / SAMPLES_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist; write one JSON object per line with image, question and answer")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
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


def _encodes(text: str) -> bool:
    """Whether a text can be encoded: JSON may hold half of a surrogate pair, which no encoding writes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=isinstance(value, str) and not _encodes(value))
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 60 else text[:59] + "…"
