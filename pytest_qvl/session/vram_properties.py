"""The VRAM numbers of a test, for those who read its JUnit properties or pytest-benchmark's ``extra_info``.

Imports no torch; pytest-benchmark is known by the fixture that a test uses, never imported.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.session.fixture_graph import fixture_names

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_qvl.vram.meter import Meter
    from pytest_qvl.vram.usage import Usage

METER_FIXTURE = "qvl_vram"


def add_properties(item: pytest.Item, what: str, usage: Usage) -> None:
    """Note the numbers of one measured phase, in bytes, as ``qvl_vram_<what>_<number>``; none if not measured.

    Where a phase was measured several times, the highest stays.
    """
    from pytest_qvl.vram.usage import NUMBERS

    before: dict[str, Any] = dict(item.user_properties)
    for of in NUMBERS:
        value = usage.number(of)
        if value is None:
            continue
        name = f"qvl_vram_{what}_{of}"
        highest = max(value, before.get(name, 0))
        item.user_properties[:] = [(n, v) for n, v in item.user_properties if n != name]
        item.user_properties.append((name, highest))
        benchmark = (getattr(item, "funcargs", None) or {}).get("benchmark")
        if isinstance(extra_info := getattr(benchmark, "extra_info", None), dict):
            extra_info[name] = highest


class PhaseNumbers:
    """Adds the numbers of the phases that a test measures with the fixture ``qvl_vram``.

    Args:
        meter: What the fixture gives.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Add the phases that have ended since the test's body began, also when the body failed."""
        if METER_FIXTURE not in fixture_names(item):
            return (yield)
        ended = len(self._meter.session().inner)
        try:
            return (yield)
        finally:
            for usage in self._meter.session().inner[ended:]:
                if usage.name != item.nodeid:  # the body itself, under a limit, is reported with it
                    add_properties(item, re.sub(r"[^a-z0-9]+", "_", usage.name.lower()).strip("_"), usage)
