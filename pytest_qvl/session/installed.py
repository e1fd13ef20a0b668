"""What is installed, said at the start of a session that uses a model: versions, known defects, or a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_qvl.releases import known_defects, out_of_range, stack
from pytest_qvl.session.errors import UserError
from pytest_qvl.session.suite_collection import is_shipped
from pytest_qvl.session.targets import target_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class Installed:
    """The hooks. A session whose tests use no model of this package is let alone, whatever is installed."""

    def __init__(self) -> None:
        self._refusal = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Refuse releases outside the package's range, before a test meets them in somebody else's words.

        Raises:
            pytest.UsageError: With what is installed, and the command that mends it.
        """
        if not _use_a_model(session.items) or session.config.option.collectonly or not (reason := out_of_range()):
            return
        self._refusal = "; ".join([reason, *known_defects()])
        if not hasattr(session.config, "workerinput"):
            raise pytest.UsageError(self._refusal)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Refuse in a worker of xdist, which must hand over what it collected: once, at its first test."""
        if self._refusal and _use_a_model([item]):
            item.session.shouldstop = self._refusal
            raise UserError(self._refusal)

    def pytest_report_collectionfinish(self, config: pytest.Config, items: Sequence[pytest.Item]) -> list[str]:
        """Versions, and a line for each known defect."""
        if not _use_a_model(items) or config.option.collectonly:
            return []
        versions = [stack()] if config.get_verbosity() >= 0 else []
        return [f"qvl: {line}" for line in (*versions, *known_defects())]


def _use_a_model(items: Sequence[pytest.Item]) -> bool:
    return any(target_of(item) is not None or is_shipped(item) for item in items)
