"""One embedded model for all trainings; each takes its adapter off again and leaves the base as it was."""

from __future__ import annotations

import random
import warnings

import pytest

from .workbench import Workbench


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet():
    """Libraries warn in a training of what is none of the tests' business; pytest makes errors of that."""
    from pytest_qvl.training import GuardWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", GuardWarning)
        yield


@pytest.fixture(scope="session")
def bench() -> Workbench:
    return Workbench.with_scenes(12)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
