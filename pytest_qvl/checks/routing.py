"""Placeholder routing: every image's and every video's visual tokens stand at its own placeholders.

Routing moves numbers without computing with them, so every comparison is bitwise. :mod:`isolation
<pytest_qvl.checks.isolation>` looks at what an image moves from there on, :mod:`pairing
<pytest_qvl.checks.pairing>` at whether it is the right image.
"""

from __future__ import annotations

import math
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.bitwise import bits_of, differs
from pytest_qvl.checks.support.deepstack import DeepStack, deepstack_tapped
from pytest_qvl.checks.support.not_finite import require_finite
from pytest_qvl.checks.support.placeholders import (
    attended,
    describe,
    describe_visual,
    kinds_of,
    model_inputs,
    show_grid,
    spans,
    validate_batch,
)
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.attributes import attributes_replaced
from pytest_qvl.models.autocast import autocast_to
from pytest_qvl.models.state import preserved
from pytest_qvl.models.taps import tapped, vision_features

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from pytest_qvl.checks.support.placeholders import Span
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.taps import VisionCall


@check(promise=5, videos=True)
def placeholder_counts(model: Any, batch: Mapping[str, Any]) -> Evidence:
    """Each image or video has as many placeholders as its grid makes visual tokens, neither comes alone.

    The grid formula: frames x rows x columns of patches, divided by the square of the merge size (Qwen2-VL,
    arXiv:2409.12191, section 2.1). Reads the batch only; see :func:`validate_batch` for all that is looked
    at.

    Args:
        model: Qwen-VL model, wrapped or not.
        batch: What the processor returned, ``labels`` included if there are any.

    Raises:
        CheckFailed: Names row, image and tokens, and both numbers.
        CannotJudge: Neither images, videos nor placeholders in the batch.
        ValueError: No two-dimensional ``input_ids``.
    """
    judge = Judge("placeholder_counts", "placeholders of each image = visual tokens by the grid formula")
    parts, inputs = anatomy(model), model_inputs(batch)
    both = kinds_of(parts)
    placeholders = sum(int((inputs["input_ids"] == kind.placeholder).sum()) for kind in both)
    grids = {kind.noun: inputs[kind.grids] for kind in both if kind.grids in inputs}
    if not placeholders and not any(map(len, grids.values())) and not any(kind.pixels in inputs for kind in both):
        raise CannotJudge("the batch has no image; give at least one sample with an image")
    problems = validate_batch(model, batch)
    promised = sum(int(each.prod(dim=1).sum()) for each in grids.values()) // parts.merge_size**2
    equal = judge.equal("placeholders", placeholders, promised, else_say=problems[0] if problems else "totals differ")
    for problem in problems[0 if equal else 1 :]:
        judge.problem(problem)
    for noun, each in grids.items():
        judge.report(f"{noun}s", len(each))
    return judge.verdict()


