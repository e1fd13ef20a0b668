"""The rows of a JSONL, refused where they are not in a form that is read. Standard library only."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Of an image or a video in a message: qwen-vl-utils resizes by them, and the processors of Transformers do not.
_RESIZED_BY = ("resized_height", "resized_width", "min_pixels", "max_pixels", "total_pixels")
# Where a row has its turns, with the names of who speaks and of what is said.
_TURNS = (("messages", "role", "content"), ("conversations", "from", "value"))


def rows_of(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row, and where it is.

    Raises:
        ValueError: A line that is no row, or a row whose turns or videos are not in the form that is read.
    """
    with file.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    name = f"{file.name}, line {number}"
                    yield name, _row(line, name)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name} is not UTF-8: {error}") from None


def _row(line: str, name: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        listed = ": it begins a list, and a JSONL has a row on each line" if line.lstrip().startswith("[") else ""
        raise ValueError(f"{name} is not JSON{listed or f': {error}'}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{name} holds a {type(row).__name__} and not one row")
    for key, who, what in _TURNS:
        if row.get(key) is not None:
            _check_turns(row[key], (key, who, what), name)
    if not isinstance(row.get("videos") or [], list):
        raise ValueError(f"{name} has videos={row['videos']!r}: it must be a list of videos")
    for part in parts_of(row):
        if (is_image(part) or is_video(part)) and (sizes := [key for key in _RESIZED_BY if part.get(key) is not None]):
            raise ValueError(
                f"{name} has an image or video with {sizes[0]}={part[sizes[0]]!r}, which is not followed: give it in "
                "the size that the processor gets, and leave it out"
            )
    return row


def _check_turns(turns: Any, names: tuple[str, str, str], name: str) -> None:
    key, who, what = names
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name} has {key}={_short(turns)}: it must be a list of turns")
    for turn in turns:
        said = turn.get(what) if isinstance(turn, dict) else None
        in_parts = key == "messages" and isinstance(said, list) and all(isinstance(part, dict) for part in said)
        if not (isinstance(said, str) or in_parts) or not isinstance(turn.get(who), str):
            raise ValueError(
                f"{name} has the turn {_short(turn)} in {key}: it needs {who}, a name, and {what}, a text"
                + (" or a list of parts" if key == "messages" else "")
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def parts_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of its messages."""
    contents = [message["content"] for message in row.get("messages") or []]
    return [part for content in contents if isinstance(content, list) for part in content]


def places_for(what: str, row: dict[str, Any]) -> int:
    """How many ``<image>`` or ``<video>`` its turns have as text."""
    texts = [turn[said] for key, _, said in _TURNS for turn in row.get(key) or []]
    return sum(text.count(f"<{what}>") for text in texts if isinstance(text, str))


def is_image(part: dict[str, Any]) -> bool:
    """Whether a part of a message is an image, as chat templates of Qwen-VL ask."""
    return part.get("type") in {"image", "image_url"} or bool(part.get("image") or part.get("image_url"))


def is_video(part: dict[str, Any]) -> bool:
    """Whether it is a video."""
    return part.get("type") == "video" or bool(part.get("video"))


def image_of(part: dict[str, Any]) -> Any:
    """What a part of a message names as its image; OpenAI's form has a mapping around it."""
    url = part.get("image_url")
    return (
        part.get("image") or part.get("path") or part.get("url") or (url.get("url") if isinstance(url, dict) else url)
    )
