"""What is installed, said at the start of a session that uses a model: versions, known defects, or a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.releases import defects_where_met, known_defects, out_of_range, stack
from pytest_qvl.session.refusals import CollectionRefusal
from pytest_qvl.session.suite_collection import is_shipped
from pytest_qvl.session.targets import target_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest


class Installed(CollectionRefusal):
    """Shows installed versions and refuses unsupported ones; ignores a session whose tests use no model."""

    def concerns(self, items: Sequence[pytest.Item]) -> bool:
        """Whether a test uses a model of this package."""
        return any(target_of(item) is not None or is_shipped(item) for item in items)

    def reason(self) -> str:
        """Releases outside the package's range, and the command that fixes it, before a test meets them."""
        refused = out_of_range()
        return "; ".join([refused, *known_defects()]) if refused else ""

    def pytest_report_collectionfinish(self, config: pytest.Config, items: Sequence[pytest.Item]) -> list[str]:
        """Versions, and a line for each known defect."""
        if not self.concerns(items) or config.option.collectonly:
            return []
        said = [stack(), *defects_where_met()] if config.get_verbosity() >= 0 else []
        return [f"qvl: {line}" for line in (*said, *known_defects())]
