"""What a user can mend, or must know, in one line instead of a traceback."""

from __future__ import annotations

import pytest

from pytest_qvl.evidence import printable


class Refusal(pytest.fail.Exception):  # type: ignore[name-defined,misc]
    """What a user can mend, said in one line without a traceback."""

    __module__ = "builtins"  # pytest shows the name of the class alone

    def __init__(self, message: str) -> None:
        super().__init__(printable(message), pytrace=False)


class NotRun(Refusal):
    """A GPU test that is not run, because work before it broke CUDA.

    Attributes:
        by: The test that broke it.
    """

    __module__ = "builtins"

    def __init__(self, by: str, why: str) -> None:
        self.by = by
        super().__init__(f"not run: CUDA was broken by {by}: {why}")
