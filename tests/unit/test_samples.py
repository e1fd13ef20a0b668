"""Samples: answers right by construction, deterministic, and bad folders refused by name."""

from __future__ import annotations

import importlib.machinery
import json
import os
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from pytest_qvl.samples import (
    ALL_SKILLS,
    TEXT_ONLY_SKILLS,
    Sample,
    folder_samples,
    photo_samples,
    photos,
    probe_sizes,
    scenes,
)
from pytest_qvl.samples.drawing import CELL, COLOURS, SHAPES, Scene, random_background, random_thing
from pytest_qvl.samples.scenes import NUMBERS, ORDINALS, Puzzle, puzzle_and_swap

if TYPE_CHECKING:
    from pathlib import Path


def _pixels(samples: list[Sample]) -> list[object]:
    return [
        (
            s.id,
            s.skill,
            s.question,
            s.answer,
            s.swapped_answer,
            [i.tobytes() for i in (*s.images, *(s.swapped or ()))],
        )
        for s in samples
    ]


def test_scenes_are_a_pure_function_of_the_seed() -> None:
    assert _pixels(scenes(5, 3)) == _pixels(scenes(5, 3))
    assert _pixels(scenes(5, 3)) != _pixels(scenes(6, 3))


def test_asking_for_more_or_for_other_skills_leaves_a_sample_as_it_was() -> None:
    many = {sample.id: sample for sample in scenes(5, 4)}
    for sample in scenes(5, 2, ["nth_shape", "colour"]):
        assert _pixels([sample]) == _pixels([many[sample.id]])


def test_ids_are_unique_over_skills_and_seeds() -> None:
    ids = [sample.id for seed in (1, 2) for sample in scenes(seed, 5)]
    assert len(set(ids)) == len(ids) == 2 * 5 * len(ALL_SKILLS)


def test_unknown_and_repeated_skills_are_refused() -> None:
    with pytest.raises(ValueError, match="colour"):
        scenes(0, 1, ["taste"])
    with pytest.raises(ValueError, match="different"):
        scenes(0, 1, ["colour", "colour"])
    with pytest.raises(ValueError, match="negative"):
        scenes(0, -1)


def _solve(skill: str, asked: Puzzle) -> str:
    """The answer, worked out anew from the scenes: what a child would say, not how the scene was built."""
    if skill in TEXT_ONLY_SKILLS:
        return asked.question.removeprefix("Say ").removesuffix(".")
    scene = asked.scenes[0]
    things = scene.things
    words = asked.question.rstrip("?.").split()
    if skill == "count":
        return NUMBERS[len(things) - 1]
    if skill == "side":
        (thing,) = things
        centre = (thing.cell[0] + 0.5) / scene.columns
        assert centre != 0.5, "a shape in the middle is on neither side"
        return "left" if centre < 0.5 else "right"
    if skill == "colour_of":
        (thing,) = [thing for thing in things if thing.shape == words[-1]]
        return thing.colour
    if skill == "colour_at":
        axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[words[-1]]
        first, second = sorted(things, key=lambda thing: sign * thing.cell[axis])
        assert first.cell[0] != second.cell[0]
        assert first.cell[1] != second.cell[1]
        return first.colour
    if skill == "list":
        first, second = sorted(things, key=lambda thing: thing.cell[0])
        assert first.cell[0] != second.cell[0]
        return f"{first.colour} {first.shape}, {second.colour} {second.shape}"
    if skill.startswith("nth"):
        kind = skill.removeprefix("nth_")
        values = [getattr(scene.things[0], kind) for scene in asked.scenes]
        assert len(set(values)) == len(values) >= 2, "what is asked about must differ between all pictures"
        (ordinal,) = set(words) & set(ORDINALS)
        return str(values[ORDINALS.index(ordinal)])
    (thing,) = things
    return str(getattr(thing, skill))


