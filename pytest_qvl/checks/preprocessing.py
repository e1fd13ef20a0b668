"""What the image processor makes of an image, against the documented algorithm, written out once more."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.image_oracle import (
    BICUBIC,
    STEPS_IN_8_BITS,
    Filter,
    Recipe,
    keys,
    resized,
    rgb,
    triangle,
)
from pytest_qvl.checks.support.placeholders import show_grid
from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import Evidence, Judge
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.layers import family_of
from pytest_qvl.samples.exif import TAG, as_stored
from pytest_qvl.samples.sizes import pixel_limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import torch
    from PIL.Image import Image

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.samples import Sample

    Array = np.ndarray[Any, Any]

STEPS_ROUNDED_ONCE = 1
_WAYS = (BICUBIC, replace(BICUBIC, passes="rows"), replace(BICUBIC, passes="once"))
FROM_SAMPLES = 8  # images of the samples, of as many sizes as there are
# Of images with more, the first is judged, and none is made to exceed the upper limit: a second each, and 300 MiB.
MOST_PIXELS = 4 * 2**20
CONSTANTS_APART = 1e-6  # released files write eight digits
NEVER_TURNED = (
    "files given as paths or URLs are not turned as their EXIF orientation says: this processor's loader is "
    "torchvision's (huggingface/transformers#45195). Open them with "
    "PIL.ImageOps.exif_transpose(Image.open(path)) if yours have one"
)


@check(promise=5)
def image_preprocessing(model: Any, processor: Any, samples: Sequence[Sample]) -> Evidence:
    """The processor resizes, rescales, normalises and cuts images as documented, with the family's constants.

    ``pixel_values`` and ``image_grid_thw`` of each image alone are compared with an implementation in NumPy that shares
    no code with Transformers, so that a fault which was there from the start is seen: a reference recorded with the
    same processor has the same fault. Judged are images of the samples and some made here: noise of odd sizes, below
    and (if that is less than 4 megapixels) above the pixel limits, with an alpha channel, in grey, with a palette, and
    a file with EXIF orientation, read by the processor's own loader. Transformers' torchvision loader never turns a
    file (huggingface/transformers#45195): a note says so, as it concerns only who hands over paths or URLs.

    Limits: grids are exact. Values of an image that is not resized differ by eight roundings of float32 at most. Where
    it is resized, by two steps of 8 bits more: Pillow and torch round to 8 bits after each of two passes, where a tie
    may go either way, and the second pass multiplies one step by 1.27 at most before it rounds again. Which pass comes
    first depends on the release. An implementation that rounds once is allowed one step, against the same arithmetic.

    Args:
        model: Qwen-VL model, wrapped or not; only its configuration is read.
        processor: The processor; image sizes and constants are its own, its constants also those of the family's
            released checkpoints.
        samples: Whose images to judge, beside those made here.

    Raises:
        CheckFailed: Names the image, the first value that differs, by how much, and what would give such values.
    """
    judge = Judge("image_preprocessing", "images are preprocessed as documented")
    parts, image_processor = anatomy(model), processor.image_processor
    recipe = _recipe(image_processor)
    problems = _wrong_constants(parts, image_processor, recipe)
    judge.equal("constants that are not the model's", len(problems), 0, else_say="; ".join(problems))
    wrong_grids, wrong_values, judged, worst = [], [], 0, 0.0
    file = _turned_file(image_processor)
    never_turned = file is not None and _is_never_turned(file)
    for shown in (*_shown(samples, recipe), *(() if file is None or never_turned else (file,))):
        judged += 1
        made = image_processor(images=[shown.given], return_tensors="pt")
        grid = tuple(made["image_grid_thw"][0].tolist())
        expected = recipe.grid(*shown.pixels.shape[:2])
        values = made["pixel_values"].double().cpu().numpy()  # a processor may work on a GPU
        if grid != expected:
            wrong_grids.append(f"{shown.name}: {_grid_words(image_processor, recipe, shown, grid, expected)}")
            continue
        excess, sentence = _compared(recipe, shown, values)
        worst = max(worst, excess)
        if sentence:
            wrong_values.append(f"{shown.name}: {sentence}")
    judge.report("images", judged)
    judge.equal("images with another grid", len(wrong_grids), 0, else_say=some(wrong_grids, "; "))
    judge.report("largest difference in steps of 8 bits", worst)
    judge.equal("images with other values", len(wrong_values), 0, else_say=some(wrong_values, "; "))
    for note in _notes(image_processor, recipe):
        judge.note(note)
    if never_turned:
        judge.note(NEVER_TURNED)
    return judge.verdict()


def _recipe(image_processor: Any) -> Recipe:
    fewest, most = pixel_limits(image_processor)
    return Recipe(
        patch=int(image_processor.patch_size),
        merge=int(image_processor.merge_size),
        frames=int(image_processor.temporal_patch_size),
        fewest=fewest,
        most=most,
        mean=tuple(map(float, image_processor.image_mean)),
        deviation=tuple(map(float, image_processor.image_std)),
        resize=bool(getattr(image_processor, "do_resize", True)),
    )


def _wrong_constants(parts: Parts, image_processor: Any, recipe: Recipe) -> list[str]:
    """Constants of the processor that do not belong to the model: its patches, or its family's normalisation."""
    vision, family = parts.config.vision_config, family_of(parts)
    wanted = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    found = [
        f"the processor's {name} is {getattr(image_processor, name)}, the vision tower's {value}"
        for name, value in wanted.items()
        if getattr(image_processor, name) != value
    ]
    for name, own, released in (
        ("image_mean", recipe.mean, family.image_mean),
        ("image_std", recipe.deviation, family.image_std),
    ):
        if any(abs(a - b) > CONSTANTS_APART for a, b in zip(own, released, strict=True)):
            found.append(
                f"the processor's {name} is {list(own)}, that of every released {family.label} {list(released)}: the "
                "tower was trained on images that were normalised with it"
            )
    return found


@dataclass(frozen=True)
class _Shown:
    """An image that the processor is given.

    Attributes:
        name: In words.
        given: What the processor gets.
        pixels: What it shows, ``(height, width, 3)`` uint8.
        on_white: The same laid on white, where it has an alpha channel.
    """

    name: str
    given: Image | torch.Tensor
    pixels: Array
    on_white: Array | None = None


def _shown(samples: Sequence[Sample], recipe: Recipe) -> Iterator[_Shown]:
    seen: set[tuple[int, int]] = set()
    large = False
    for sample in samples:
        for number, image in enumerate(sample.images):
            too_large = image.width * image.height > MOST_PIXELS
            if image.size in seen or len(seen) == FROM_SAMPLES or (too_large and large):
                continue
            seen.add(image.size)
            large = large or too_large
            yield _Shown(f"image {number} of sample {sample.id!r}", image, *rgb(image))
    for name, image in _made(recipe):
        yield _Shown(name, image, *rgb(image))


def _made(recipe: Recipe) -> Iterator[tuple[str, Image]]:
    step = recipe.patch * recipe.merge
    yield f"noise of {2 * step}x{3 * step} px", _noise("RGB", 2 * step, 3 * step)
    if not recipe.resize:
        return
    sizes = [(step + 9, 2 * step - 3), (4 * step + 5, 2 * step + 5)]
    if recipe.most < MOST_PIXELS:
        side = int(recipe.most**0.5)
        sizes.append((side + side // 4 + 1, side + 1))
    if recipe.fewest > step * step:
        sizes.append((step - 5, step + 1))
    for width, height in sizes:
        yield f"noise of {width}x{height} px", _noise("RGB", width, height)
    for mode, words in (("RGBA", "with an alpha channel"), ("L", "in grey"), ("P", "with a palette")):
        yield f"noise {words}", _noise(mode, 2 * step, 2 * step)


def _noise(mode: str, width: int, height: int) -> Image:
    from PIL import Image

    rng = random.Random(f"{mode} {width} {height}")
    bands = {"RGBA": 4, "L": 1, "P": 1}.get(mode, 3)
    image = Image.frombytes(mode, (width, height), rng.randbytes(bands * width * height))
    if mode == "P":
        image.putpalette(rng.randbytes(3 * 256))
    return image


def _turned_file(image_processor: Any) -> _Shown | None:
    """A file that EXIF says to turn, as the processor's loader reads it: one that chat templates call for paths."""
    from PIL import Image

    fetch = getattr(image_processor, "fetch_images", None)
    if fetch is None:
        return None
    step = int(image_processor.patch_size) * int(image_processor.merge_size)
    upright = _noise("RGB", 2 * step, 3 * step)
    exif = Image.Exif()
    exif[TAG] = 6
    with TemporaryDirectory(prefix="qvl-exif-") as folder:
        file = Path(folder) / "turned.png"
        as_stored(upright, 6).save(file, exif=exif)
        read = fetch(str(file))
        if hasattr(read, "load"):
            read.load()
    return _Shown("a file with EXIF orientation 6", read, *rgb(upright))


def _is_never_turned(file: _Shown) -> bool:
    """Whether torchvision has decoded the file, to a tensor ``(3, height, width)``, and left it as it is stored."""
    import torch

    height, width = file.pixels.shape[:2]
    return isinstance(file.given, torch.Tensor) and tuple(file.given.shape[-2:]) == (width, height)


def _grid_words(
    image_processor: Any, recipe: Recipe, shown: _Shown, grid: tuple[int, ...], expected: tuple[int, ...]
) -> str:
    height, width = shown.pixels.shape[:2]
    said = (
        f"its grid is {show_grid(grid)} instead of {show_grid(expected)} ({width}x{height} px, between "
        f"{recipe.fewest:,} and {recipe.most:,} pixels)"
    )
    if grid == (expected[0], expected[2], expected[1]):
        return f"{said}: height and width are transposed, or EXIF orientation was ignored"
    size, own = image_processor.size, []
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        limit = getattr(image_processor, name, None)
        kept = size.get(edge) if hasattr(size, "get") else getattr(size, edge, None)
        if limit and kept and limit != kept:
            own.append(f"{name} is {limit:,} and size[{edge!r}] {kept:,}")
    if own:
        return f"{said}: {' and '.join(own)}, and only one of both counts; give the limits when the processor is loaded"
    return f"{said}: as with other pixel limits than the processor names"


def _compared(recipe: Recipe, shown: _Shown, values: Array) -> tuple[float, str]:
    """The largest difference in steps of 8 bits, and what to say if that is too much."""
    best: tuple[float, Array, Array] | None = None
    for pixels in (shown.pixels, *(() if shown.on_white is None else (shown.on_white,))):
        for how in _WAYS if _resizes(recipe, pixels) else _WAYS[:1]:
            made = _expected(recipe, pixels, how)
            if made.shape != values.shape:
                return 0.0, f"its pixel_values are {values.shape} instead of {made.shape}"
            excess, wrong = _beyond(recipe, shown, values, made, how)
            if not wrong.any():
                return excess, ""
            if best is None or wrong.sum() < best[1].sum():
                best = excess, wrong, made
    assert best is not None
    excess, wrong, made = best
    patch, place = (int(each) for each in divmod(int(wrong.argmax()), wrong.shape[1]))
    cause = _cause(recipe, shown, values)
    return excess, (
        f"{int(wrong.sum()):,} of {wrong.size:,} values differ, first value {place} of patch {patch} "
        f"({values[patch, place]:.5g} instead of {made[patch, place]:.5g}): {cause}"
    )


def _resizes(recipe: Recipe, pixels: Array) -> bool:
    height, width = pixels.shape[:2]
    return recipe.size(height, width) != (height, width)


def _expected(recipe: Recipe, pixels: Array, how: Filter = BICUBIC, *, blocks: bool = True) -> Array:
    size = recipe.size(*pixels.shape[:2])
    return recipe.patches(recipe.normalised(resized(pixels, size, how)), blocks=blocks)


def _beyond(recipe: Recipe, shown: _Shown, values: Array, made: Array, how: Filter) -> tuple[float, Array]:
    """The largest difference in steps of 8 bits, and which values are further away than allowed."""
    steps = STEPS_ROUNDED_ONCE if how.passes == "once" else STEPS_IN_8_BITS
    return recipe.apart(values, made, slice(None), steps if _resizes(recipe, shown.pixels) else 0)


def _cause(recipe: Recipe, shown: _Shown, values: Array) -> str:
    """What gives such values, if one thing alone does."""
    for passes in _WAYS[:2] if _resizes(recipe, shown.pixels) else _WAYS[:1]:
        for words, made, used in _hypotheses(recipe, shown.pixels, passes):
            if made.shape == values.shape and not _beyond(used, shown, values, made, passes)[1].any():
                return words
    return "no single step of the algorithm explains it; was the image changed before the processor, or values after?"


def _hypotheses(recipe: Recipe, pixels: Array, how: Filter) -> Iterator[tuple[str, Array, Recipe]]:
    import numpy as np
    from PIL import Image

    grey = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))
    for words, other in (
        ("red and blue are exchanged (BGR)", pixels[..., ::-1]),
        ("colours are lost (grey)", grey),
        ("it is upside down", pixels[::-1]),
        ("it is mirrored", pixels[:, ::-1]),
    ):
        yield words, _expected(recipe, other, how), recipe
    plain = recipe.with_constants(0.0, 1.0)
    others = {
        "values are not rescaled (by 1/255) before they are normalised": replace(recipe, rescale=1.0),
        "values are rescaled and not normalised": plain,
        "values are neither rescaled nor normalised": replace(plain, rescale=1.0),
        "values are rescaled twice": replace(recipe, rescale=recipe.rescale**2),
        "values are normalised with mean and deviation 0.5": recipe.with_constants(0.5, 0.5),
    }
    for family in FAMILIES.values():
        others[f"values are normalised with the constants of {family.label}"] = replace(
            recipe, mean=family.image_mean, deviation=family.image_std
        )
    for words, used in others.items():
        yield words, _expected(used, pixels, how), used
    yield "patches are in rows, not in blocks of merge_size", _expected(recipe, pixels, how, blocks=False), recipe
    yield from _frames(recipe, pixels, how)
    if _resizes(recipe, pixels):
        yield from _filters(recipe, pixels, how)


def _frames(recipe: Recipe, pixels: Array, how: Filter) -> Iterator[tuple[str, Array, Recipe]]:
    """The second frame of a still image empty, or behind the first instead of within each channel."""
    made = _expected(recipe, pixels, how)
    frames = made.reshape(len(made), 3, recipe.frames, -1).copy()
    yield "frames come before channels", frames.swapaxes(1, 2).reshape(made.shape), recipe
    frames[:, :, 1:] = 0.0
    yield "its second frame is zero, where a still image is repeated", frames.reshape(made.shape), recipe
    black = recipe.normalised(pixels[:1, :1] * 0).reshape(1, 3, 1, 1)
    frames[:, :, 1:] = black
    yield "its second frame is black, where a still image is repeated", frames.reshape(made.shape), recipe


def _filters(recipe: Recipe, pixels: Array, like: Filter) -> Iterator[tuple[str, Array, Recipe]]:
    for words, how in (
        ("it is resized with bilinear interpolation, not bicubic", Filter(triangle, 1.0)),
        ("it is resized without antialiasing", Filter(keys, 2.0, antialias=False)),
        ("it is resized with bilinear interpolation and without antialiasing", Filter(triangle, 1.0, antialias=False)),
    ):
        yield words, _expected(recipe, pixels, replace(how, passes=like.passes)), recipe


def _notes(image_processor: Any, recipe: Recipe) -> Iterator[str]:
    if not recipe.resize:
        yield "the processor does not resize (do_resize=False): images have to come in whole visual tokens"
    elif recipe.most >= MOST_PIXELS:
        yield f"no image above max_pixels ({recipe.most:,}) is judged: it would take too long"
    for name in ("do_rescale", "do_normalize", "do_convert_rgb"):
        if getattr(image_processor, name, True) is False:
            yield f"the processor says {name}=False"
