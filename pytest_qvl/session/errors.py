"""What a user can fix, or must know, in one line instead of a traceback."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from pytest_qvl.evidence import printable

if TYPE_CHECKING:
    from collections.abc import Iterator


class UserError(pytest.fail.Exception):  # type: ignore[name-defined,misc]
    """What a user can fix, said in one line without a traceback."""

    __module__ = "builtins"  # pytest shows the name of the class alone

    def __init__(self, message: str) -> None:
        super().__init__(printable(message), pytrace=False)


class CudaUnusable(UserError):
    """A GPU test that is not run, because work before it broke CUDA.

    Attributes:
        by: The test that broke it.
    """

    __module__ = "builtins"

    def __init__(self, by: str, why: str) -> None:
        self.by = by
        super().__init__(f"not run: CUDA was broken by {by}: {why}")


@contextmanager
def as_usage_error(fixture: str) -> Iterator[None]:
    """Turn an error that a user can fix into a :class:`UserError` that names the fixture; others stay as they are.

    Raises:
        UserError: In place of a ``ValueError``, an ``OSError`` or a model that could not be loaded.
    """
    from pytest_qvl.models.backends import ModelLoadError

    try:
        yield
    except (ModelLoadError, ValueError, OSError) as error:
        raise UserError(f"{fixture}: {error}") from None
