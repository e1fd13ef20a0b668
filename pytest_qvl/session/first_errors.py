"""Which test met a fixture's error first, so that every later test gets one line that points to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.session import fixture_graph
from pytest_qvl.session.errors import UserError
from pytest_qvl.session.fixture_graph import MODEL_FIXTURES, Definition, Lineage

if TYPE_CHECKING:
    import pytest

# A model fixture, what it depends on, and with which parameters.
FailureKey = tuple[Definition, Lineage, frozenset[tuple[str, Any]]]


class FirstErrors:
    """Keeps, for each fixture that failed, its error and the first test that met it; one per process."""

    def __init__(self) -> None:
        self._first_met: dict[BaseException, str] = {}
        self._failed: dict[FailureKey, str] = {}

    def note(self, definition: Definition, error: BaseException, item: pytest.Item, *, again: bool) -> None:
        """Remember which test met a fixture's error first; pytest raises it again for every other test.

        Args:
            definition: The fixture.
            error: What it raised.
            item: The test that asked for it.
            again: Whether the same model would fail again, made from the same fixtures.
        """
        self._first_met.setdefault(error, item.nodeid)
        if again and definition.argname in MODEL_FIXTURES:
            self._failed.setdefault(_failure_key(definition, item), self._first_met[error])

    def note_for_later(self, error: BaseException) -> None:
        """Remember an error of a fixture that the running test does not ask for: the next that does meets it first."""
        self._first_met[error] = ""

    def known_failure(self, definition: Definition, item: Any) -> UserError | None:
        """For a model that could not be made before from the same fixtures: one line that points to the first test.

        pytest forgets an error with the fixtures below it, and the base may have to be loaded again meanwhile.
        """
        if definition.argname not in MODEL_FIXTURES or not self._failed:
            return None
        first = self._failed.get(_failure_key(definition, item), item.nodeid)
        return None if first == item.nodeid else UserError(f"not run: see the error of {first}")

    def pointer(self, error: BaseException, item: pytest.Item) -> UserError | None:
        """For every test but the one that met an error first: one line that points to it."""
        first = self._first_met.get(error, item.nodeid)
        if not first:
            self._first_met[error] = first = item.nodeid
        return None if first == item.nodeid else UserError(f"not run: see the error of {first}")

    def met_first_by(self, item: pytest.Item) -> bool:
        """Whether a test was the first to meet an error of a fixture."""
        return item.nodeid in self._first_met.values()

    def clear(self) -> None:
        """Let go of the errors, at the end of the session."""
        self._first_met.clear()


def _failure_key(definition: Definition, item: Any) -> FailureKey:
    return definition, fixture_graph.lineage(definition, item), fixture_graph.parameters(definition, item)
