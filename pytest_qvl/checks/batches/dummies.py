"""Dummy images: put in so that the vision tower takes part in every step, seen by no token, and teaching nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.checks.support.placeholders import of_one_colour, show_grid, visual_tokens
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    import torch

    from pytest_qvl.checks.batches.facts import View
    from pytest_qvl.checks.batches.findings import Findings
    from pytest_qvl.checks.batches.layout import Layout


@dataclass(frozen=True)
class Dummies:
    """The dummies of a batch.

    Attributes:
        numbers: Of the images (videos).
        tokens: Those that stand for them, their ends included, ``(rows, length)`` bool.
    """

    numbers: frozenset[int]
    tokens: torch.Tensor


def dummies(view: View, layout: Layout) -> Dummies:
    """Images (videos) that are there for the vision tower alone, as trainings that shard it need one in every step.

    Behind all that its row attends to (LLaMA-Factory) any image is one: hidden there, it is like padding. Inside of
    the text of its row (NeMo AutoModel) a hidden image is either a dummy, or a real one under a wrong mask. It is a
    dummy where nothing can be lost or learned by it:

    - its whole run of placeholders is hidden, and both vision tokens around it, and none is learned;
    - neither is the token behind it, which the hidden end of the image would have to predict;
    - its sample attends to no other vision token: it is one of text alone;
    - all of its pixels are of one colour, so there is nothing in it that the row should have been shown.

    What a dummy does to the positions of other images is judged by :func:`judge_dealt`.
    """
    tokens, numbers = view.behind_text.clone(), set(layout.behind_text(view))
    for number in sorted(layout.not_attended(view) - numbers):
        row, run = layout.rows[number], _run(view, layout, number)
        if _is_harmless(view, layout, number, run):
            tokens[row, run] = True
            numbers.add(number)
    return Dummies(frozenset(numbers), tokens)


def _run(view: View, layout: Layout, number: int) -> slice:
    """The tokens of an image with the one before it and the one behind it."""
    first = layout.tokens[number]
    return slice(first - 1, first + visual_tokens(layout.grids[number], view.known.merge) + 1)


def _is_harmless(view: View, layout: Layout, number: int, run: slice) -> bool:
    row, length = layout.rows[number], view.ids.shape[1]
    if layout.kind.noun != "image" or run.start < 0 or run.stop > length:
        return False
    inside = view.vision[row, run] & ~view.mask[row, run]
    sample = view.segments[row] == view.segments[row, run.start]
    shown = sample & view.vision[row] & view.mask[row]
    learned = view.labels is not None and bool((view.labels[row, run.start : run.stop + 1] != IGNORED).any())
    return bool(inside.all()) and not bool(shown.any()) and not learned and _is_of_one_colour(view, layout, number)


def _is_of_one_colour(view: View, layout: Layout, number: int) -> bool:
    start = sum(t * h * w for t, h, w in layout.grids[:number])
    t, h, w = layout.grids[number]
    pixels = view.batch[layout.kind.pixels][start : start + t * h * w]
    return of_one_colour(pixels, int(view.known.config.vision_config.in_channels))


def judge_dealt(view: View, findings: Findings, layout: Layout, hidden: frozenset[int]) -> None:
    """Where the model makes the positions itself, every image gets those of its own grid in spite of the dummies.

    ``get_rope_index`` drops what is not attended to and then deals the grids out in order: behind a dummy, each image
    gets the grid of one before it. With another number of visual tokens that raises, with as many it is silent.
    """
    if view.batch.get("position_ids") is not None:
        return
    shown = [number for number in range(len(layout.grids)) if number not in hidden]
    for dealt, number in enumerate(shown):
        given, own = layout.grids[dealt], layout.grids[number]
        if given != own:
            findings.add(
                "positions-apart",
                layout.rows[number],
                layout.tokens[number],
                found=f"grid {show_grid(given)} of {layout.kind.noun} {dealt} in the positions that the model makes",
                expected=f"{show_grid(own)}, its own",
                cause=f"a dummy {layout.kind.noun} before it is not attended to, and get_rope_index deals grids out to "
                "those alone that are: put dummies behind all others, or bring position_ids",
            )
            return