@check(promise=5, videos=True)
def feature_scatter(model: Any, batch: Mapping[str, Any]) -> Evidence:
    """Each visual token lands bitwise at its own placeholder, and the text's own embeddings everywhere else.

    One forward pass: what the vision tower received against the ``pixel_values`` and ``pixel_values_videos`` of the
    batch (cast to the tower's dtype, as the model does) and their grids, and what it put out (cast to the dtype of the
    embeddings, as the model does) against what the language backbone received. All visual tokens of the batch must
    differ from one another, or a wrong order would look right: a plain image makes one visual token many times over.

    To the tower a frame of a video is what an image is: its attention, windows and positions end with the frame. Where
    the batch has videos, the tower runs once more over the same patches, with a grid for each frame, and has to make
    the same visual tokens, bitwise. What it makes of images is for the checks of images to say.

    Where the tower has DeepStack (Qwen3-VL), each of its mergers is held to the vision block that it belongs to, and
    what stands between the first layers of the backbone to the sum of what the layer returned and what the layer's
    merger made, at the placeholders, and to what the layer returned everywhere else.

    Args:
        model: Qwen-VL model, wrapped or not.
        batch: What the processor returned, any padding side, rows without an image allowed.

    Raises:
        CheckFailed: Names row and token, and what stands there or is added instead, or the first patch whose pixels
            are others, or the first visual token of a video that depends on more than its frame.
        CannotJudge: Neither image nor video in the batch, or visual tokens that equal each other, as those of two
            equal frames do (``sample.noise(seed)`` and ``clip.noise(seed)`` make some that all differ).
        ValueError: The batch is malformed.
    """
    import torch

    judge = Judge("feature_scatter", "each visual token stands at its own placeholder, text everywhere else")
    parts, inputs = anatomy(model), model_inputs(batch)
    found = spans(parts, inputs)
    ids, mask = inputs["input_ids"], attended(inputs)
    with preserved(model, training=False), torch.no_grad():
        with tapped(parts) as tap, deepstack_tapped(parts) as deepstack:
            parts.wrapped(**inputs, logits_to_keep=1)
        text = parts.embeddings(ids)
        _judge_frames_apart(judge, parts, found, tap.vision)
    given = [kind for kind in kinds_of(parts) if inputs.get(kind.pixels) is not None]
    _judge_pixels(
        judge,
        parts,
        found,
        torch.cat([inputs[kind.pixels] for kind in given]),
        [call.pixel_values for call in tap.vision],
    )
    _judge_grids(judge, torch.cat([inputs[kind.grids] for kind in given]), [call.grid_thw for call in tap.vision])
    seen = tap.language[0].inputs_embeds
    text = text.to(seen.dtype)
    # Where each visual token belongs, in the order in which the tower is called: images, then videos.
    order = torch.cat([(ids == kind.placeholder).flatten().nonzero().flatten() for kind in given])
    places = torch.zeros_like(ids, dtype=torch.bool)
    places.view(-1)[order] = True
    features = torch.cat([call.features for call in tap.vision]) if tap.vision else seen.new_empty(0, seen.shape[-1])
    features = features.to(seen.dtype)
    count = int(places.sum())
    if not judge.equal(
        "visual tokens", len(features), count, else_say=f"the vision tower made {len(features)} visual tokens"
    ):
        return judge.verdict()
    require_finite(parts, features, "visual tokens", lambda: parts.wrapped(**inputs, logits_to_keep=1))
    distinct = len(torch.unique(bits_of(features), dim=0))
    if distinct < count:
        if judge.problems:  # what makes them equal may be what was found, such as a frame that is shown twice
            return judge.verdict()
        raise CannotJudge(
            f"only {distinct} of {count} visual tokens differ from each other in {str(seen.dtype)[6:]}: a "
            "wrong order could look right; give images with more in them, such as sample.noise(seed), and videos of "
            "which no two frames are alike, such as clip.noise(seed)"
        )
    judge.report("visual tokens that differ from each other", distinct)
    right = text.clone(memory_format=torch.contiguous_format)
    right.view(-1, right.shape[-1])[order] = features
    wrong = differs(seen, right) & mask
    for name, where in (("placeholders", places), ("text tokens", ~places)):
        bad = (wrong & where).nonzero().tolist()
        judge.equal(
            f"{name} with a wrong embedding",
            len(bad),
            0,
            else_say=_scatter_sentence(found, bad, seen, text, features) if bad else "",
        )
    DeepStack(judge, parts, deepstack, found, order, mask).hold()
    return judge.verdict()


