"""Overrides whose scope is narrower than that of a fixture which uses them: pytest's ScopeMismatch, with the fix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_qvl.session import fixture_graph
from pytest_qvl.session.errors import UserError
from pytest_qvl.session.fixture_graph import Definition
from pytest_qvl.session.overrides import is_own, place
from pytest_qvl.session.refusals import CollectionRefusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SCOPES = ("function", "class", "module", "package", "session")  # from narrow to wide


class FixtureScopes(CollectionRefusal):
    """Refuses overrides whose scope is too narrow.

    One in a file may concern many tests: it is refused at the end of collection. A parameter given by a mark is the
    affair of its test, and refused at its setup.

    Args:
        config: pytest's configuration.
    """

    def __init__(self, config: pytest.Config) -> None:
        super().__init__()
        self._config = config
        self._sentences: list[str] = []
        self._of_marks: dict[pytest.Item, str] = {}

    def concerns(self, items: Sequence[pytest.Item]) -> bool:
        """Whether a test uses such an override of a file; pytest would call it a ScopeMismatch."""
        found = []
        for item in items:
            for pair in _too_narrow(item):
                if _by_mark(pair[1]):
                    self._of_marks.setdefault(item, self._sentence(*pair))
                else:
                    found.append(self._sentence(*pair))
        self._sentences = list(dict.fromkeys(found))
        return bool(self._sentences)

    def reason(self) -> str:
        """One line for each override: fixture, file, scope and what to write."""
        return "\n".join(self._sentences)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Refuse a test whose own mark gives a parameter of too narrow a scope; in a worker, as every refusal does.

        Raises:
            UserError: With the reason.
        """
        super().pytest_runtest_setup(item)
        if sentence := self._of_marks.get(item):
            raise UserError(sentence)

    def _sentence(self, user: Definition, used: Definition) -> str:
        fix = "@pytest.mark.parametrize(..., " if _by_mark(used) else "@pytest.fixture("
        return (
            f"the fixture {used.argname} ({place(self._config, used)}) has the scope {used.scope}, and {user.argname}, "
            f'which uses it, the scope {user.scope}; write {fix}scope="{user.scope}")'
        )


def _too_narrow(item: pytest.Item) -> Iterator[tuple[Definition, Definition]]:
    """Fixtures that a test's fixtures use, and whose scope is too narrow for that: user and used."""
    if any(map(fixture_graph.is_ours, fixture_graph.fixture_names(item))):
        for user, used in fixture_graph.requests_below(item):
            overrides = fixture_graph.is_ours(used.argname) and not is_own(used)
            if overrides and SCOPES.index(used.scope) < SCOPES.index(user.scope):
                yield user, used


def _by_mark(definition: Definition) -> bool:
    return fixture_graph.defined_at(definition) is None
