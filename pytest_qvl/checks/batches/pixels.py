"""What stands in ``pixel_values``: dtype, size of the patches, range and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytest_qvl.checks.support.placeholders import is_plain, value_problems
from pytest_qvl.models.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pytest_qvl.checks.batches.facts import View
    from pytest_qvl.checks.batches.findings import Findings
    from pytest_qvl.checks.batches.layout import Layout

Constants = tuple[tuple[float, ...], tuple[float, ...]]
Casts = Sequence[tuple["torch.dtype", ...]]
RAW: Constants = ((0.0,) * 3, (1.0,) * 3)
HALF: Constants = ((0.5,) * 3, (0.5,) * 3)
# Of each image so many patches are looked at closely, spread over it.
PATCHES = 32
# Eight roundings of float32 of a value below 4 (docs/limits.md#batches).
ARITHMETIC = 8 * 2.0**-24 * 4
# How far beyond either end of a source's range bicubic resizing goes (docs/limits.md#bicubic-resizing).
OVERSHOOT = (1.375**2 - 1) / 2
TWICE = (
    "pixels that were 0 to 1 already were rescaled by 1/255 once more: give the processor 8-bit images, or "
    "do_rescale=False"
)


def judge_pixels(view: View, findings: Findings, layout: Layout) -> None:
    """Hold the pixels of images or of videos to what the model's own processor makes."""
    pixels = view.batch.get(layout.kind.pixels)
    if pixels is None or pixels.ndim != 2 or not pixels.numel():
        return
    name = layout.kind.pixels
    vision = view.known.config.vision_config
    channels, frames, side = int(vision.in_channels), int(vision.temporal_patch_size), int(vision.patch_size)
    if pixels.shape[1] != channels * frames * side**2:
        findings.add(
            "patch-size",
            None,
            None,
            found=f"{pixels.shape[1]} values per patch in {name}",
            expected=f"{channels * frames * side**2} ({channels} channels, {frames} frames, {side} x {side} pixels)",
            cause="patch_size or temporal_patch_size of the processor is another model's: load it from the model's "
            "own folder",
        )
        return
    if problems := value_problems(pixels):
        _report_values(findings, name, pixels, problems[0])
        return
    if not layout.grids or sum(t * h * w for t, h, w in layout.grids) != len(pixels):
        return
    _judge_constants(view, findings, layout, pixels)


def _report_values(findings: Findings, name: str, pixels: torch.Tensor, problem: str) -> None:
    kind, expected = "pixels-not-rescaled", "values within about -2.2 to 2.2"
    if not pixels.is_floating_point() or pixels.element_size() == 1:
        kind, expected = "pixels-dtype", "float32, or its cast to bfloat16 or float16"
    elif not bool(pixels.isfinite().all()):
        kind, expected = "pixels-not-finite", "finite values"
    found, _, cause = problem.partition(": ")
    findings.add(kind, None, None, found=found.replace("pixel_values", name), expected=expected, cause=cause)


def _judge_constants(view: View, findings: Findings, layout: Layout, pixels: torch.Tensor) -> None:
    """Values, taken back to 8 bits by the family's mean and deviation, are whole steps of 0 to 255.

    The processor resizes to 8 bits and normalises then, so each value is one of 256 per channel. Where all are whole
    steps by other constants and not by these, those are what they were normalised with. Values that are no whole steps
    by any constants were resized or augmented in floating point, and only their range is judged: they may overshoot.
    """
    chosen, owners = _chosen(layout, pixels)
    seen = [place for place, owner in enumerate(owners) if owner not in layout.not_attended(view)]
    if not seen:
        findings.unjudged[f"values of {layout.kind.pixels}"] = "no row attends to an image: they are dummies"
        return
    chosen, owners = chosen[seen], [owners[place] for place in seen]
    casts = _casts(chosen, pixels.dtype)
    own = (view.known.family.image_mean, view.known.family.image_std)
    _judge_blank(findings, layout, chosen, owners, own, casts=casts)
    if findings.has("pixels-blank"):
        return
    if (levels := _levels_next_to_black(chosen, own, casts)) > 1:
        _judge_dark(findings, layout, levels, len(set(owners)))
        return
    if _fits(chosen, own, casts):
        return
    told = [words for words, each in _others(view) if each != own and _fits(chosen, each, casts)]
    if not told and not _outside(chosen, own, casts):
        findings.notes.append(
            f"{layout.kind.pixels} are no whole steps of 8 bits in {_name(pixels)}: only their range was judged"
        )
        return
    largest, smallest = float(pixels.max()), float(pixels.min())
    findings.add(
        "pixels-not-normalised",
        None,
        None,
        found=f"{layout.kind.pixels} from {smallest:.3g} to {largest:.3g}"
        + (f", as if {told[0]}" if told else ", outside of what any image makes"),
        expected=f"8-bit values times 1/255, normalised with mean {_list(own[0])} and deviation {_list(own[1])}",
        cause="the image processor is another model's, do_normalize or do_rescale is off, or the collator made "
        "pixel_values itself: load the processor from the model's own folder",
    )


