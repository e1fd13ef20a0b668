"""What tests of the preflight share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for preflight_corpus, which a command of this repository uses too


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """A preflight quietens other packages for its process, which here is everybody's."""
    levels = {name: logging.getLogger(name).level for name in ("bitsandbytes", "transformers")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