def _judge_pixels(
    judge: Judge, parts: Parts, found: Sequence[Span], given: torch.Tensor, calls: Sequence[torch.Tensor]
) -> None:
    """Hold the patches that the tower received, in all its calls, to those that the model was given."""
    import torch

    received = torch.cat(list(calls)) if calls else given[:0]
    if received.shape != given.shape:
        judge.problem(
            f"the vision tower receives other pixels than the model was given: {tuple(received.shape)} values instead "
            f"of {tuple(given.shape)}"
        )
        return
    expected = given.to(received)
    wrong = differs(received, expected).nonzero().flatten().tolist()
    sentence = ""
    if wrong:
        where = describe_visual(found, wrong[0] // parts.merge_size**2)
        apart = float((received.double() - given.to(received.device).double()).abs().nan_to_num(math.inf).max())
        sentence = (
            "the vision tower receives other pixels than the model was given: those of "
            f"{where} first; {len(wrong)} of {len(given)} patches differ, by {apart:.3g} at most"
        )
    judge.equal("patches that reach the tower with other pixels", len(wrong), 0, else_say=sentence)


def _judge_grids(judge: Judge, given: torch.Tensor, calls: Sequence[torch.Tensor]) -> None:
    """Hold the frames that the tower was told of, rows and columns of patches, to those that the model was given."""
    received, wanted = _frames(calls), _frames([given])
    sentence = f"the vision tower is told of {len(received)} frames, the batch has {len(wanted)}"
    if len(received) == len(wanted):
        pairs = zip(received, wanted, strict=True)
        frame, (told, grid) = next(((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1]), (0, ("", "")))
        sentence = f"the vision tower lays frame {frame} of the batch out as {told} patches, its grid says {grid}"
    judge.equal("the tower is told the grids of the batch", received == wanted, True, else_say=sentence)


def _judge_frames_apart(judge: Judge, parts: Parts, found: Sequence[Span], calls: Sequence[VisionCall]) -> None:
    """Hold the visual tokens of videos to those that the tower makes of their frames as so many images.

    The same patches in the same order make every operation one of the same shapes, so nothing is rounded otherwise;
    and under the autocast that the model's forward ran the tower under.
    """
    first, count, wrong = 0, 0, list[int]()
    for call in calls:
        frames = call.grid_thw[:, 0]
        if bool((frames > 1).any()):
            apart = call.grid_thw.repeat_interleave(frames, dim=0)
            apart[:, 0] = 1
            with autocast_to(call.features.device.type, call.autocast):
                features = vision_features(parts.vision_tower(call.pixel_values, grid_thw=apart))
            count += len(call.features)
            if features.shape != call.features.shape:
                judge.problem(
                    f"the vision tower makes {len(call.features)} visual tokens of videos, and {len(features)} of "
                    "their frames one by one"
                )
                return
            wrong += [first + place for place in differs(features, call.features).nonzero().flatten().tolist()]
        first += len(call.features)
    if not count:
        return
    sentence = ""
    if wrong:
        sentence = (
            f"the vision tower makes something else of {describe_visual(found, wrong[0])} than of the same frame as an "
            "image: frames of a video are not kept apart, or are laid out otherwise (bounds of attention, windows or "
            f"rotary positions of the tower); {len(wrong)} of {count} visual tokens differ"
        )
    judge.equal("visual tokens of videos that depend on more than their frame", len(wrong), 0, else_say=sentence)


def _frames(grids: Sequence[torch.Tensor]) -> list[str]:
    return [show_grid((h, w)) for each in grids for t, h, w in each.tolist() for _ in range(t)]


def _scatter_sentence(
    found: Sequence[Span],
    bad: Sequence[Sequence[int]],
    seen: torch.Tensor,
    text: torch.Tensor,
    features: torch.Tensor,
) -> str:
    row, token = bad[0]
    here = bits_of(seen[row, token])
    same = (bits_of(features) == here).all(dim=-1).nonzero().flatten().tolist()
    if same:
        holds = f"holds {describe_visual(found, same[0])}"
    elif bool((bits_of(text[row, token]) == here).all()):
        holds = "still holds the placeholder's own text embedding"
    else:
        holds = "holds neither a visual token of this batch nor its text embedding"
    rows = len({row for row, _ in bad})
    return f"{describe(found, row, token)} {holds}; {len(bad)} tokens in {rows} rows are wrong"


@check(promise=5)
def visual_token_order(model: Any, batch: Mapping[str, Any]) -> Evidence:
    """The vision tower puts its visual tokens out in the order of the patches that went in.

    This is what :func:`feature_scatter` takes at its word. The tower sorts patches into windows and must sort
    its output back. Here its blocks pass their input on unchanged, so that each visual token depends on the
    ``merge_size ** 2`` patch rows it is merged from and on no others, whatever the order in between. The
    numbers of the patch groups are written in binary: for each bit the groups that have it are replaced by
    noise, then those that have it not. A visual token that moves in just one of the two runs of every bit is
    made of the one group whose number these bits spell; one made of several groups moves in both runs of some
    bit, since two numbers differ somewhere. The language backbone does not run.

    Args:
        model: Qwen-VL model, wrapped or not.
        batch: What the processor returned, any padding side, rows without an image allowed; plain images
            do too.

    Raises:
        CheckFailed: Names the first visual token in a wrong place, and whose patches it is made of.
        CannotJudge: No image in the batch.
        ValueError: The batch is malformed.
    """
    import torch

    judge = Judge("visual_token_order", "visual tokens leave the tower in the order of their patches")
    parts, inputs = anatomy(model), model_inputs(batch)
    found = spans(parts, inputs)
    pixels = inputs["pixel_values"]
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).to(pixels)
    group = torch.arange(len(pixels), device=pixels.device) // parts.merge_size**2
    groups = sum(span.length for span in found)
    bits = max(1, (groups - 1).bit_length())
    with preserved(model, training=False), torch.no_grad(), _blocks_bypassed(parts):
        before = _features(parts, inputs)
        if not judge.equal(
            "visual tokens",
            len(before),
            groups,
            else_say=f"the vision tower made {len(before)} visual tokens",
        ):
            return judge.verdict()
        with_bit, without_bit = (torch.zeros(groups, dtype=torch.int64, device=before.device) for _ in range(2))
        for bit in range(bits):
            noisy = (group >> bit & 1).bool()
            for where, moved in ((noisy, with_bit), (~noisy, without_bit)):
                changed = {**inputs, "pixel_values": torch.where(where[:, None], noise, pixels)}
                moved.bitwise_or_(differs(before, _features(parts, changed)).long() << bit)
    numbers = torch.arange(groups, device=before.device)
    one_group = (with_bit ^ without_bit) == 2**bits - 1
    wrong = (~one_group | (with_bit != numbers)).nonzero().flatten().tolist()
    sentence = ""
    if wrong:
        first = wrong[0]
        if one_group[first]:
            made_of = f"is made of the patches of {describe_visual(found, int(with_bit[first]))}"
        elif with_bit[first] or without_bit[first]:
            made_of = "is made of several patch groups"
        else:
            made_of = "depends on no patch"
        sentence = f"{describe_visual(found, first)} {made_of}; {len(wrong)} of {groups} visual tokens are wrong"
    judge.equal("visual tokens made of other patches", len(wrong), 0, else_say=sentence)
    judge.report("runs of the vision tower", 2 * bits + 1)
    return judge.verdict()


