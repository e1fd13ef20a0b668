"""What a setting takes: text to value, and the sentence that refuses what it cannot be.

Every parser takes the text and the folder that relative paths start from, and raises a ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pytest_qvl.models.backends import check_usable
from pytest_qvl.models.sources.model_source import check_adapter
from pytest_qvl.outputs import check_beside, check_replaceable

if TYPE_CHECKING:
    from pytest_qvl.models.policy import AdapterPolicy
    from pytest_qvl.models.quantized_layers import QuantizedLayers
    from pytest_qvl.records.known_failures import KnownFailures
    from pytest_qvl.vram.cards import Card

Value = TypeVar("Value")
# What the user typed, and the folder that relative paths in it start from.
Parse = Callable[[str, Path], Value]

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


class SettingError(ValueError):
    """A value that a setting cannot take."""


def one_of(*choices: str) -> Parse[str]:
    """One of a few words."""

    def parse(text: str, folder: Path) -> str:  # noqa: ARG001 - every parser is called alike
        if text not in choices:
            raise SettingError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def whole_number(minimum: int) -> Parse[int]:
    """A whole number, not below ``minimum``."""

    def parse(text: str, folder: Path) -> int:  # noqa: ARG001 - every parser is called alike
        try:
            value = int(text)
        except ValueError:
            raise SettingError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise SettingError(f"{value} is below the smallest value {minimum}")
        return value

    return parse


def parse_truth(text: str, folder: Path) -> bool:  # noqa: ARG001 - every parser is called alike
    """True or false, in the words of ini files."""
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise SettingError(f"{text!r} is neither true nor false; give one of {', '.join(sorted(_TRUE | _FALSE))}")


def parse_size(text: str, folder: Path) -> int:  # noqa: ARG001 - every parser is called alike
    """Bytes, from a size with a unit."""
    from pytest_qvl.vram.units import parse_bytes

    return parse_bytes(text)


def parse_card(text: str, folder: Path) -> Card:  # noqa: ARG001 - every parser is called alike
    """A GPU card by its name."""
    from pytest_qvl.vram.cards import card

    return card(text)


def parse_backend(text: str, folder: Path) -> str:  # noqa: ARG001 - every parser is called alike
    """The name of a backend that is installed."""
    check_usable(text)
    return text


def parse_adapter(text: str, folder: Path) -> Path:
    """The folder of a saved adapter."""
    if not text.strip():
        raise SettingError("no folder was named; leave the setting out, or give the adapter's folder")
    path = folder / Path(text).expanduser()
    check_adapter(path)
    return path.resolve()


def parse_policy(text: str, folder: Path) -> AdapterPolicy:  # noqa: ARG001 - every parser is called alike
    """Parts that are adapted on purpose."""
    from pytest_qvl.models.policy import AdapterPolicy

    return AdapterPolicy.parse(text)


def parse_layers(text: str, folder: Path) -> QuantizedLayers:  # noqa: ARG001 - every parser is called alike
    """Layers that are in 4 bits on purpose."""
    from pytest_qvl.models.quantized_layers import QuantizedLayers

    return QuantizedLayers.parse(text)


def parse_folder(text: str, folder: Path) -> Path:
    """A folder that exists."""
    if not text.strip():
        raise SettingError("no folder was named; leave the setting out, or give the folder's path")
    path = folder / Path(text).expanduser()
    if not path.is_dir():
        raise SettingError(f"the folder {str(path)!r} does not exist")
    return path.resolve()


def parse_fault(text: str, folder: Path) -> str:  # noqa: ARG001 - every parser is called alike
    """The name of a fault."""
    from pytest_qvl.faults.catalogue import find

    return find(text).name


def parse_record(text: str, folder: Path) -> Path:
    """A file that is a record, or none yet."""
    path = folder / Path(text).expanduser()
    # As in `pytest --qvl-record tests/test_mine.py`, where the value was forgotten.
    check_replaceable(path, b'"pytest-qvl/record/', "record")
    check_beside(path)
    return path.resolve()


def parse_page(text: str, folder: Path) -> Path:
    """A file that is a page of a run, or none yet."""
    from pytest_qvl.records.page import check_page

    path = folder / Path(text).expanduser()
    check_page(path)
    check_beside(path)
    return path.resolve()


def parse_base(text: str, folder: Path) -> str:
    """A record to compare with, ``shipped``, or ``shipped:transformers5.17.0``."""
    from pytest_qvl.records.base import is_shipped, shipped_records
    from pytest_qvl.records.stored import read_record

    if is_shipped(text):
        shipped_records(text)
        return text
    path = folder / Path(text).expanduser()
    read_record(path)  # before the run, not after it
    return str(path.resolve())


def parse_known_failures(text: str, folder: Path) -> KnownFailures:
    """A file of known failures, or one inside of an installed package."""
    from pytest_qvl.records.known_failures import read_known_failures

    return read_known_failures(text, folder)


def names_in(file: Path | None, prefix: str) -> set[str]:
    """Which settings of that prefix a file of pytest's sets; pytest itself gives a setting by its name only."""
    if file is None or prefix not in (text := file.read_text(encoding="utf-8")):  # most projects: nothing to parse
        return set()
    names: Iterable[str]
    if file.suffix != ".toml":
        from iniconfig import IniConfig

        sections = IniConfig(str(file), data=text).sections
        names = [name for section in ("pytest", "tool:pytest") for name in sections.get(section, ())]
    else:
        import tomllib

        data = tomllib.loads(text)
        table = data.get("tool", {}).get("pytest", {}) | data.get("pytest", {})
        names = [*table, *table.get("ini_options", ())]
    return {name for name in names if name.startswith(prefix)}
