"""Inputs that several tests of the suite share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.options import SETTINGS_KEY

if TYPE_CHECKING:
    from pytest_qvl.samples import Sample


@pytest.fixture(scope="session")
def one_of_each(qvl_image_samples: list[Sample]) -> list[Sample]:
    """The first sample of every skill: several images, one image, no image, different resolutions."""
    return list({sample.skill: sample for sample in reversed(qvl_image_samples)}.values())


@pytest.fixture(scope="session")
def mixed_batch(qvl_batch: Any, one_of_each: list[Sample]) -> Any:
    """One left-padded batch of :func:`one_of_each`."""
    return qvl_batch(one_of_each)


@pytest.fixture(scope="session")
def noise_pictures(one_of_each: list[Sample]) -> list[Sample]:
    """The same prompts over noise, so that no two visual tokens of the batch are alike."""
    return [sample.noise(seed=0) for sample in one_of_each]


@pytest.fixture(scope="session")
def own_pictures(pytestconfig: pytest.Config, qvl_image_samples: list[Sample]) -> list[Sample] | None:
    """The user's own pictures (``--qvl-images``); ``None`` where the samples are rendered."""
    return qvl_image_samples if pytestconfig.stash[SETTINGS_KEY].images else None


@pytest.fixture(scope="session")
def training_batch(qvl_batch: Any, one_of_each: list[Sample]) -> Any:
    """The same rows with answers and labels, right-padded as collators do."""
    return qvl_batch(one_of_each, padding_side="right", answers=True)


@pytest.fixture(scope="session")
def training_halves(qvl_batch: Any, one_of_each: list[Sample]) -> list[Any]:
    """The same rows in two batches, for training that keeps all activations.

    All rows at once would take 19 GiB for 7B by the forecast, more than the cards have that QLoRA is for; half of
    them take 13.
    """
    return [qvl_batch(half, padding_side="right", answers=True) for half in halves(one_of_each)]


def halves(samples: list[Sample]) -> list[list[Sample]]:
    """Two halves, the first of which never lacks pictures; one where there is one sample."""
    rows = sorted(samples, key=lambda sample: not sample.images)
    middle = (len(rows) + 1) // 2
    return [half for half in (rows[:middle], rows[middle:]) if half]
