"""Rendered scenes whose answers are right by construction, one kind per skill.

Every skill chooses the answer first and then builds images for which it is right, so the swapped images
(same sizes, same question, another answer) come from the same code with another answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.evidence import InputError
from pytest_qvl.samples.drawing import CELL, COLOURS, SHAPES, Cell, Scene, Thing, random_background, random_thing
from pytest_qvl.samples.sample import Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Grid = tuple[int, int]

GRIDS: tuple[Grid, ...] = ((3, 3), (4, 3), (3, 4), (4, 4))
NUMBERS = ("one", "two", "three")
ORDINALS = ("first", "second", "third")
SIDES = ("left", "right", "top", "bottom")
WORDS = (*COLOURS, *SHAPES, *NUMBERS)


@dataclass(frozen=True)
class Puzzle:
    """Scenes, one image each, with a question and its right answer."""

    scenes: tuple[Scene, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """One kind of question: how its scenes are built, what is asked about them, which answers there are.

    Attributes:
        question: Template; ``{}`` takes the subject.
        subjects: What can be asked about.
        answers: All possible answers, each equally likely.
        build: Makes the things of every image so that the answer is right, from the random source, the grid
            of each image, the subject and the answer.
        images: Possible numbers of images.
    """

    question: str
    subjects: tuple[str, ...]
    answers: tuple[str, ...]
    build: Callable[[random.Random, Sequence[Grid], str, str], list[list[Thing]]]
    images: tuple[int, ...] = (1,)


def _cells(grid: Grid) -> list[Cell]:
    return [(column, row) for row in range(grid[1]) for column in range(grid[0])]


def _colour(rng: random.Random, grids: Sequence[Grid], _subject: str, answer: str) -> list[list[Thing]]:
    return [[random_thing(rng, rng.choice(_cells(grids[0])), colour=answer)]]


def _shape(rng: random.Random, grids: Sequence[Grid], _subject: str, answer: str) -> list[list[Thing]]:
    return [[random_thing(rng, rng.choice(_cells(grids[0])), shape=answer)]]


def _count(rng: random.Random, grids: Sequence[Grid], _subject: str, answer: str) -> list[list[Thing]]:
    cells = rng.sample(_cells(grids[0]), NUMBERS.index(answer) + 1)
    return [[random_thing(rng, cell) for cell in cells]]


def _side(rng: random.Random, grids: Sequence[Grid], _subject: str, answer: str) -> list[list[Thing]]:
    columns, rows = grids[0]
    column = rng.randrange(columns // 2)  # an odd grid's middle column is neither left nor right
    cell = (column if answer == "left" else columns - 1 - column, rng.randrange(rows))
    return [[random_thing(rng, cell)]]


def _colour_of(rng: random.Random, grids: Sequence[Grid], subject: str, answer: str) -> list[list[Thing]]:
    shapes = [subject, *rng.sample([shape for shape in SHAPES if shape != subject], rng.choice((1, 2)))]
    colours = [answer, *rng.sample([colour for colour in COLOURS if colour != answer], len(shapes) - 1)]
    cells = rng.sample(_cells(grids[0]), len(shapes))
    things = [random_thing(rng, *thing) for thing in zip(cells, shapes, colours, strict=True)]
    rng.shuffle(things)
    return [things]


def _colour_at(rng: random.Random, grids: Sequence[Grid], subject: str, answer: str) -> list[list[Thing]]:
    columns = rng.sample(range(grids[0][0]), 2)
    rows = rng.sample(range(grids[0][1]), 2)
    cells = list(zip(columns, rows, strict=True))
    axis, last = {"left": (0, False), "right": (0, True), "top": (1, False), "bottom": (1, True)}[subject]
    cells.sort(key=lambda cell: cell[axis], reverse=last)
    other = rng.choice([colour for colour in COLOURS if colour != answer])
    things = [random_thing(rng, cells[0], colour=answer), random_thing(rng, cells[1], colour=other)]
    rng.shuffle(things)
    return [things]


def _list(rng: random.Random, grids: Sequence[Grid], _subject: str, answer: str) -> list[list[Thing]]:
    columns = sorted(rng.sample(range(grids[0][0]), 2))
    things = []
    for column, words in zip(columns, answer.split(", "), strict=True):
        colour, shape = words.split()
        things.append(random_thing(rng, (column, rng.randrange(grids[0][1])), shape=shape, colour=colour))
    return [things]


def _nth_colour(rng: random.Random, grids: Sequence[Grid], subject: str, answer: str) -> list[list[Thing]]:
    colours = _all_different(rng, tuple(COLOURS), len(grids), ORDINALS.index(subject), answer)
    return [[random_thing(rng, rng.choice(_cells(g)), colour=c)] for g, c in zip(grids, colours, strict=True)]


def _nth_shape(rng: random.Random, grids: Sequence[Grid], subject: str, answer: str) -> list[list[Thing]]:
    shapes = _all_different(rng, SHAPES, len(grids), ORDINALS.index(subject), answer)
    return [[random_thing(rng, rng.choice(_cells(g)), shape=s)] for g, s in zip(grids, shapes, strict=True)]


def _all_different(rng: random.Random, values: Sequence[str], n: int, place: int, at: str) -> list[str]:
    """`n` different values, `at` in the given place among them."""
    chosen = rng.sample([value for value in values if value != at], n - 1)
    return [*chosen[:place], at, *chosen[place:]]


def _text(_rng: random.Random, _grids: Sequence[Grid], _subject: str, _answer: str) -> list[list[Thing]]:
    return []


_COLOURS = tuple(COLOURS)
_PAIRS = tuple(f"{a} {s}, {b} {t}" for a in COLOURS for s in SHAPES for b in COLOURS for t in SHAPES)

SKILLS: dict[str, Skill] = {
    "colour": Skill("What colour is the shape?", ("",), _COLOURS, _colour),
    "shape": Skill("What shape is it?", ("",), SHAPES, _shape),
    "count": Skill("How many shapes are there?", ("",), NUMBERS, _count),
    "side": Skill("Is the shape on the left or right?", ("",), ("left", "right"), _side),
    "colour_of": Skill("What colour is the {}?", SHAPES, _COLOURS, _colour_of),
    "colour_at": Skill("What colour is the shape on the {}?", SIDES, _COLOURS, _colour_at),
    "list": Skill("List the shapes from left to right.", ("",), _PAIRS, _list),
    "nth_colour": Skill("What colour is the shape in the {} image?", ORDINALS, _COLOURS, _nth_colour, (2, 3)),
    "nth_shape": Skill("What shape is in the {} image?", ORDINALS, SHAPES, _nth_shape, (2, 3)),
    "text": Skill("Say {}.", WORDS, WORDS, _text, (0,)),
}
ALL_SKILLS: tuple[str, ...] = tuple(SKILLS)
TEXT_ONLY_SKILLS: tuple[str, ...] = tuple(name for name, skill in SKILLS.items() if skill.images == (0,))
PLACE_SKILLS: tuple[str, ...] = ("side", "colour_at", "list")
IMAGE_ORDER_SKILLS: tuple[str, ...] = ("nth_colour", "nth_shape")


def puzzle(rng: random.Random, skill: str) -> Puzzle:
    """Scenes, question and answer of one random sample of a skill."""
    return puzzle_and_swap(rng, skill)[0]


def puzzle_and_swap(rng: random.Random, skill: str) -> tuple[Puzzle, Puzzle | None]:
    """A puzzle, and one with the same question and image sizes and another answer (None for text-only)."""
    spec = SKILLS[skill]
    count = rng.choice(spec.images)
    subject = rng.choice(spec.subjects[:count] if spec.subjects is ORDINALS else spec.subjects)
    question = spec.question.format(subject)
    if count == 0:
        return Puzzle((), question, subject), None
    grids = [rng.choice(GRIDS) for _ in range(count)]
    answer, other = rng.sample(spec.answers, 2)
    return _build(rng, spec, grids, subject, answer), _build(rng, spec, grids, subject, other)


def _build(rng: random.Random, spec: Skill, grids: Sequence[Grid], subject: str, answer: str) -> Puzzle:
    images = spec.build(rng, grids, subject, answer)
    made = tuple(
        Scene(columns, rows, random_background(rng), tuple(things))
        for (columns, rows), things in zip(grids, images, strict=True)
    )
    return Puzzle(made, spec.question.format(subject), answer)


def scenes(seed: int, per_skill: int, skills: Sequence[str] = ALL_SKILLS, *, cell: int = CELL) -> list[Sample]:
    """Held-out probes: `per_skill` samples of each skill, skills alternating.

    Deterministic in `seed`; the n-th sample of a skill depends on nothing else, so asking for more, for other
    skills or for another size leaves it as it was. Images have 3 or 4 cells per side, square or not. The training
    script draws from other random streams.

    Args:
        seed: Which scenes.
        per_skill: Samples of each skill.
        skills: Different names of :data:`ALL_SKILLS`.
        cell: Pixels per side of a cell; :func:`pytest_qvl.samples.probe_sizes` derives it from a model.

    Raises:
        ValueError: A skill is unknown, given twice, or `per_skill` is negative.
    """
    unknown = [skill for skill in skills if skill not in SKILLS]
    if unknown or len(set(skills)) != len(skills):
        raise InputError(f"skills must be different names of {', '.join(ALL_SKILLS)}; got {', '.join(skills)}")
    if per_skill < 0:
        raise InputError(f"per_skill must not be negative, got {per_skill}")
    streams = {skill: random.Random(f"held-out {seed} {skill}") for skill in skills}
    return [
        _sample(streams[skill], skill, f"{skill}-{seed}-{index}").at_cell(cell)
        for index in range(per_skill)
        for skill in skills
    ]


def _sample(rng: random.Random, skill: str, name: str) -> Sample:
    asked, swap = puzzle_and_swap(rng, skill)
    return Sample(
        images=(),
        question=asked.question,
        answer=asked.answer,
        skill=skill,
        id=name,
        swapped_answer=None if swap is None else swap.answer,
        scenes=asked.scenes,
        swapped_scenes=() if swap is None else swap.scenes,
    )
