"""Sizes in bytes, parsed strictly and printed the same way everywhere.

Standard library only. ``GiB`` (2**30) is not ``GB`` (10**9): a "16 GB" card and a 15 GiB limit differ by 7 %,
more than the errors this package reports, so no unit is guessed.
"""

from __future__ import annotations

import re
from decimal import Decimal

KiB = 1024
MiB = 1024**2
GiB = 1024**3

_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": KiB,
    "MiB": MiB,
    "GiB": GiB,
    "TiB": 1024**4,
}
_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}
_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?) ?(?P<unit>[A-Za-z]+)", re.ASCII)


def parse_bytes(text: str | int) -> int:
    """The number of bytes in ``text``, such as ``"15 GiB"``, ``"14.5GiB"`` or ``"16 GB"``.

    A unit is required in text (any case); a plain ``int`` is bytes already.

    Raises:
        ValueError: Not a size, no unit, a unit that is not one of B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, not
            a whole number of bytes when given in B, or not above zero.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = Decimal(text)
    else:
        match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
        factor = _BY_LOWER.get(match["unit"].lower()) if match else None
        if match is None or factor is None:
            raise ValueError(
                f"{text!r} is not a size: write a number and a unit, as in '15 GiB' (2**30 bytes) or '16 GB' "
                f"(10**9 bytes); units: {', '.join(_UNITS)}"
            )
        size = Decimal(match["number"]) * factor
        if factor == 1 and size != size.to_integral_value():
            raise ValueError(f"{text!r} is not a size: bytes are whole numbers")
    if size < 1:
        raise ValueError(f"{text!r} is not a size: it must be at least one byte")
    return int(size)


def format_bytes(size: int) -> str:
    """``size`` for people, in binary units: ``"14.56 GiB"``, ``"652 MiB"``, ``"12.0 KiB"``, ``"300 B"``."""
    sign, size = ("-", -size) if size < 0 else ("", size)
    if size >= GiB:
        return f"{sign}{size / GiB:.2f} GiB"
    if size >= MiB:
        return f"{sign}{size / MiB:.0f} MiB"
    if size >= KiB:
        return f"{sign}{size / KiB:.1f} KiB"
    return f"{sign}{size} B"