@check(promise=5)
def malformed_inputs(model: Any, batch: Mapping[str, Any]) -> Evidence:
    """Batches whose placeholders and pixels do not belong together are noticed, however silent the model is.

    Made from a sound batch: one placeholder too few, one too many, placeholders without pixels, pixels
    without placeholders, one placeholder moved from its image to another row (within the row, where there is
    only one). :func:`validate_batch` must find each. The model itself must refuse one placeholder too few and
    pixels without placeholders, as every release of Transformers does unless its check was switched off
    (``TRANSFORMERS_DISABLE_TORCH_CHECK=1``) or patched away. It is never shown more placeholders than visual
    tokens: without that check this kills the CUDA context of the process.

    The moved placeholder leaves the batch's total right, and Transformers compares totals only: up to 5.2 such
    a batch goes through in silence, with each following visual token one place off; from 5.3 on it is stopped
    where the positions are laid out, if ``mm_token_type_ids`` moved along. So what the model says to it is
    reported and not judged.

    Args:
        model: Qwen-VL model, wrapped or not.
        batch: A sound batch with at least one image of two visual tokens or more.

    Raises:
        CheckFailed: Names the malformed batch that went through.
        CannotJudge: No image in the batch.
        ValueError: The batch is malformed already.
    """
    judge = Judge("malformed_inputs", "batches whose placeholders and pixels do not fit are noticed")
    parts, inputs = anatomy(model), model_inputs(batch)
    rows, overlooked, accepted = [], [], []
    with preserved(model, training=False):
        for name, broken in _malformed(parts, inputs).items():
            problems = validate_batch(model, broken)
            overlooked += [] if problems else [name]
            refusal = "not asked" if name in _NEVER_SHOWN else _refusal(parts, broken)
            accepted += [name] if refusal is None and name in _MUST_REFUSE else []
            rows.append((name, refusal or "accepted", problems[0] if problems else "overlooked"))
    judge.equal(
        "malformed batches overlooked",
        len(overlooked),
        0,
        else_say=f"validate_batch overlooks: {', '.join(overlooked)}",
    )
    judge.equal(
        "malformed batches the model accepts",
        len(accepted),
        0,
        else_say=(
            f"the model takes {' and '.join(accepted)} without an error: its count check is off "
            "(TRANSFORMERS_DISABLE_TORCH_CHECK=1, or a patched forward)"
        ),
    )
    return judge.verdict(("batch", "model", "validate_batch"), rows)