@pytest.mark.parametrize("skill", ALL_SKILLS)
def test_answers_are_right_and_swapped_answers_differ(skill: str) -> None:
    rng = random.Random(skill)
    for _ in range(200):
        asked, swap = puzzle_and_swap(rng, skill)
        assert _solve(skill, asked) == asked.answer
        if swap is None:
            assert skill in TEXT_ONLY_SKILLS
            continue
        assert _solve(skill, swap) == swap.answer != asked.answer
        assert swap.question == asked.question
        assert [(s.columns, s.rows) for s in swap.scenes] == [(s.columns, s.rows) for s in asked.scenes]


@pytest.mark.parametrize("cell", [CELL, 32, 168, 308])
def test_a_shape_never_leaves_its_cell(cell: int) -> None:
    """Otherwise its place could be read from a neighbouring visual token."""
    rng = random.Random(1)
    for shape in SHAPES:
        for _ in range(50):
            thing = random_thing(rng, (1, 1), shape=shape)
            background = (0, 0, 0)
            with_shape = Scene(3, 3, background, (thing,)).render(cell)
            left, top, right, bottom = with_shape.getbbox() or (0, 0, 0, 0)
            assert cell <= left < right <= 2 * cell
            assert cell <= top < bottom <= 2 * cell
            assert (right - left) * (bottom - top) > (cell / 3) ** 2, "it grows with its cell"


def test_colours_stay_nearest_to_their_own_name() -> None:
    rng = random.Random(1)
    for name in COLOURS:
        for _ in range(100):
            rgb = random_thing(rng, (0, 0), colour=name).rgb
            nearest = min(
                COLOURS, key=lambda other: sum((a - b) ** 2 for a, b in zip(rgb, COLOURS[other], strict=True))
            )
            assert nearest == name


def test_backgrounds_are_grey() -> None:
    rng = random.Random(1)
    assert all(max(rgb) - min(rgb) <= 16 for rgb in (random_background(rng) for _ in range(200)))


def test_pictures_are_whole_cells_and_not_all_square() -> None:
    sizes = {image.size for sample in scenes(0, 20) for image in sample.images}
    assert sizes == {(84, 84), (112, 84), (84, 112), (112, 112)}


def test_ablated_samples_keep_question_answer_and_sizes() -> None:
    for sample in scenes(2, 2):
        for other in (sample.blank(), sample.noise(1)):
            assert (other.question, other.answer) == (sample.question, sample.answer)
            assert [image.size for image in other.images] == [image.size for image in sample.images]
            assert other.id != sample.id
        if sample.swapped is None:
            with pytest.raises(ValueError, match="no swapped"):
                sample.with_swapped()
        else:
            swapped = sample.with_swapped()
            assert swapped.images == sample.swapped
            assert swapped.answer == sample.answer != sample.swapped_answer


def test_blank_is_uniform_and_noise_depends_on_seed_and_sample() -> None:
    first, second = scenes(3, 2, ["colour"])
    assert len(first.blank().images[0].getcolors() or ()) == 1
    noise = first.noise(1).images[0].tobytes()
    assert noise == first.noise(1).images[0].tobytes()
    assert noise != first.noise(2).images[0].tobytes()
    assert noise[:100] != second.noise(1).images[0].tobytes()[:100]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    Image.new("L", (56, 56), 7).save(tmp_path / "grey.png")
    Image.new("RGB", (84, 56), "blue").save(tmp_path / "wide.png")
    return tmp_path


def _write(folder: Path, *lines: object) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "samples.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")


def test_folder_samples(folder: Path) -> None:
    swap = {"swapped": "grey.png", "swapped_answer": "grey"}
    _write(
        folder,
        {"image": "red.png", "question": "Colour?", "answer": "red", **swap},
        "",
        {
            "images": ["red.png", "wide.png"],
            "question": "Line\u2028break?",
            "answer": "no",
            "skill": "two",
            "id": "b",
        },
        {"question": "Say hi.", "answer": "hi"},
    )
    one, two, text = folder_samples(folder)
    assert (one.id, one.skill, one.answer, one.swapped_answer) == ("line-1", "custom", "red", "grey")
    assert one.images[0].mode == "RGB"
    assert one.swapped is not None
    assert one.swapped[0].mode == "RGB"
    assert (two.id, two.skill, [image.size for image in two.images]) == ("b", "two", [(56, 56), (84, 56)])
    assert text.images == ()
    assert text.swapped is None


