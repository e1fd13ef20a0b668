"""``limit_vram``: a test's peak VRAM as a limit, refused at collection if it is invalid, else enforced.

Imports no torch; the meter's side is imported when the first limit is met.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import pytest

from pytest_qvl.report.report_data import LimitOutcome, add_to_report
from pytest_qvl.session.keys import TEST_PHASE_KEY, UNMEASURED_KEY, VRAM_OUTCOMES_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from pytest_qvl.vram.meter import Meter, Phase
    from pytest_qvl.vram.usage import Number, Usage

LIMIT_VRAM = "limit_vram"
LIMIT_VRAM_HELP = (
    "limit_vram(limit, *, of='fit', scope='call'): fail the test if its peak VRAM exceeds limit, such as "
    "'15 GiB'; of: allocated, reserved, process (by the driver) or fit (reserved + CUDA context, what a card "
    "must have); "
    "scope: call (the test's body), test (with its own setup and teardown) or session; "
    "limit_vram(None) lifts every limit from further out"
)
Scope = Literal["call", "test", "session"]


@dataclass(frozen=True)
class Limit:
    """One limit on one test.

    Attributes:
        size: Bytes.
        of: The number it bounds.
        scope: What is measured.
        marked: Whether a mark on the test set it, not the default for all tests.
    """

    size: int
    of: Number
    scope: Scope
    marked: bool = True


def limits_on(item: pytest.Item, default: int | None = None) -> tuple[Limit, ...]:
    """The limits that hold for a test: for each number and scope the nearest mark, then the default.

    On one level the later mark wins: a parameter's over its function's, a derived class's over its base's.
    ``limit_vram(None)`` ends the search.

    Args:
        item: The test.
        default: Bytes of *fit* in the body of every test; ``None`` for no default.

    Raises:
        ValueError: A mark is invalid; names the test, the mark and the fix.
    """
    found: dict[tuple[str, str], Limit] = {}
    for node in item.iter_parents():
        for mark in reversed(node.own_markers):
            if mark.name != LIMIT_VRAM:
                continue
            try:
                limit = _limit_vram(*mark.args, **mark.kwargs)
            except (TypeError, ValueError) as error:
                shown = ", ".join([*map(repr, mark.args), *(f"{k}={v!r}" for k, v in mark.kwargs.items())])
                raise ValueError(f"{item.nodeid}: limit_vram({shown}): {error}") from None
            if limit is None:
                return tuple(found.values())
            found.setdefault((limit.of, limit.scope), limit)
    if default is not None:
        found.setdefault(("fit", "call"), Limit(default, "fit", "call", marked=False))
    return tuple(found.values())


def _limit_vram(limit: str | int | None, *, of: str = "fit", scope: str = "call") -> Limit | None:
    from pytest_qvl.vram.units import parse_bytes
    from pytest_qvl.vram.usage import NUMBERS

    if limit is None:
        if (of, scope) != ("fit", "call"):
            raise ValueError("None lifts every limit, so it takes no of= and no scope=")
        return None
    if of not in NUMBERS:
        raise ValueError(f"of={of!r} is none of {', '.join(NUMBERS)}")
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} is none of {', '.join(get_args(Scope))}")
    return Limit(parse_bytes(limit), of, scope)  # type: ignore[arg-type]


def outcome_of(test: str, phase: Phase, limit: Limit) -> LimitOutcome:
    """What became of a limit, by what a phase of the meter measured."""
    usage = phase.usage
    assert usage is not None
    value, missing = usage.number(limit.of), usage.missing(limit.of)
    return LimitOutcome(test, limit.size, limit.of, limit.scope, value, missing, limit.marked)


_UNFINISHED = (pytest.skip.Exception, pytest.exit.Exception, KeyboardInterrupt)


class VramLimits:
    """Enforces ``limit_vram`` on tests; register it as a plugin.

    Args:
        config: pytest's configuration.
        meter: The one meter of this process.
        default: Limit of *fit* for the body of every test, in bytes.
        required: Whether a marked limit that could not be measured is an error of its test.
    """

    def __init__(
        self, config: pytest.Config, meter: Meter, *, default: int | None = None, required: bool = False
    ) -> None:
        self._config = config
        self._meter = meter
        self._default = default
        self._required = required

    # ---- collection ----------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Refuse invalid marks before the first test runs.

        Raises:
            pytest.UsageError: Some limits are invalid; one line for each.
        """
        wrong = list(_invalid(items))
        # A worker that raises here is reported as a crash of the worker; there each such test fails at its
        # setup.
        if wrong and not hasattr(config, "workerinput"):
            raise pytest.UsageError("\n".join(wrong))

    # ---- run -----------------------------------------------------------------------------------------------

    # No wrapper: one that raises before its yield leaves out the setup of other plugins' wrappers, not their
    # teardown.
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Begin measuring scope ``test`` before the first fixture."""
        item.stash[VRAM_OUTCOMES_KEY], item.stash[UNMEASURED_KEY] = [], []
        limits = self._limits(item, "test")
        if limits:
            name = f"{item.nodeid} with setup and teardown"
            item.stash[TEST_PHASE_KEY] = self._meter.begin(name, keep=_exceeds(limits))

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Measure the body, next to it, and hold scope ``call``."""
        limits = self._limits(item, "call")
        if not limits:
            return (yield)
        phase = self._meter.begin(item.nodeid, keep=_exceeds(limits))
        try:
            result = yield
        except BaseException as error:
            self._meter.end(phase, error)
            if not isinstance(error, _UNFINISHED):
                self._hold(item, phase, limits, failed=True)
            raise
        self._meter.end(phase)
        self._hold(item, phase, limits, failed=False)
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Hold scope ``test`` after the last fixture, and ask for what was not measured."""
        phase = item.stash.get(TEST_PHASE_KEY, None)
        try:
            result = yield
        except BaseException as error:
            if phase:
                self._finish(item, phase, error)
            raise
        if phase:
            self._finish(item, phase, None)
        self._require(item)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Send what was measured along with the report, which is all that leaves an xdist worker."""
        report = yield
        outcomes = item.stash.get(VRAM_OUTCOMES_KEY, [])
        if outcomes:
            add_to_report(report, limits=tuple(outcomes))
            outcomes.clear()
        return report

    # ---- the rest ------------------------------------------------------------------------------------------

    def _limits(self, item: pytest.Item, scope: Scope) -> list[Limit]:
        # Read at each use: a fixture may have marked its test meanwhile.
        try:
            return [limit for limit in limits_on(item, self._default) if limit.scope == scope]
        except ValueError as error:
            raise pytest.fail.Exception(str(error), pytrace=False) from None

    def _finish(self, item: pytest.Item, phase: Phase, error: BaseException | None) -> None:
        del item.stash[TEST_PHASE_KEY]
        self._meter.end(phase, error)
        self._hold(item, phase, self._limits(item, "test"), failed=error is not None)

    def _hold(self, item: pytest.Item, phase: Phase, limits: list[Limit], *, failed: bool) -> None:
        from pytest_qvl.evidence import CheckFailed
        from pytest_qvl.session.vram_properties import add_properties
        from pytest_qvl.vram.limit import describe_holders, hold_limit

        failures: list[CheckFailed] = []
        for limit in limits:
            outcome = outcome_of(item.nodeid, phase, limit)
            item.stash[VRAM_OUTCOMES_KEY].append(outcome)
            if outcome.value is None:
                item.stash[UNMEASURED_KEY].append(outcome)
                continue
            try:
                hold_limit(phase, limit.size, limit.of)
            except CheckFailed as failure:
                failures.append(failure)
        scope = limits[0].scope
        if phase.usage:
            add_properties(item, scope, phase.usage)
        paragraphs = [str(failure) for failure in failures]
        if phase.history and not failures:
            paragraphs.append("\n".join([f"{phase.name}: ran out of memory", *describe_holders(phase)]))
        paragraphs += self._keep(item.nodeid, phase)
        text = "\n\n".join(paragraphs)
        if failures and not failed:
            raise pytest.fail.Exception(text, pytrace=False)
        if text:
            item.add_report_section("teardown" if scope == "test" else "call", "vram", text)

    def _require(self, item: pytest.Item) -> None:
        missing = [outcome for outcome in item.stash.get(UNMEASURED_KEY, []) if outcome.marked]
        if self._required and missing:
            raise pytest.fail.Exception(
                f"{item.nodeid}: its limit_vram was not measured, and a GPU is required: {missing[0].reason}",
                pytrace=False,
            )

    def _keep(self, name: str, phase: Phase) -> list[str]:
        """Write the allocator's snapshot where pytest's cache is, and say where."""
        cache = getattr(self._config, "cache", None)
        if cache is None or phase.history is None or phase.history.snapshot is None:
            return []
        import pickle

        path = Path(cache.mkdir("qvl-vram")) / f"{_file_name(name)}.pickle"
        path.write_bytes(pickle.dumps(phase.history.snapshot))
        return [f"allocator snapshot: {path} (open it at https://docs.pytorch.org/memory_viz)"]


def _invalid(items: Iterable[pytest.Item]) -> Iterator[str]:
    for item in items:
        try:
            limits_on(item)
        except ValueError as error:
            yield str(error)


def _exceeds(limits: Iterable[Limit]) -> Callable[[Usage], bool]:
    return lambda usage: any((usage.number(limit.of) or 0) > limit.size for limit in limits)


def _file_name(name: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[-80:]}-{digest}"