_MUST_REFUSE = ("one placeholder too few", "pixels without placeholders")
_NEVER_SHOWN = ("one placeholder too many", "placeholders without pixels")


def _malformed(parts: Parts, inputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The batches of :func:`malformed_inputs`, each by what is wrong with it."""
    import torch

    span = max(spans(parts, inputs), key=lambda each: each.length)
    ids, places = inputs["input_ids"], inputs["input_ids"] == parts.image_token_id
    plain = attended(inputs) & ~torch.isin(ids, ids.new_tensor(parts.vision_token_ids))
    text, image = ids[plain][-1], parts.image_token_id
    fewer, more = ids.clone(), ids.clone()
    fewer[span.row, span.stop - 1] = text
    more[plain.nonzero()[-1].unbind()] = image
    moved, with_text = fewer.clone(), plain.any(dim=1).nonzero().flatten().tolist()
    to_row = next((row for row in with_text if row != span.row), span.row)
    moved[to_row, plain[to_row].nonzero()[-1]] = image
    return {
        "one placeholder too few": {**inputs, "input_ids": fewer},
        "one placeholder too many": {**inputs, "input_ids": more},
        "placeholders without pixels": {
            name: value for name, value in inputs.items() if name not in ("pixel_values", "image_grid_thw")
        },
        "pixels without placeholders": {**inputs, "input_ids": torch.where(places, text, ids)},
        "one placeholder moved off its image": _with_types(inputs, moved, image),
    }


def _with_types(inputs: Mapping[str, Any], ids: torch.Tensor, image: int) -> dict[str, Any]:
    """Inputs with other token ids, and ``mm_token_type_ids`` (1 for an image, where there are any) that agree."""
    changed = {**inputs, "input_ids": ids}
    if "mm_token_type_ids" in inputs:
        changed["mm_token_type_ids"] = (ids == image).to(inputs["mm_token_type_ids"])
    return changed


def _refusal(parts: Parts, inputs: Mapping[str, Any]) -> str | None:
    import torch

    try:
        with torch.no_grad():
            parts.wrapped(**inputs, logits_to_keep=1)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        return type(error).__name__
    return None


class _Reached(Exception):
    """The language backbone was reached; nothing after it is of interest."""


def _features(parts: Parts, inputs: Mapping[str, Any]) -> torch.Tensor:
    """What the vision tower puts out, ``(visual tokens, hidden)``, without running the language backbone."""
    import torch

    def before_language(*_: Any) -> None:
        raise _Reached

    handle = parts.language_backbone.register_forward_pre_hook(before_language)
    try:
        with suppress(_Reached), tapped(parts) as tap:
            parts.wrapped(**inputs)
    finally:
        handle.remove()
    return torch.cat([call.features for call in tap.vision])


@contextmanager
def _blocks_bypassed(parts: Parts) -> Iterator[None]:
    """Let every vision block return its input inside the block, without computing anything."""

    def unchanged(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden_states

    with attributes_replaced((block, "forward", unchanged) for block in parts.blocks):
        yield