GOOD = {"image": "red.png", "question": "Colour?", "answer": "red"}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        ("[1]", "is not an object"),
        ({**GOOD, "anwser": "x"}, "anwser"),
        ({"image": "red.png", "question": "Colour?"}, "answer is missing"),
        ({"image": "red.png", "answer": "red"}, "question is missing"),
        ({**GOOD, "answer": 3}, "answer is 3"),
        ({**GOOD, "question": "  "}, "question is"),
        ({**GOOD, "images": ["red.png"]}, "both image and images"),
        ({**GOOD, "image": 5}, "image has 5"),
        ({**GOOD, "image": "blue.png"}, "'blue.png' does not exist"),
        ({**GOOD, "image": "../outside.png"}, "leaves the folder"),
        ({**GOOD, "image": "/etc/passwd"}, "leaves the folder"),
        ({**GOOD, "image": "link.png"}, "leaves the folder"),
        ({**GOOD, "image": "samples.jsonl"}, "cannot be read"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"question": ' + "1" * 5000 + "}", "a number too long"),
        ({**GOOD, "question": "What is <|image_pad|>?"}, "question holds <|image_pad|>"),
        ({**GOOD, "question": "<|vision_start|>?"}, "question holds <|vision_start|>"),
        ({**GOOD, "answer": "red<|im_end|>"}, "answer holds <|im_end|>"),
        ({**GOOD, "swapped": "grey.png", "swapped_answer": "<|video_pad|>"}, "swapped_answer holds <|video_pad|>"),
        ({**GOOD, "question": "\ud800?"}, "no text in UTF-8"),
        ({**GOOD, "image": "red.png\0"}, "can be no file name"),
        ({**GOOD, "image": "\ud800.png"}, "can be no file name"),
        ({**GOOD, "image": "x" * 5000}, "is no path"),
        ({**GOOD, "image": "circle.png"}, "circle.png"),
        ({**GOOD, "image": "long.png"}, "is 10000x10 px"),
        ({**GOOD, "swapped": "grey.png"}, "one of swapped and swapped_answer"),
        ({**GOOD, "swapped_answer": "grey"}, "one of swapped and swapped_answer"),
        ({**GOOD, "swapped": "grey.png", "swapped_answer": "red"}, "is the answer itself"),
        ({**GOOD, "swapped": "wide.png", "swapped_answer": "blue"}, "sizes"),
    ],
)
def test_a_bad_line_is_named(folder: Path, tmp_path_factory: pytest.TempPathFactory, line: object, named: str) -> None:
    outside = tmp_path_factory.mktemp("outside") / "outside.png"
    Image.new("RGB", (56, 56)).save(outside)
    (folder / "link.png").symlink_to(outside)
    (folder / "circle.png").symlink_to(folder / "circle.png")
    Image.new("RGB", (10000, 10)).save(folder / "long.png")
    (folder.parent / "outside.png").write_bytes(outside.read_bytes())
    _write(folder, GOOD, line)
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2: .*; ") as caught:
        folder_samples(folder)
    message = str(caught.value)
    assert named in message
    assert "samples.jsonl, line 2" in message
    assert "; " in message


def test_images_are_turned_as_transformers_turns_them(folder: Path) -> None:
    """All eight orientations that EXIF knows, bitwise as Transformers' own loader reads the same file."""
    from transformers.image_utils import load_image

    image = scenes(0, 1, ["list"])[0].images[0].crop((0, 0, 84, 56))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(folder / f"{orientation}.png", exif=exif)
    _write(folder, *[{**GOOD, "image": f"{n}.png"} for n in range(1, 9)])
    read = [sample.images[0] for sample in folder_samples(folder)]
    assert [i.tobytes() for i in read] == [load_image(str(folder / f"{n}.png")).tobytes() for n in range(1, 9)]
    assert [i.size for i in read] == [(84, 56)] * 4 + [(56, 84)] * 4


