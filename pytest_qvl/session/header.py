"""The header of a run: what was chosen and by whom, the card that is simulated, threads, and who overrides what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.evidence import printable
from pytest_qvl.options import SETTINGS_KEY
from pytest_qvl.session import overrides, threads
from pytest_qvl.session.targets import targets

if TYPE_CHECKING:
    import pytest

    from pytest_qvl.options import Settings


def header_lines(config: pytest.Config) -> list[str]:
    """One line for each thing that a reader of the results has to know first."""
    settings = config.stash[SETTINGS_KEY]
    chosen = [", ".join(settings.described()), *simulated_card(settings)]
    lines = (*chosen, *threads.described(config), *overrides.described(config))
    return [printable(f"qvl: {line}") for line in lines]


def simulated_card(settings: Settings) -> list[str]:
    """That a smaller card is simulated, where a test may run on CUDA."""
    if settings.card is None or all(target.device == "cpu" for target in targets(settings)):
        return []
    from pytest_qvl.vram.cap import describe_cap

    return [describe_cap(settings.card)]
