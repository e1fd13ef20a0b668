"""Known failures: tests of the suite that are expected to fail, strictly, and what became of every entry."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING

import pytest

from pytest_qvl.evidence import CheckFailed
from pytest_qvl.session.suite_collection import check_name, is_shipped
from pytest_qvl.session.targets import target_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import date

    from pytest_qvl.options import Settings
    from pytest_qvl.records.known_failures import KnownFailure
    from pytest_qvl.report.process_results import KnownFailureState
    from pytest_qvl.report.run_results import ResultsBuilder


class KnownFailureMarks:
    """Marks the tests that entries mean, in every process that collects; register it as a plugin.

    Only a broken verdict is an expected failure: an error, and a check that passes, turn the run red.

    Args:
        settings: The run's.
        builder: Is told what became of entries that mean no test.
    """

    def __init__(self, settings: Settings, builder: ResultsBuilder) -> None:
        self._settings, self._builder = settings, builder
        self._entries = list(_told_apart(entry for file in settings.known_failures for entry in file.entries))

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: Sequence[pytest.Item]) -> None:
        """Mark every test that an entry means, before ``-k`` and others take tests away."""
        today = datetime.now(UTC).date()
        shipped = [item for item in items if is_shipped(item)]
        for entry in self._entries:
            meant = [item for item in shipped if self._means(entry, item)]
            state = _state(entry, today, meant, any_shipped=bool(shipped))
            self._builder.known[entry.expected] = state
            for item in meant if state == "not run" else ():
                item.add_marker(pytest.mark.xfail(reason=entry.expected, strict=True, raises=CheckFailed))

    def _means(self, entry: KnownFailure, item: pytest.Item) -> bool:
        target = target_of(item)
        where = {} if target is None else {"backend": target.backend, "device": target.device, "model": target.label}
        callspec = getattr(item, "callspec", None)
        return entry.covers(check_name(item), getattr(callspec, "id", ""), self._cards, **where)

    def _cards(self) -> tuple[str, ...]:
        simulated = () if self._settings.card is None else (self._settings.card.name,)
        return (*simulated, *_gpus())


def _state(entry: KnownFailure, today: date, meant: Sequence[pytest.Item], *, any_shipped: bool) -> KnownFailureState:
    """What is known of an entry before tests run; those that it means are "not run" yet."""
    if entry.expired(today):
        return "expired"
    if not entry.versions_hold():
        return "does not apply"
    return "not run" if meant or not any_shipped else "unmatched"


def _told_apart(entries: Iterable[KnownFailure]) -> Iterator[KnownFailure]:
    """Entries whose places, by which reports know them again, differ also where two files have one name."""
    seen: Counter[str] = Counter()
    for entry in entries:
        seen[entry.place] += 1
        times = seen[entry.place]
        yield entry if times == 1 else replace(entry, place=f"{entry.place} ({times})")


@cache
def _gpus() -> tuple[str, ...]:
    from pytest_qvl.gpu.nvml import driver

    return tuple(gpu.name for gpu in driver().inventory().gpus)
