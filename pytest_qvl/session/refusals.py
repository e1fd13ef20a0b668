"""What is refused at the end of collection: what would otherwise be met much later, by many tests, in other words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_qvl.session.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


class CollectionRefusal:
    """A plugin that refuses to run the tests that were collected, in one sentence; the base of those that know why."""

    def __init__(self) -> None:
        self._refusal = ""

    def concerns(self, items: Sequence[pytest.Item]) -> bool:
        """Whether some of the tests would meet what is refused."""
        raise NotImplementedError

    def reason(self) -> str:
        """Why they cannot run, and how to fix it; empty where they can. Asked only where it concerns a test."""
        raise NotImplementedError

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Refuse before the first test runs.

        Raises:
            pytest.UsageError: With the reason.
        """
        if session.config.option.collectonly or not self.concerns(session.items):
            return
        self._refusal = self.reason()
        if self._refusal and not hasattr(session.config, "workerinput"):
            raise pytest.UsageError(self._refusal)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Refuse in a worker of xdist, which must hand over what it collected: once, at its first test.

        Raises:
            UserError: With the reason.
        """
        if self._refusal and self.concerns([item]):
            item.session.shouldstop = self._refusal
            raise UserError(self._refusal)