def _name(pixels: torch.Tensor) -> str:
    return str(pixels.dtype).removeprefix("torch.")


def _list(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in values) + "]"


def _others(view: View) -> Iterator[tuple[str, Constants]]:
    yield "they were rescaled to 0 to 1 and not normalised", RAW
    yield "they were normalised with mean and deviation 0.5", HALF
    for family in FAMILIES.values():
        yield f"they were normalised with the constants of {family.label}", (family.image_mean, family.image_std)
    own = view.known.family
    yield (
        "red and blue were exchanged after they were normalised",
        (own.image_mean[::-1], own.image_std[::-1]),
    )


def _chosen(layout: Layout, pixels: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Some patches of each image ``(patches, 3, values)`` in float64 on the CPU, and the image of each."""
    import torch

    places, owners, start = [], [], 0
    for number, (t, h, w) in enumerate(layout.grids):
        count = min(PATCHES, t * h * w)
        places += [start + at * (t * h * w) // count for at in range(count)]
        owners += [number] * count
        start += t * h * w
    rows = pixels[torch.tensor(places, device=pixels.device)].detach().cpu().double()
    return rows.reshape(len(rows), 3, -1), owners


def _steps(values: torch.Tensor, constants: Constants) -> torch.Tensor:
    """The 8-bit values ``(patches, 3, values)`` that would have been normalised to these."""
    mean, deviation = _by_channel(constants)
    return (values * deviation + mean) * 255


def _by_channel(constants: Constants) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    mean, deviation = (torch.tensor(each, dtype=torch.float64)[None, :, None] for each in constants)
    return mean, deviation


def _casts(values: torch.Tensor, dtype: torch.dtype) -> Casts:
    """What values held in a dtype may have been rounded to, one after the other, the dtype itself last.

    A data set that is kept in 16 bits, or a collator that casts, leaves its roundings behind in a wider dtype: values
    that all are numbers of a 16-bit dtype may have been its. A float16 tensor that is cast to bfloat16 is rounded
    twice, and shows no trace of it.
    """
    import torch

    bfloat16, float16 = torch.bfloat16, torch.float16
    before = [(), (bfloat16,), (float16,), (bfloat16, float16), (float16, bfloat16)]
    return [
        (*each, dtype)
        for each in before
        if not each or (each[-1] != dtype and bool((values.to(each[-1]).double() == values).all()))
    ]


def _cast(values: torch.Tensor, casts: Sequence[torch.dtype]) -> torch.Tensor:
    for dtype in casts:
        values = values.to(dtype)
    return values.double()


def _coarsest(casts: Casts) -> torch.dtype:
    import torch

    return max((dtype for each in casts for dtype in each), key=lambda dtype: torch.finfo(dtype).eps)


def _fits(values: torch.Tensor, constants: Constants, casts: Casts) -> bool:
    """Whether every value is one of the 256 that images have by these constants, after one of the series of casts."""
    import torch

    mean, deviation = _by_channel(constants)
    near = _steps(values, constants).round()
    found = [torch.zeros_like(values, dtype=torch.bool) for _ in casts]
    for step in (near - 1, near, near + 1):
        right = (step / 255 - mean) / deviation
        for at, each in enumerate(casts):
            low, high = (_cast(right + slack, each) for slack in (-ARITHMETIC, ARITHMETIC))
            found[at] |= (low <= values) & (values <= high) & (step >= 0) & (step <= 255)
    return any(bool(each.all()) for each in found)


def _outside(values: torch.Tensor, constants: Constants, casts: Casts) -> bool:
    """Whether some value is beyond black or white by these constants, by overshoot, a step and its last place."""
    import torch

    steps = _steps(values, constants)
    slack = 255 * OVERSHOOT + 1 + 255 * max(constants[1]) * values.abs() * torch.finfo(_coarsest(casts)).eps
    return bool(((steps < -slack) | (steps > 255 + slack)).any())


def _judge_blank(
    findings: Findings,
    layout: Layout,
    values: torch.Tensor,
    owners: Sequence[int],
    own: Constants,
    *,
    casts: Casts,
) -> None:
    """Images of one colour: impossible ones are filled buffers; all of a batch are never what was meant."""
    import torch

    numbers = torch.tensor(owners)
    flat = values.permute(1, 0, 2)
    blank = []
    for number in sorted(set(owners)):
        inside = flat[:, numbers == number].flatten(1)
        if is_plain(inside, _coarsest(casts)):
            blank.append((number, inside[:, 0]))
    impossible = [(n, colour) for n, colour in blank if not _fits(colour[None, :, None], own, casts)]
    if impossible and bool((impossible[0][1] == impossible[0][1][0]).all()):
        number, colour = impossible[0]
        row = layout.rows[number] if layout.rows else None
        findings.add(
            "pixels-blank",
            row,
            None,
            found=f"every value of {layout.kind.noun} {number} is {float(colour[0]):.3g}",
            expected="an image: not even one of a single colour is normalised to that",
            cause="the collator made a buffer for the pixels and did not fill it",
        )
    elif blank and len(blank) == len(set(owners)) > 1:
        findings.add(
            "pixels-blank",
            None,
            None,
            found=f"all {len(blank)} {layout.kind.noun}s are of one colour each",
            expected="images with something in them",
            cause="images were not read (a loader that returns an empty image for an error), or were replaced by "
            "dummies",
        )
    elif blank:
        findings.notes.append(f"{layout.kind.noun} {blank[0][0]} is of one colour")


def _judge_dark(findings: Findings, layout: Layout, levels: int, images: int) -> None:
    """Images that are black to within one step: what is left of pixels from 0 to 1 that are rescaled by 1/255 again.

    Rounding keeps order, so all values of such pixels lie between what 0 and 1 of 255 are normalised to, less and plus
    what resizing overshoots, each rounded to the dtype. A real image in between has just the values of 0 and 1 in a
    channel (a black frame with noise), or one, if it is black. More than two are not made of 8 bits; two may be of a
    real image, and are held to its sample where there is one. Several images of a batch are never all of them next to
    black, as they are never all blank.
    """
    if levels == 2 and images == 1:
        findings.unjudged[dark(layout)] = (
            f"the only {layout.kind.noun} is black to within one step of 8 bits, which pixels that were rescaled twice "
            "are too"
        )
        return
    findings.add(
        "pixels-not-normalised",
        None,
        None,
        found=f"every value of {layout.kind.pixels} is within one step of 8 bits of black, "
        + ("and some are no whole step" if levels > 2 else f"in all {images} {layout.kind.noun}s"),
        expected="values from black to white, about -2.2 to 2.2",
        cause=TWICE,
    )


def dark(layout: Layout) -> str:
    """Under which name it is said that dark images were not judged."""
    return f"brightness of {layout.kind.pixels}"


def _levels_next_to_black(values: torch.Tensor, own: Constants, casts: Casts) -> int:
    """How many values a channel has at most; 0 where some value is not between 0 and 1 of 255, and their overshoot."""
    import torch

    mean, deviation = _by_channel(own)
    low = (-OVERSHOOT / 255 - mean) / deviation - ARITHMETIC
    high = ((1 + OVERSHOOT) / 255 - mean) / deviation + ARITHMETIC
    if not any(bool(((_cast(low, each) <= values) & (values <= _cast(high, each))).all()) for each in casts):
        return 0
    # Eighths of a step: the same value is not counted twice for how its last place was rounded.
    eighths = (_steps(values, own) * 8).round()
    return max(len(torch.unique(eighths[:, channel])) for channel in range(eighths.shape[1]))
