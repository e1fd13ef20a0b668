"""What a folder's processor files say of sizes. Standard library only."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def first_settings(folder: Path, places: Sequence[tuple[str, str | None]]) -> tuple[Path, dict[str, Any]] | None:
    """The file that has the settings of a processor, and these; ``None`` where no file has.

    Args:
        folder: Of the checkpoint.
        places: In the order in which Transformers looks: a file, and what they are called in it.

    Raises:
        ValueError: One that comes before is not JSON, or holds no settings by name.
    """
    for name, inside in places:
        file = folder / name
        if file.is_file() and (found := _settings_in(file, inside)) is not None:
            return file, found
    return None


def _settings_in(file: Path, inside: str | None = None) -> dict[str, Any] | None:
    """The settings of a processor.

    Args:
        file: That holds them.
        inside: What they are called in it, if they are not all of it.

    Returns:
        ``None`` where it has none of that name.

    Raises:
        ValueError: It is not JSON, or holds no settings by name.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if isinstance(found, dict) and inside is not None:
        found = found.get(inside)
        if found is None:
            return None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds {_short(found)} where a processor's settings are expected")
    return found


def pixel_limits(file: Path, settings: dict[str, Any], usual: tuple[int, int]) -> tuple[int, int]:
    """The fewest and the most pixels.

    Args:
        file: That holds the settings, for messages.
        settings: Of an image or video processor.
        usual: What they are where nobody says.

    Raises:
        ValueError: One of them is no number of pixels.
    """
    size = settings.get("size") or {}
    if not isinstance(size, dict):
        raise ValueError(f"{file} has size={_short(size)}: it must be shortest_edge and longest_edge by name")
    said = (
        settings.get("min_pixels") or size.get("shortest_edge") or usual[0],
        settings.get("max_pixels") or size.get("longest_edge") or usual[1],
    )
    for name, value in zip(("min_pixels", "max_pixels"), said, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value == value // 1:
            raise ValueError(f"{file} has {name} (or size) {_short(value)}: it must be a number of pixels")
    return int(said[0]), int(said[1])


def _short(value: Any) -> str:
    return repr(value)[:60]
