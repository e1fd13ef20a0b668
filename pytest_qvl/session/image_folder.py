"""A folder of ``--qvl-images`` that cannot be used: refused before the model is loaded, and not once per test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.session import fixture_graph
from pytest_qvl.session.refusals import CollectionRefusal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pytest

SAMPLES_FIXTURE = "qvl_image_samples"
DEFINED_IN = "pytest_qvl.fixtures"


class ImageFolder(CollectionRefusal):
    """Checks the folder of ``--qvl-images`` after collection; registered only when one was named.

    Args:
        folder: What was named.
        source: Who named it: a flag, an environment variable or an ini file.
    """

    def __init__(self, folder: Path, source: str) -> None:
        super().__init__()
        self._folder, self._source = folder, source

    def concerns(self, items: Sequence[pytest.Item]) -> bool:
        """Whether a test takes its images from the folder, and not from an override of the fixture."""
        return any(
            definition.func.__module__ == DEFINED_IN
            for item in items
            if SAMPLES_FIXTURE in fixture_graph.fixture_names(item)
            for definition in fixture_graph.active_definitions(item, SAMPLES_FIXTURE)
        )

    def reason(self) -> str:
        """What is wrong with the folder: file, line, value and how to fix it."""
        from pytest_qvl.samples import folder_samples

        try:
            folder_samples(self._folder)
        except (ValueError, OSError) as error:
            return f"{self._source}: {error}"
        return ""