def test_a_byte_order_mark_is_no_part_of_the_first_line(folder: Path) -> None:
    (folder / "samples.jsonl").write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert [sample.answer for sample in folder_samples(folder)] == ["red"]


def test_the_largest_aspect_ratio_is_the_processors() -> None:
    from pytest_qvl.models.sources import released
    from pytest_qvl.samples import folder

    assert folder.MAX_ASPECT_RATIO == released.MAX_ASPECT_RATIO


def test_a_sample_with_a_placeholder_in_its_text_is_refused_by_name() -> None:
    from pytest_qvl.samples import make_batch

    sample = Sample((), "What is <|image_pad|>?", "red", "own", "mine")
    with pytest.raises(ValueError, match=r"sample 'mine' holds <\|image_pad\|> in its text"):
        make_batch(None, [sample])


def test_a_repeated_id_names_both_lines(folder: Path) -> None:
    _write(folder, {**GOOD, "id": "a"}, {**GOOD, "id": "a"})
    with pytest.raises(ValueError, match=r"line 2: id 'a' was given in line 1"):
        folder_samples(folder)


def test_a_folder_without_samples_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"samples.jsonl does not exist"):
        folder_samples(folder)
    _write(folder, "")
    with pytest.raises(ValueError, match="no samples"):
        folder_samples(folder)
    (folder / "samples.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="UTF-8"):
        folder_samples(folder)


@pytest.mark.skipif(
    not photos.has_photos() and not os.environ.get("CI"), reason="scikit-image (the photos extra) is not installed"
)
def test_photographs() -> None:
    config = SimpleNamespace(patch_size=16, spatial_merge_size=2, depth=27)
    sizes = probe_sizes(config, min_pixels=65536, max_pixels=16777216, readable=True)
    for samples, side in ((photo_samples(), 448), (photo_samples(sizes), 640)):
        assert len({sample.id for sample in samples}) == len(samples) >= 3
        for photo in samples:
            assert photo.swapped is not None
            assert photo.swapped_answer != photo.answer
            for image in (*photo.images, *photo.swapped):
                colours = image.getcolors(maxcolors=side * side)
                assert image.size == (side, side)
                assert colours is None or len(colours) > 1000, "a photograph has many colours"


def test_missing_photographs_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "find_spec", lambda _name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'scikit-image>="):
        photo_samples()
    spec = importlib.machinery.ModuleSpec("skimage", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(photos, "find_spec", lambda _name: spec)
    with pytest.raises(RuntimeError, match=r"has no chelsea.png"):
        photo_samples()


@pytest.mark.parametrize(
    ("lengths", "pictures", "batches"),
    [
        ([7], "1", [[0]]),
        ([9, 5], "01", [[1, 0]]),
        ([406, 43, 148, 167, 178, 193, 294], "1011111", [[1, 2, 3, 4], [5, 6], [0]]),
        ([30, 10, 11, 50], "1001", [[1, 2, 0], [3]]),
        ([40, 10, 10, 10, 41], "10001", [[0, 4], [1, 2, 3]]),
        ([50, 50, 50], "000", [[0, 1], [2]]),
    ],
)
def test_training_that_keeps_all_activations_has_short_batches(lengths, pictures, batches):
    from pytest_qvl.suite.conftest import in_short_batches

    picture = Image.new("RGB", (28, 28))
    samples = [Sample((picture,) * int(n), "?", "!", "own", str(i)) for i, n in enumerate(pictures)]
    found = [[int(sample.id) for sample in batch] for batch in in_short_batches(samples, lengths)]
    assert found == batches
    assert all(len(batch) * max(lengths[i] for i in batch) <= 2 * max(lengths) for batch in found)
