"""``limit_vram(..., scope="session")``: the peak VRAM of all tests of one process, judged at the end of its session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.session.limit_vram import Limit, limits_on, outcome_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from pytest_qvl.evidence import Evidence
    from pytest_qvl.report.process_results import Verdict
    from pytest_qvl.report.report_data import LimitOutcome
    from pytest_qvl.vram.meter import Meter


class SessionLimits:
    """Holds the session to the limits that its tests ask for; register it as a plugin.

    Args:
        meter: The one meter of this process.

    Attributes:
        outcomes: What became of each limit, once it has been judged.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._limits: tuple[Limit, ...] = ()
        self.outcomes: tuple[LimitOutcome, ...] = ()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note the limits that the selected tests ask for: the smallest of each number."""
        smallest: dict[str, Limit] = {}
        for item in session.items:
            for limit in _on_session(item):
                if limit.of not in smallest or limit.size < smallest[limit.of].size:
                    smallest[limit.of] = limit
        self._limits = tuple(smallest.values())

    def evidence(self) -> list[Evidence]:
        """The verdicts, one per number; empty problems where they hold.

        Call it once, at the end of the session of the process that ran the tests.
        """
        from pytest_qvl.evidence import CheckFailed
        from pytest_qvl.vram.limit import hold_limit

        phase = self._meter.session()
        verdicts = []
        for limit in self._limits:
            outcome = outcome_of("session", phase, limit)
            self.outcomes += (outcome,)
            if outcome.value is None:
                continue
            try:
                verdicts.append(hold_limit(phase, limit.size, limit.of))
            except CheckFailed as failure:
                verdicts.append(failure.evidence)
        return verdicts

    def judge_session(self) -> Iterator[Verdict]:
        """The same as session verdicts."""
        from pytest_qvl.evidence import CheckFailed
        from pytest_qvl.report.process_results import Verdict

        for evidence in self.evidence():
            (figure,) = evidence.figures
            if evidence.ok:
                yield Verdict(figure.name, "kept", str(figure))
            else:
                yield Verdict(figure.name, "BROKEN", str(CheckFailed(evidence)))


def _on_session(item: pytest.Item) -> list[Limit]:
    try:
        return [limit for limit in limits_on(item) if limit.scope == "session"]
    except ValueError:  # a mark that cannot be read fails its test
        return []
