"""Overrides whose scope is narrower than that of a fixture which uses them: pytest's ScopeMismatch, with the fix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.session import fixture_graph
from pytest_qvl.session.overrides import is_own, place
from pytest_qvl.session.refusals import CollectionRefusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

SCOPES = ("function", "class", "module", "package", "session")  # from narrow to wide


class FixtureScopes(CollectionRefusal):
    """Refuses overrides whose scope is too narrow, at the end of collection.

    Args:
        config: pytest's configuration.
    """

    def __init__(self, config: pytest.Config) -> None:
        super().__init__()
        self._config = config
        self._sentences: list[str] = []

    def concerns(self, items: Sequence[pytest.Item]) -> bool:
        """Whether a test uses such an override; pytest would call it a ScopeMismatch."""
        self._sentences = list(dict.fromkeys(sentence for item in items for sentence in self._too_narrow(item)))
        return bool(self._sentences)

    def reason(self) -> str:
        """One line for each override: fixture, file, scope and what to write."""
        return "\n".join(self._sentences)

    def _too_narrow(self, item: pytest.Item) -> Iterator[str]:
        if not any(map(fixture_graph.is_ours, fixture_graph.fixture_names(item))):
            return
        for user, used in fixture_graph.requests_below(item):
            if not fixture_graph.is_ours(used.argname) or is_own(used):
                continue
            if SCOPES.index(used.scope) < SCOPES.index(user.scope):
                where = place(self._config, used)
                how = "fixture" if fixture_graph.defined_at(used) else "mark.parametrize"
                yield (
                    f"the fixture {used.argname} ({where}) has the scope {used.scope}, and {user.argname}, which uses "
                    f"it, the scope {user.scope}; write @pytest.{how}({'..., ' if how != 'fixture' else ''}"
                    f'scope="{user.scope}")'
                )
