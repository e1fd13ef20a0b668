"""How long the samples of a user's dataset are, and the batches that training on it can draw.

Images are read no further than their size; text is counted by the tokenizer beside the model, through its chat template
where rows hold messages. The batch that runs out of memory is not the usual one but the worst: the longest sample,
which all others are padded to, beside those with the most visual tokens.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.vram.forecast.dataset_rows import image_of, is_image, is_video, parts_of, places_for, rows_of
from pytest_qvl.vram.forecast.request import Request, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_qvl.models.sources.released import ImageSizes
    from pytest_qvl.vram.forecast.source import Source

IMAGE_FILES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Batches drawn to say what the usual one is; their quantiles are those of all batches within a few per cent.
DRAWN_BATCHES = 2000
_PLACE = re.compile("<(image|video)>")
_WRITERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TEXT_KEYS = (
    *(("text",), ("prompt", "completion"), ("prompt", "response"), ("query", "response"), ("question", "answer")),
    *(("instruction", "input", "output"), ("instruction", "output"), ("prompt",)),
)
# Columns with text that templates or trainers write beside these, and that is not counted.
_UNCOUNTED = ("tools", "history", "chosen", "rejected")


@dataclass(frozen=True)
class Row:
    """One sample of the dataset.

    Attributes:
        name: Where it is: a file, or a line.
        sample: Its images and text tokens.
        visual: Its visual tokens.
    """

    name: str
    sample: Sample
    visual: int

    @property
    def tokens(self) -> int:
        """All of its tokens."""
        return self.visual + self.sample.tokens


@dataclass(frozen=True)
class Batch:
    """Rows that are trained together.

    Attributes:
        which: ``"median"``, ``"95 %"`` or ``"worst"``.
        rows: Its rows.
    """

    which: str
    rows: tuple[Row, ...]

    @property
    def longest(self) -> Row:
        """The row that the others are padded to."""
        return max(self.rows, key=lambda row: row.tokens)

    @property
    def padded(self) -> int:
        """Tokens of the batch, every row padded to its longest."""
        return len(self.rows) * self.longest.tokens

    @property
    def samples(self) -> tuple[Sample, ...]:
        """For a request."""
        return tuple(row.sample for row in self.rows)


@dataclass(frozen=True)
class Dataset:
    """The samples of a dataset.

    Attributes:
        name: The folder or file.
        rows: All of them, at least one.
    """

    name: str
    rows: tuple[Row, ...]

    def quantile(self, share: float, of: Callable[[Row], int]) -> int:
        """The value that ``share`` of the rows do not exceed."""
        return sorted(map(of, self.rows))[_rank(share, len(self.rows))]

    def batches(self, size: int) -> tuple[Batch, Batch, Batch]:
        """The median batch, the one that 95 % do not exceed (of shuffled ones, by tokens), and the worst that can be.

        A dataset with fewer rows than a batch gives a smaller batch.
        """
        size = min(size, len(self.rows))
        shuffled, found = random.Random(0), []
        for _ in range(DRAWN_BATCHES):
            found.append(Batch("", tuple(shuffled.sample(self.rows, size))))
        found.sort(key=lambda batch: (batch.padded, sum(row.visual for row in batch.rows)))
        return (
            Batch("median", found[_rank(0.5, len(found))].rows),
            Batch("95 %", found[_rank(0.95, len(found))].rows),
            self.worst(size),
        )

    def worst(self, size: int) -> Batch:
        """The longest row beside those with the most visual tokens: no batch is padded to more or has more of them."""
        longest = max(self.rows, key=lambda row: (row.tokens, row.visual))
        others = sorted((row for row in self.rows if row is not longest), key=lambda row: row.visual, reverse=True)
        return Batch("worst", (longest, *others[: size - 1]))


def _rank(share: float, count: int) -> int:
    return max(0, math.ceil(share * count) - 1)


def read_dataset(where: Path, source: Source, model: str, tokens: int | None) -> Dataset:
    """The samples of a folder of images (one each) or of a JSONL file.

    A row of a JSONL has its images as ``image`` or ``images`` (paths, from the file's folder on) or in the messages,
    its videos as ``video`` (a list of the images of its sampled frames), ``videos`` (several such lists) or in the
    messages, and its text as ``messages``, ``conversations`` (LLaVA's) or plain: ``text``, ``prompt`` and
    ``completion`` or ``response``, ``question`` and ``answer``, ``instruction``, ``input`` and ``output``; a ``system``
    prompt goes before any.

    Args:
        where: The folder or file.
        source: The model's configuration, with what its processor does with image sizes.
        model: Released name or folder; a folder's tokenizer counts the text.
        tokens: Text tokens of every row; ``None`` for those of its text.

    Raises:
        ValueError: No images; a row or image that cannot be read; text without a tokenizer to count it; a video that is
            a file, or whose frames differ in size.
    """
    if where.is_dir():
        files = sorted(file for file in where.rglob("*") if file.suffix.lower() in IMAGE_FILES)
        text = Request.tokens if tokens is None else tokens
        rows = [_row(str(file.relative_to(where)), [file], [], text, source) for file in files]
    elif where.is_file():
        count = None if tokens is not None else _Counter(model, where)
        rows = []
        for name, row in rows_of(where):
            images, videos = _images(row, where, name), _videos(row, where, name)
            text = tokens if count is None else count(row, len(images), len(videos), name)  # type: ignore[assignment]
            rows.append(_row(name, images, videos, text, source))
    else:
        raise ValueError(f"dataset {str(where)!r} is neither a folder of images nor a JSONL file")
    if not rows:
        raise ValueError(f"dataset {str(where)!r} holds no {'images' if where.is_dir() else 'rows'}")
    _hold_to_processor(rows, source.sizes, model)
    return Dataset(str(where), tuple(rows))


def _row(name: str, images: Sequence[Path], videos: Sequence[Sequence[Path]], tokens: int, source: Source) -> Row:
    measured = tuple(_size(image) for image in images)
    frames = tuple(_frames(video, name) for video in videos)
    sample = Sample(measured, max(tokens, 2 * (len(measured) + len(frames)) + 2), frames)
    try:
        return Row(name, sample, source.lengths(sample, None)[0])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _frames(video: Sequence[Path], name: str) -> tuple[int, int, int]:
    """How many frames, and their height and width."""
    sizes = sorted({_size(frame) for frame in video})
    if len(sizes) > 1:
        shown = " and ".join(f"{height}x{width}" for height, width in sizes[:2])
        raise ValueError(f"{name} has a video with frames of {shown}: all frames of one must have one size")
    return len(video), *sizes[0]


def _size(image: Path) -> tuple[int, int]:
    """Height and width."""
    from PIL import Image

    try:
        with Image.open(image) as opened:
            return opened.height, opened.width
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {str(image)!r} cannot be read: {error}") from None


def _images(row: dict[str, Any], file: Path, name: str) -> list[Path]:
    """The images of a row, wherever it names them."""
    parts = [part for part in parts_of(row) if is_image(part)]
    given = row.get("images") or row.get("image") or []
    given = list(given) if isinstance(given, list) else [given]
    if not given:
        given = [image_of(part) for part in parts]
    _check_places("image", max(len(parts), places_for("image", row)), len(given), name)
    return _paths(given, file, name)


def _check_places(what: str, places: int, given: int, name: str) -> None:
    if places > given:
        raise ValueError(f"{name} has {given} {what}s and a place for {places}")


def _paths(given: Sequence[Any], file: Path, name: str) -> list[Path]:
    """Paths of images, from the JSONL's folder on."""
    for image in given:
        path = image.removeprefix("file://") if isinstance(image, str) else ""
        if not path or "://" in path or path.startswith("data:"):
            raise ValueError(f"{name} has the image {str(image)[:60]!r}, which is no path of a file")
    return [file.parent / image.removeprefix("file://") for image in given]


def _videos(row: dict[str, Any], file: Path, name: str) -> list[list[Path]]:
    """The frames of a row's videos, wherever it names them."""
    parts = [part for part in parts_of(row) if is_video(part)]
    given = row.get("videos") or ([row["video"]] if row.get("video") else [])
    if not given:
        given = [part.get("video") or part.get("path") or part.get("url") for part in parts]
    _check_places("video", max(len(parts), places_for("video", row)), len(given), name)
    for video in given:
        if not isinstance(video, list) or not video:
            raise ValueError(
                f"{name} has the video {str(video)[:60]!r}, which is not read here: give the images of its sampled "
                'frames as a list, such as {"video": ["frame1.jpg", "frame2.jpg"]}'
            )
    return [_paths(video, file, name) for video in given]


class _Counter:
    """Counts the text tokens of rows with the model's own tokenizer and chat template."""

    def __init__(self, model: str, file: Path) -> None:
        from pytest_qvl.models.sources.processors import TOKENIZER_FILES, load_processor
        from pytest_qvl.models.sources.released import released_names

        if model in released_names() or not any((Path(model) / name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(
                f"the text of {file.name} needs a tokenizer to count it, and there is none beside {model!r}: give "
                "--model a folder with the checkpoint's tokenizer, or --tokens for every row"
            )
        self._processor = load_processor(model)

    def __call__(self, row: dict[str, Any], images: int, videos: int, name: str) -> int:
        """Text tokens of a row, the markers around its images and videos included."""
        if uncounted := [key for key in _UNCOUNTED if row.get(key)]:
            raise ValueError(f"{name} has {uncounted[0]}, whose tokens are not counted: say --tokens for every row")
        messages = _messages(row, images, videos)
        tokenizer = self._processor.tokenizer
        if messages is None:
            keys = next((keys for keys in _TEXT_KEYS if all(isinstance(row.get(key), str) for key in keys)), None)
            if keys is None:
                raise ValueError(
                    f"{name} has no text: known are messages, conversations and "
                    f"{', '.join(' with '.join(keys) for keys in _TEXT_KEYS)}"
                )
            text = "".join([_system(row), *(row[key] for key in keys)]).replace("<image>", "").replace("<video>", "")
            return len(tokenizer(text)["input_ids"]) + 2 * (images + videos)
        text = self._processor.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text)["input_ids"]
        for what, given, token in (
            ("images", images, self._processor.image_token),
            ("videos", videos, self._processor.video_token),
        ):
            placeholders = ids.count(tokenizer.convert_tokens_to_ids(token))
            if placeholders != given:
                raise ValueError(f"{name} has {given} {what} and a place for {placeholders}")
        return len(ids) - images - videos


def _messages(row: dict[str, Any], images: int, videos: int) -> list[dict[str, Any]] | None:
    """Messages of a row in the form that chat templates take; ``None`` where it has plain text."""
    if isinstance(row.get("messages"), list):
        messages = [dict(message) for message in row["messages"]]
    elif isinstance(row.get("conversations"), list):
        messages = [
            {"role": _WRITERS.get(turn["from"], "user"), "content": turn["value"]} for turn in row["conversations"]
        ]
    else:
        return None
    if system := _system(row):
        messages.insert(0, {"role": "system", "content": system})
    marked = [message for message in messages if _PLACE.search(str(message.get("content")))]
    placed = any(is_image(part) or is_video(part) for part in parts_of(row))
    for message in marked if not placed else ():
        message["content"] = _split(message["content"])
    if not placed and not marked and images + videos and messages:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        seen = [{"type": "image"}] * images + [{"type": "video"}] * videos
        said = first["content"]
        first["content"] = [*seen, *([{"type": "text", "text": said}] if isinstance(said, str) else said)]
    return messages


def _system(row: dict[str, Any]) -> str:
    """A system prompt in a column of its own."""
    said = row.get("system")
    return said if isinstance(said, str) else ""


def _split(content: Any) -> Any:
    """Text with ``<image>`` and ``<video>`` in it as parts."""
    if not isinstance(content, str):
        return content
    pieces = _PLACE.split(content)  # text, then in turn what is placed and text
    parts = [{"type": piece} if i % 2 else {"type": "text", "text": piece} for i, piece in enumerate(pieces)]
    return [part for part in parts if part.get("text") != ""]


def _hold_to_processor(rows: Sequence[Row], sizes: ImageSizes, model: str) -> None:
    """Hold the visual tokens of the largest images to what the processor beside the model makes of them.

    Raises:
        ValueError: They differ.
    """
    from pytest_qvl.models.sources.processors import TOKENIZER_FILES, load_processor

    if not any((Path(model) / name).is_file() for name in TOKENIZER_FILES):
        return
    processor = load_processor(model).image_processor
    counted = getattr(processor, "get_number_of_image_patches", None)
    if counted is None:  # not before Transformers 4.53
        return
    for size in sorted({size for row in rows for size in row.sample.images}, key=lambda s: s[0] * s[1])[-100:]:
        found = int(counted(*size, {})) // processor.merge_size**2
        if found != sizes.visual_tokens(*size):
            raise ValueError(
                f"the processor beside {model!r} makes {found} visual tokens of {size[0]}x{size[1]}, and the forecast "
                f"{sizes.visual_tokens(*size)}"
            )
