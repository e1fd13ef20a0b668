"""Files that this package writes: whether they can be, looked at before the work; and JSON, whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

START = 1024  # bytes, within which a file of this package says what it is


def no_regular_file(path: Path) -> str:
    """What is there in place of a regular file, in one sentence; empty where one is there, or nothing."""
    if path.is_dir():
        return f"{str(path)!r} is a folder, not a regular file"
    if path.exists() and not path.is_file():
        return f"{str(path)!r} is a device or a pipe, not a regular file, and is not replaced by one"
    return ""


def check_replaceable(path: Path, mark: bytes, what: str) -> None:
    """Refuse a file that is there and is none of its kind, such as a test behind an option without its value.

    Args:
        path: What is to be written; may be empty, or not there yet.
        mark: By which such a file is known, within its first :data:`START` bytes.
        what: "record" or "report", for the message.

    Raises:
        ValueError: A folder, a device, a pipe, or a file that this package did not write.
    """
    if reason := no_regular_file(path):
        raise ValueError(reason)
    if not path.is_file():
        return
    with path.open("rb") as stream:
        start = stream.read(START)
    if start.strip() and mark not in start:
        raise ValueError(f"{str(path)!r} is there and is no {what} of a run: name another file, or delete it first")


def check_beside(path: Path) -> None:
    """Refuse a file that could not be put in its place, before the work: a new one is written beside it.

    Args:
        path: What is to be written; it and its folder may not be there yet.

    Raises:
        ValueError: Its folder, or the part of the path that is there already, is a file or read-only.
    """
    there = _already_there(path.absolute().parent)
    if not there.is_dir():
        raise ValueError(f"{str(path)!r} cannot be written: {str(there)!r} is not a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(
            f"{str(path)!r} cannot be written: the folder {str(there)!r} is read-only for this user; name another one"
        )


def check_file(option: str, path: Path) -> None:
    """Refuse a file that could not be written.

    Raises:
        ValueError: Its folder is not there or read-only, or it is a folder, a device or a pipe, or read-only itself.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {str(path.parent)!r}: make it first")
    if reason := no_regular_file(path):
        raise ValueError(f"{option}: {reason}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option}: {str(path)!r} cannot be written: it is read-only for this user")


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that could not be made, or written to.

    Raises:
        ValueError: It, or the part of its path that is there already, is a file or read-only.
    """
    there = _already_there(folder.absolute())
    if not there.is_dir():
        raise ValueError(f"{option}: {str(there)!r} is not a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{option}: {str(there)!r} cannot be written to: it is read-only for this user")


def _already_there(folder: Path) -> Path:
    """A folder, or the last part of its path that is there: what decides whether it can be made."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def write_json(path: Path, data: Any) -> str:
    """Write JSON so that a reader sees the old file or the new one, never half of one.

    Args:
        path: The file; made with the permissions that the process's umask leaves.
        data: What to write.

    Returns:
        Why it could not be written, in one sentence; nothing is left beside the old file then. Empty if it was.
    """
    return replace_file(path, json.dumps(data, indent=1, default=str) + "\n")


def replace_file(path: Path, text: str) -> str:
    """Write a text so that a reader sees the old file or the new one, never half of one.

    Args:
        path: The file; made with the permissions that the process's umask leaves, its folder too.
        text: What to write, as UTF-8.

    Returns:
        Why it could not be written, in one sentence; nothing is left beside the old file then. Empty if it was.
    """
    if reason := no_regular_file(path):  # a rename would put a file in the place of /dev/null
        return f"{path} could not be written: {reason}"
    beside = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())  # else a machine that loses power keeps the new name and none of its content
        beside.replace(path)
    except OSError as error:
        return f"{path} could not be written: {error.strerror or error}"
    finally:  # also where a second Ctrl-C ends the writing
        with suppress(OSError):
            beside.unlink()
    return ""


def between_marks(page: str, begin: str, end: str, block: str, *, missing: str) -> str:
    """A page with another block between two marks, which stay.

    Args:
        page: The whole page.
        begin: The mark before the block.
        end: The mark behind it.
        block: What to put between them, with its line breaks.
        missing: What is said of a page without the marks.

    Raises:
        ValueError: The page has not both marks, in this order.
    """
    before, begun, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(missing)
    return f"{before}{begin}{block}{end}{after}"
