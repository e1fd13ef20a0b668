"""The process of one backend and the one that started it, as far as a session has to know them.

Each is a plugin of pytest that is found by its name; what they are made of is the business of ``processes``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pytest

CHILD_NAME = "qvl-child"  # registered in a process that runs the tests of one backend
PARENT_NAME = "qvl-children"  # registered in one that starts such processes and runs no test itself


class ParentLink(Protocol):
    """The way from a backend's process to the one that started it.

    Attributes:
        backend: The backend whose tests this process runs.
    """

    backend: str

    def request(self, kind: str, **message: Any) -> None:
        """Send a message of plain data, and wait until it has been dealt with."""


def parent_link(config: pytest.Config) -> ParentLink | None:
    """The way to the parent; ``None`` where this process is nobody's child."""
    link: ParentLink | None = config.pluginmanager.get_plugin(CHILD_NAME)
    return link


def starts_processes(config: pytest.Config) -> bool:
    """Whether the tests of this run are run by processes that this one starts."""
    return config.pluginmanager.has_plugin(PARENT_NAME)
