"""Inputs that several tests of the suite share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import pytest

from pytest_qvl import checks
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.options import SETTINGS_KEY
from pytest_qvl.samples import (
    clip_batch,
    first_of_each_skill,
    long_sample,
    row_groups,
    scene_clips,
    structure_rows,
    training_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qvl.samples import ProbeSizes, Sample


@pytest.fixture(scope="session")
def quantization_policy(
    qvl_quantization_config: Any, qvl_quantized_layers: Any, _qvl_saved_quantization: Any
) -> checks.QuantizationPolicy:
    """Which layers have to be packed: those of ``qvl_quantized_layers``; how: as ``qvl_quantization_config`` asks.

    Another type than NF4 has to be asked for by a user; that a checkpoint was saved so is no declaration.
    """
    policy = checks.QuantizationPolicy.from_config(qvl_quantization_config, qvl_quantized_layers)
    return replace(policy, quant_type="nf4") if qvl_quantization_config is _qvl_saved_quantization else policy


@pytest.fixture(scope="session")
def row_samples(qvl_image_samples: list[Sample], qvl_probe_sizes: ProbeSizes) -> list[list[Sample]]:
    """The samples of each batch that asks where things go: several images, one image, no image, different sizes.

    Rendered scenes are one batch, the first of every skill, drawn no larger than the question needs. A user's own
    samples are all there, in as many batches as they take.
    """
    return row_groups(structure_rows(qvl_image_samples, qvl_probe_sizes))


@pytest.fixture(scope="session")
def mixed_batches(qvl_batch: Any, row_samples: list[list[Sample]]) -> list[Any]:
    """Left-padded batches of :func:`row_samples`."""
    return [qvl_batch(samples) for samples in row_samples]


@pytest.fixture(scope="session")
def noise_samples(row_samples: list[list[Sample]]) -> list[list[Sample]]:
    """The same prompts over noise, so that no two visual tokens of a batch are alike."""
    return [[sample.noise(seed=0) for sample in samples] for samples in row_samples]


@pytest.fixture
def video_batch(
    pytestconfig: pytest.Config, qvl_quantized_model: Any, qvl_processor: Any, qvl_probe_sizes: ProbeSizes
) -> Callable[[Literal["left", "right"]], Any]:
    """Makes a batch of two videos over noise, one behind an image, and a row of text, padded on the side that is asked.

    Not made by ``qvl_batch``: a collator for images need not know videos.
    """
    seed = pytestconfig.stash[SETTINGS_KEY].seed
    clips = [clip.noise(seed) for clip in scene_clips(seed, cell=qvl_probe_sizes.clip_cell)]
    time = FAMILIES[qvl_quantized_model.config.model_type].video_time
    return lambda side: clip_batch(
        qvl_processor, clips, time=time, padding_side=side, device=qvl_quantized_model.device
    )


@pytest.fixture(scope="session")
def answered_samples(qvl_image_samples: list[Sample]) -> list[Sample]:
    """Samples that the reference was recorded for: the first of every skill; all of a user's own."""
    return first_of_each_skill(qvl_image_samples)


@pytest.fixture
def long_batch(
    pytestconfig: pytest.Config, qvl_batch: Any, qvl_processor: Any, qvl_quantized_model: Any, qvl_probe_sizes: Any
) -> Any:
    """One row of more than 2,000 tokens, with a large image and a small one."""
    longest = qvl_quantized_model.config.get_text_config().max_position_embeddings
    seed = pytestconfig.stash[SETTINGS_KEY].seed
    return qvl_batch([long_sample(qvl_processor, qvl_probe_sizes, seed=seed, longest=longest)])


@pytest.fixture(scope="session")
def own_images(pytestconfig: pytest.Config, qvl_image_samples: list[Sample]) -> list[Sample] | None:
    """The user's own images (``--qvl-images``); ``None`` where the samples are rendered."""
    return qvl_image_samples if pytestconfig.stash[SETTINGS_KEY].images else None


@pytest.fixture(scope="session")
def training_samples(qvl_image_samples: list[Sample], qvl_probe_sizes: ProbeSizes) -> list[Sample]:
    """Rows to train on: the first scene of every skill at the smallest size; of a user's own, the first batch."""
    return training_rows(qvl_image_samples, qvl_probe_sizes)


@pytest.fixture(scope="session")
def training_batch(qvl_training_batch: Any, training_samples: list[Sample]) -> Any:
    """:func:`training_samples` with answers and labels, as they are trained on."""
    return qvl_training_batch(training_samples)


@pytest.fixture(scope="session")
def training_batches(qvl_training_batch: Any, training_samples: list[Sample]) -> list[Any]:
    """The same rows in several batches, for training that keeps all activations.

    All rows at once would be padded to the longest, and take 19 GiB for 7B by the forecast, more than the cards have
    that QLoRA is for.
    """
    lengths = [qvl_training_batch([sample])["input_ids"].shape[-1] for sample in training_samples]
    return [qvl_training_batch(rows) for rows in in_short_batches(training_samples, lengths)]


def in_short_batches(samples: list[Sample], lengths: list[int]) -> list[list[Sample]]:
    """The samples in batches, shortest first, each with no more tokens than two rows as long as the longest.

    Args:
        samples: At least one.
        lengths: Tokens of each.

    Returns:
        Batches of two rows or more, but for that of the longest; those with images come first.
    """
    order = sorted(range(len(samples)), key=lengths.__getitem__)
    most = 2 * lengths[order[-1]]
    batches: list[list[Sample]] = [[]]
    for index in order:
        if (len(batches[-1]) + 1) * lengths[index] > most:
            batches.append([])
        batches[-1].append(samples[index])
    return sorted(batches, key=lambda batch: not any(sample.images for sample in batch))
