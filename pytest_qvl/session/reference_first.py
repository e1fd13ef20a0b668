"""The reference in full precision is recorded before the 4-bit model is loaded: both at once may not fit the card."""

from __future__ import annotations

import pytest

from pytest_qvl.session import fixture_graph
from pytest_qvl.session.keys import FIRST_ERRORS_KEY, LEAKS_KEY
from pytest_qvl.session.tracebacks import write_down

REFERENCE_FIXTURE = "qvl_reference"


def record_reference_first(request: pytest.FixtureRequest) -> None:
    """Record the reference before the 4-bit load if any collected test will ask for it.

    A reference that fails here is reported by the tests that ask for it, not by this one: pytest keeps
    the fixture's exception.
    """
    if not any(REFERENCE_FIXTURE in fixture_graph.fixture_names(item) for item in request.session.items):
        return
    try:
        request.getfixturevalue(REFERENCE_FIXTURE)
    except (Exception, pytest.skip.Exception, pytest.fail.Exception) as error:
        if isinstance(error, Exception):  # those of pytest are one line
            write_down(error)
        stash = request.config.stash
        stash[LEAKS_KEY].release_errors([error])  # its frames hold the full-precision model
        stash[FIRST_ERRORS_KEY].note_for_later(error)
