"""What every unit test leaves as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """A command quietens other packages for its process, which here is everybody's."""
    levels = {name: logging.getLogger(name).level for name in ("bitsandbytes", "transformers")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
