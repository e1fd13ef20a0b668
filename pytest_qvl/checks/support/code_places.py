"""Whose code a frame runs, and where that code is: in words that do not depend on where it was installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

PACKAGE = Path(__file__).parents[2].resolve()


def is_own(frame: FrameType) -> bool:
    """Whether a frame runs this package's own code, and not that of a library beneath it.

    By the package's folder: a clone of this repository may lie in a folder of any name, torch's beside it.
    """
    return Path(frame.f_code.co_filename).resolve().is_relative_to(PACKAGE)


def file_of(frame: FrameType) -> str:
    """The file of a frame's code as its module is imported, such as ``transformers/models/qwen2_5_vl/modeling_x.py``.

    Wherever it was installed (site-packages, a folder of ``PYTHONPATH``, an editable clone). Of a script that was
    started, and of code that is in no file of its module's name, the file as Python knows it.
    """
    file = Path(frame.f_code.co_filename)
    names = str(frame.f_globals.get("__name__", "")).split(".")
    tail = [*names, "__init__"] if file.stem == "__init__" else names
    found = Path(*file.parts[-len(tail) :])
    return str(found if found.with_suffix("").parts == tuple(tail) else file)
