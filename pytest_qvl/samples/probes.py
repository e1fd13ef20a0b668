"""Which samples probe one model, at the sizes that were derived for it."""

from __future__ import annotations

from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from pytest_qvl.samples.sample import Sample
from pytest_qvl.samples.scenes import WORDS, scenes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qvl.samples.sizes import ProbeSizes

LARGE_SKILL = "list"
LONG_TOKENS = 2048  # of text
TOKENS_SPARED = 60
ROWS_PER_GROUP = 10
PIXELS_PER_GROUP = 1 << 22


def probe_samples(sizes: ProbeSizes, seed: int, per_skill: int) -> list[Sample]:
    """The scenes whose answers are judged; one of them has an image of 1,024 visual tokens or more.

    A model that reads one size of scenes only (:attr:`ProbeSizes.one_size`) gets no large one.
    """
    made = scenes(seed, per_skill, cell=sizes.cell)
    if sizes.one_size:
        return made
    large = next((number for number, sample in enumerate(made) if sample.skill == LARGE_SKILL), None)
    return [sample.at_cell(sizes.large_cell) if number == large else sample for number, sample in enumerate(made)]


def structure_rows(samples: Sequence[Sample], sizes: ProbeSizes) -> list[Sample]:
    """The samples for batches of many rows, which ask where things go and not what they show.

    Of drawn scenes the first of every skill, an image alone in its row with several attention windows per side, and
    those of a row with several images at one visual token per cell, so that rows are about equally long. Samples that
    were not drawn, a user's own, are taken as they are, all of them.
    """
    firsts = first_of_each_skill(samples)
    return [s.at_cell(sizes.row_cell if len(s.images) == 1 else sizes.training_cell) for s in firsts]


def training_rows(samples: Sequence[Sample], sizes: ProbeSizes) -> list[Sample]:
    """The samples to train on: as :func:`structure_rows`, drawn as small as possible, and one group of them."""
    if not any(sample.scenes for sample in samples):
        return row_groups(samples)[0]
    return [sample.at_cell(sizes.training_cell) for sample in first_of_each_skill(samples)]


def first_of_each_skill(samples: Sequence[Sample]) -> list[Sample]:
    """The first scene of every skill; all samples where none was drawn."""
    if not any(sample.scenes for sample in samples):
        return list(samples)
    firsts: dict[str, Sample] = {}
    for sample in samples:
        if sample.scenes or not sample.images:
            firsts.setdefault(sample.skill, sample)
    return list(firsts.values())


def row_groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples in batches of two to eleven rows and some 5,000 visual tokens, each with an image where any has one.

    Many checks compare a row with the ones beside it, so no batch has one row where there are two samples.
    """
    with_images, text = [s for s in samples if s.images], [s for s in samples if not s.images]
    groups: list[list[Sample]] = []
    pixels = 0
    for sample in with_images:
        own = sum(image.width * image.height for image in sample.images)
        full = groups and len(groups[-1]) > 1 and (len(groups[-1]) == ROWS_PER_GROUP or pixels + own > PIXELS_PER_GROUP)
        if not groups or full:
            groups.append([])
            pixels = 0
        groups[-1].append(sample)
        pixels += own
    if len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    if not groups:
        return [list(text)]
    for sample, group in zip(text, cycle(groups), strict=False):
        group.append(sample)
    return groups


def long_sample(processor: Any, sizes: ProbeSizes, *, seed: int, longest: int) -> Sample:
    """A row of more than 2,000 tokens: two images, one of them large, and text.

    Positions are small numbers in short prompts, where bfloat16 still counts every one of them (up to 256); an image
    alone does not make them large, since M-RoPE goes on after its larger side.

    Args:
        processor: The model's processor.
        sizes: The model's sizes.
        seed: Which scenes.
        longest: ``max_position_embeddings`` of the model: a model made for 2,048 tokens gets no more, 60 of them for
            template and question.
    """
    large, small = (scenes(seed, 1, [LARGE_SKILL], cell=cell)[0] for cell in (sizes.large_cell, sizes.row_cell))
    images = (*large.images, *small.images)
    visual = sum(image.width * image.height for image in images) // sizes.token**2
    wanted = min(LONG_TOKENS, longest - visual - TOKENS_SPARED)
    words = list(islice(cycle(WORDS), 10 * len(WORDS)))
    per_word = len(processor.tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]) / len(words)
    text = " ".join(islice(cycle(WORDS), int(wanted / per_word)))
    return Sample(images, f"{text}. {large.question}", large.answer, "long", f"long-{seed}")
