"""Sizes: strict in, readable out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qvl.vram.units import GiB, MiB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("15 GiB", 15 * 1024**3),
        ("15GiB", 15 * 1024**3),
        (" 14.5 gib ", int(14.5 * 1024**3)),
        ("16 GB", 16 * 10**9),
        ("512 MiB", 512 * 1024**2),
        ("2 TiB", 2 * 1024**4),
        ("1 kB", 1000),
        ("7 B", 7),
        (4096, 4096),
    ],
)
def test_sizes_are_read_exactly(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


def test_a_gib_is_not_a_gb() -> None:
    assert parse_bytes("1 GiB") - parse_bytes("1 GB") == 73_741_824


@pytest.mark.parametrize(
    "junk",
    [
        *("", "15", "GiB", "15 GiBs", "15 Gi", "x15 GiB", "15 GiB x", "-1 GiB", "1e3 MiB", "1,5 GiB", "0 GiB", "1.5 B"),
        *("١ GiB", "15\nGiB", 0, -5, True, None, 1.5),
    ],
)
def test_junk_is_refused_with_one_clear_error(junk: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(junk)  # type: ignore[arg-type]


@given(st.integers(1, 2**60))
def test_whole_bytes_survive_the_way_through_text(size: int) -> None:
    assert parse_bytes(f"{size} B") == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (300, "300 B"),
        (2048, "2.0 KiB"),
        (652 * MiB, "652 MiB"),
        (int(14.56 * GiB), "14.56 GiB"),
        (-MiB, "-1 MiB"),
    ],
)
def test_sizes_are_printed_in_binary_units(size: int, text: str) -> None:
    assert format_bytes(size) == text
