"""M-RoPE positions: what the rotary embedding receives, against the definition in the papers.

Position ids are integers, so every comparison is exact. A shift of a whole row by one constant is no defect:
rotary attention sees only differences between positions, and releases differ in where a padded row starts
counting. Anything else is judged by the ids and not by the logits, because a wrong axis of a few visual
tokens moves the logits of a 16-bit model by less than its own rounding.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.packing import is_packed, samples_in_rows
from pytest_qvl.checks.support.placeholders import (
    attended,
    describe,
    model_inputs,
    refuse_positions_in_generation,
    show_grid,
    spans,
)
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.quantized import dtype_name
from pytest_qvl.models.state import preserved
from pytest_qvl.models.taps import forget_positions, tapped

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.taps import LanguageCall

AXES = ("t", "h", "w")
Position = tuple[int, int, int]


@dataclass(frozen=True)
class VisionIds:
    """Token ids of the placeholders.

    Attributes:
        image: ``<|image_pad|>``.
        video: ``<|video_pad|>``.
    """

    image: int
    video: int


def mrope_oracle(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    grids: torch.Tensor | Sequence[Sequence[int]] | None,
    ids: VisionIds,
    merge_size: int,
    *,
    video_grids: torch.Tensor | Sequence[Sequence[int]] | None = None,
    seconds_per_grid: Sequence[float] | None = None,
    tokens_per_second: float | None = None,
) -> torch.Tensor:
    """M-RoPE position ids, token by token, from the papers' definition and from nothing else.

    - Text: the same id on all three axes, growing by one per token.
    - Picture: one temporal id for all its visual tokens; height and width ids are the token's row and column.
    - Video: as a picture, with the temporal id growing per temporal patch: by one (Qwen2-VL), or with
      absolute time, by ``seconds_per_grid * tokens_per_second``, rounded down each time (Qwen2.5-VL).
    - Each modality starts at the largest id before it, on any axis, plus one.

    Sources: Qwen2-VL, arXiv:2409.12191, section 2.1 "Multimodal Rotary Position Embedding"; Qwen2.5-VL,
    arXiv:2502.13923, section 2.1.2 "Multimodal Rotary Position Embedding Aligned to Absolute Time".

    Args:
        input_ids: ``(rows, length)`` int64, placeholders expanded.
        attention_mask: ``(rows, length)``, 0 on padding, which has no position; None for no padding.
        grids: ``(pictures, 3)``: frames, rows, columns in patches, for the pictures of all rows in reading
            order.
        ids: The placeholders.
        merge_size: Patches per visual token along each side.
        video_grids: As ``grids``, for videos.
        seconds_per_grid: Seconds between temporal patches of each video; 1 for all if None.
        tokens_per_second: Temporal ids per second; None where time is counted in temporal patches.

    Returns:
        ``(3, rows, length)`` int64 on the CPU: t, h, w. Padding holds 0.

    Raises:
        ValueError: Placeholders and grids do not fit each other; names the row and the token.
    """
    import torch

    images = _Grids("image", _rows(grids), None, 1)
    videos = _Grids("video", _rows(video_grids), seconds_per_grid, tokens_per_second)
    positions = torch.zeros(3, *input_ids.shape, dtype=torch.int64)
    mask = attended({"input_ids": input_ids, "attention_mask": attention_mask}).cpu()
    for row, tokens in enumerate(input_ids.cpu()):
        kept = tokens[mask[row]].tolist()
        places = list(_row_positions(row, kept, {ids.image: images, ids.video: videos}, merge_size))
        positions[:, row, mask[row]] = torch.tensor(places, dtype=torch.int64).reshape(-1, 3).T
    for left in (images, videos):
        if left.used < len(left.grids):
            raise InputError(f"{left.kind} {left.used} has a grid but no placeholders")
    return positions


@dataclass
class _Grids:
    """The grids of one kind, dealt out in reading order."""

    kind: str
    grids: list[list[int]]
    seconds: Sequence[float] | None
    ids_per_second: float | None
    used: int = 0

    def take(self, where: str) -> tuple[list[int], float]:
        """The next grid, and its temporal ids per temporal patch."""
        if self.used == len(self.grids):
            raise InputError(f"{where}: a placeholder, but all {self.used} {self.kind} grids are used up")
        grid = self.grids[self.used]
        seconds = 1.0 if self.seconds is None else float(self.seconds[self.used])
        self.used += 1
        return grid, 1.0 if self.ids_per_second is None else seconds * self.ids_per_second


def _rows(grids: torch.Tensor | Sequence[Sequence[int]] | None) -> list[list[int]]:
    return [] if grids is None else [[int(n) for n in grid] for grid in grids]


def _row_positions(row: int, tokens: Sequence[int], kinds: Mapping[int, _Grids], merge_size: int) -> Iterator[Position]:
    place, start = 0, 0
    while place < len(tokens):
        kind = kinds.get(tokens[place])
        if kind is None:
            yield start, start, start
            place, start = place + 1, start + 1
            continue
        where = f"row {row}, token {place} (padding not counted)"
        (frames, height, width), step = kind.take(where)
        size = frames * (height // merge_size) * (width // merge_size)
        if [*tokens[place : place + size]] != [tokens[place]] * size:
            raise InputError(
                f"{where}: grid {show_grid((frames, height, width))} makes {size} visual tokens, "
                "but there are fewer placeholders in a row"
            )
        largest = start
        for frame in range(frames):
            for line in range(height // merge_size):
                for column in range(width // merge_size):
                    position = (start + math.floor(frame * step), start + line, start + column)
                    largest = max(largest, *position)
                    yield position
        place, start = place + size, largest + 1


@check(promise=6)
def mrope_positions(model: Any, batch: Mapping[str, Any], *, training: bool = False) -> Evidence:
    """Positions of a forward pass equal the oracle at every token that is no padding.

    They are read where the rotary embedding receives them, so what counts is what attention uses, whoever
    computed it (the model, ``generate``, a patched forward, or the batch's own ``position_ids``). One forward pass.

    Rows in which several samples are packed are judged sample by sample: each has the positions that it has alone,
    up to a constant. They are told by ``position_ids`` that start again at 0
    (:func:`pytest_qvl.checks.support.packing.samples_in_rows`); a packed row without any looks like one long sample.
    That attention keeps the samples apart is for :func:`pytest_qvl.checks.causality` to say.

    Args:
        model: Qwen-VL model, wrapped or not.
        batch: What the processor returned, any padding side, rows without a picture allowed.
        training: Look at a forward in train mode.

    Raises:
        CheckFailed: Some id is wrong; names row, token, axis, the id and the right one.
        CannotJudge: No picture in the batch, or the model bypasses its rotary embedding module.
        ValueError: The batch is malformed, or has ``position_ids`` of another shape.
    """
    judge = Judge("mrope_positions", "M-RoPE ids of a forward equal the papers' definition")
    parts, inputs = anatomy(model), model_inputs(batch)
    spans(parts, inputs)
    packed = is_packed(inputs)
    with preserved(model, training=training):
        calls = _forward(parts, inputs)
    _Comparison(judge, parts, inputs).hold(calls, [_expected(parts, inputs)])
    judge.report("position ids compared", 3 * int(attended(inputs).sum()))
    if packed:
        judge.report("samples packed into rows", int((samples_in_rows(inputs).amax(dim=1) + 1).sum()))
    return judge.verdict()


@check(promise=6)
def decode_positions(model: Any, batch: Mapping[str, Any], *, steps: int = 4) -> Evidence:
    """Positions inside ``generate()`` equal the oracle at prefill, and grow by one with each decode step.

    The n-th new token of a row stands n - 1 after the row's largest prefill id, on all three axes, whatever
    its padding: a padded row that counts its padding while decoding was a public loss of accuracy
    (huggingface/transformers#40154, #41180). Greedy generation of ``steps`` + 1 tokens with the cache on;
    tokens that stand for vision or end the text are suppressed, so that every row takes every step.

    Args:
        model: Qwen-VL model, wrapped or not.
        batch: What the processor returned. Left padding is what generation wants; positions are judged on
            either side.
        steps: Decode steps to look at, at least 1.

    Raises:
        CheckFailed: Some id is wrong; names the step, row, axis, the id and the right one.
        CannotJudge: No picture in the batch, or the model bypasses its rotary embedding module.
        ValueError: The batch is malformed, or ``steps`` below 1.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    judge = Judge("decode_positions", "M-RoPE ids inside generate() are right at prefill and at each decode step")
    parts, inputs = anatomy(model), model_inputs(batch)
    spans(parts, inputs)
    _refuse_packed(inputs)
    prefill = _expected(parts, inputs)
    last = prefill.masked_fill(~attended(inputs).cpu(), -1).amax(dim=(0, 2))
    with preserved(model, training=False):
        calls = _generate(parts, inputs, steps)
    following = [(last + step)[None, :, None].expand(3, -1, 1) for step in range(1, steps + 1)]
    _Comparison(judge, parts, inputs).hold(calls, [prefill, *following])
    judge.report("decode steps", steps)
    return judge.verdict()


@check(promise=6, needs=("time",))
def position_state(model: Any, batch: Mapping[str, Any], *, steps: int = 2) -> Evidence:
    """What an earlier call leaves in the model (``rope_deltas``) changes no position of a later one.

    Forward and ``generate()``, each after ``generate()`` on other inputs (the batch after a text-only prompt,
    a text-only prompt after the batch, with different numbers of rows), against the same call with nothing
    left behind. Whether the ids are right at all is for :func:`mrope_positions` and :func:`decode_positions`
    to say. Leaks gave wrong logits up to Transformers 4.48 (huggingface/transformers#36013) and a crash in
    5.2 and 5.3 (#44873). A decode loop written by hand that passes no mask after a forward with pictures is
    not judged: it reads the state by design.

    Args:
        model: Qwen-VL model, wrapped or not.
        batch: What the processor returned, with at least one picture.
        steps: Decode steps to look at in each ``generate()``, at least 1.

    Raises:
        CheckFailed: A position depends on an earlier call, or a call crashed after one; names the sequence of
            calls.
        CannotJudge: No picture in the batch, or the model bypasses its rotary embedding module.
        ValueError: The batch is malformed, or ``steps`` below 1.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    judge = Judge("position_state", "positions do not depend on earlier calls (rope_deltas)")
    parts, inputs = anatomy(model), model_inputs(batch)
    spans(parts, inputs)
    _refuse_packed(inputs)
    pictures_first = (("pictures", inputs), ("text only", _text_only(parts, inputs)))
    broken = 0
    with preserved(model, training=False):
        for (earlier, before), (later, after) in (pictures_first, pictures_first[::-1]):
            for name, call in (("forward", _forward), ("generate()", partial(_generate, steps=steps))):
                sequence = f"{name} on {later} after generate() on {earlier}"
                forget_positions(parts)
                fresh = call(parts, after)
                _generate(parts, before, steps)
                try:
                    calls = call(parts, after)
                except Exception as error:
                    if type(error).__name__ == "OutOfMemoryError":
                        raise
                    broken += 1
                    judge.problem(
                        f"{sequence} crashed: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
                    )
                    continue
                compare = _Comparison(judge, parts, after, f"{sequence}: ")
                broken += not compare.hold(calls, [each.position_ids.cpu() for each in fresh])
    judge.equal("calls that broke", broken, 0, else_say="state left by an earlier call breaks a later one")
    return judge.verdict()


def _forward(parts: Parts, inputs: Mapping[str, Any]) -> list[LanguageCall]:
    """Positions of one forward; all but the last logits are left out, they take more memory than the rest."""
    import torch

    with torch.no_grad(), tapped(parts) as tap:
        parts.wrapped(**inputs, logits_to_keep=1)
    return _seen(tap.language)


def _generate(parts: Parts, inputs: Mapping[str, Any], steps: int) -> list[LanguageCall]:
    """Positions of the prefill and of ``steps`` decode steps; the caller preserves the generation config."""
    from transformers import GenerationConfig

    refuse_positions_in_generation(inputs)
    wrapped: Any = parts.wrapped
    own = parts.base.generation_config
    # Set on the model, because generate() fills a passed config up with the model's own sampling defaults.
    parts.base.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=steps + 1,
        min_new_tokens=steps + 1,
        suppress_tokens=list(parts.vision_token_ids),
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        use_cache=True,
    )
    with tapped(parts) as tap:
        wrapped.generate(**inputs)
    return _seen(tap.language)


def _seen(calls: list[LanguageCall]) -> list[LanguageCall]:
    if not calls:
        raise CannotJudge("the model did not call its language backbone's rotary embedding: positions cannot be seen")
    return calls


def _refuse_packed(inputs: Mapping[str, Any]) -> None:
    if is_packed(inputs):
        raise CannotJudge("several samples are packed into a row: nothing is generated from such rows")


def _expected(parts: Parts, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The oracle's ids ``(3, rows, length)``; those of a packed row sample by sample."""
    import torch

    ids, numbers = inputs["input_ids"], samples_in_rows(inputs)
    mask = attended(inputs).cpu()
    pieces = [(row, number) for row in range(len(ids)) for number in range(int(numbers[row].max()) + 1)]
    # Each sample on a row of its own; what belongs to others is padding there.
    own = torch.stack([mask[row] & (numbers[row] == number) for row, number in pieces])
    alone = mrope_oracle(
        ids.cpu()[[row for row, _ in pieces]],
        own,
        inputs.get("image_grid_thw"),
        VisionIds(parts.image_token_id, parts.video_token_id),
        parts.merge_size,
    )
    positions = alone.new_zeros(3, *ids.shape)
    for piece, (row, _) in enumerate(pieces):
        positions[:, row, own[piece]] = alone[:, piece, own[piece]]
    return positions


def _text_only(parts: Parts, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A text prompt made of the first row's text, with another number of rows than the batch."""
    import torch

    ids = inputs["input_ids"]
    vision = torch.tensor(parts.vision_token_ids, device=ids.device)
    text = ids[0][attended(inputs)[0] & ~torch.isin(ids[0], vision)]
    rows = text.expand(2 if ids.shape[0] == 1 else 1, -1).contiguous()
    made = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    if "mm_token_type_ids" in inputs:
        made["mm_token_type_ids"] = torch.zeros_like(rows).to(inputs["mm_token_type_ids"].dtype)
    return made


@dataclass
class _Comparison:
    """Seen against expected positions of the calls of one forward or one ``generate()``.

    Attributes:
        judge: Takes the figures and the problems.
        parts: The model.
        inputs: What the model was given.
        sequence: What happened before, in words with a colon; or empty.
    """

    judge: Judge
    parts: Parts
    inputs: Mapping[str, Any]
    sequence: str = ""

    def hold(self, calls: Sequence[LanguageCall], expected: Sequence[torch.Tensor]) -> bool:
        """Compare the ids ``(3, rows, length)`` of the prompt, padding left out, then of each decode step.

        Returns:
            Whether they could be compared: as many forward passes as expected, each with ids for its rows and tokens.
        """
        import torch

        mask = attended(self.inputs).cpu()
        if not self._right_sizes(calls, expected):
            return False
        # A release may leave the rows of a text-only batch to broadcasting.
        seen = [_exact(call.position_ids.cpu()).expand_as(right) for call, right in zip(calls, expected, strict=True)]
        difference = seen[0] - expected[0]
        shift = self._shifts(difference, mask)[None]
        wrong = (difference != shift) & mask[None]
        self.judge.equal(
            f"{self.sequence}wrong position ids",
            int(wrong.sum()),
            0,
            else_say=self._prompt_sentence(seen[0] - shift, expected[0], wrong)
            + _rounding(seen[0][:, mask], (expected[0] + shift)[:, mask])
            if wrong.any()
            else "",
        )
        if len(calls) > 1:
            constant = shift.amax(dim=2, keepdim=True)
            raw, right = torch.cat(seen[1:], dim=2), torch.cat([*expected[1:]], dim=2)
            steps = raw - constant
            self.judge.equal(
                f"{self.sequence}wrong position ids while decoding",
                int((steps != right).sum()),
                0,
                else_say=self._decode_sentence(steps, right) + _rounding(raw, right + constant)
                if (steps != right).any()
                else "",
            )
        return True

    def _right_sizes(self, calls: Sequence[LanguageCall], expected: Sequence[torch.Tensor]) -> bool:
        if not self.judge.equal(
            f"{self.sequence}forward passes",
            len(calls),
            len(expected),
            else_say=f"{self.sequence}the language backbone ran {len(calls)} times, should be {len(expected)}",
        ):
            return False
        for number, (call, right) in enumerate(zip(calls, expected, strict=True)):
            seen = tuple(call.position_ids.shape)
            if not _broadcasts(seen, tuple(right.shape)):
                where = f"decode step {number}" if number else "prompt"
                self.judge.problem(
                    f"{self.sequence}{where}: the rotary embedding gets position ids of shape {seen}, should be "
                    f"{tuple(right.shape)}: they are not made from this batch"
                )
                return False
        return True

    def _shifts(self, difference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The constant ``(rows, length)`` by which each row, or each sample of a packed row, is shifted."""
        numbers = samples_in_rows(self.inputs)
        shift = difference.new_zeros(mask.shape)
        for row in range(len(mask)):
            for number in range(int(numbers[row].max()) + 1):
                own = mask[row] & (numbers[row] == number)
                if bool(own.any()):
                    shift[row][numbers[row] == number] = _constant_shift(difference[:, row, own])
        return shift

    def _prompt_sentence(self, seen: torch.Tensor, expected: torch.Tensor, wrong: torch.Tensor) -> str:
        row, token = wrong.any(0).nonzero()[0].tolist()
        axis = int(wrong[:, row, token].nonzero()[0])
        found = spans(self.parts, self.inputs) if "pixel_values" in self.inputs else []
        sentence = (
            f"{self.sequence}{describe(found, row, token)}: {AXES[axis]} is {int(seen[axis, row, token])}, "
            f"should be {int(expected[axis, row, token])}; {int(wrong.any(0).sum())} tokens in "
            f"{int(wrong.any(0).any(1).sum())} of {wrong.shape[1]} rows are wrong"
        )
        if found and bool((seen[:1] == seen)[:, attended(self.inputs).cpu()].all()):
            given = self.inputs.get("position_ids")
            if given is not None:
                return (
                    f"{sentence}; all three axes are equal everywhere: the batch has plain 1-D positions of its own "
                    f"(position_ids of {tuple(given.shape)}), and the model takes them as they are"
                )
            sentence += "; all three axes are equal everywhere: the model fell back to plain 1-D positions"
            if "mm_token_type_ids" not in self.inputs and _takes_type_ids(self.parts):
                sentence += (
                    ". The batch has no mm_token_type_ids, which Transformers >= 5.3 needs and misses in "
                    "silence: pass on every key that the processor returns"
                )
        return sentence

    def _decode_sentence(self, seen: torch.Tensor, expected: torch.Tensor) -> str:
        step, row = (seen != expected).any(0).T.nonzero()[0].tolist()
        axis = int((seen != expected)[:, row, step].nonzero()[0])
        is_, right = int(seen[axis, row, step]), int(expected[axis, row, step])
        mask = attended(self.inputs)[row]
        side = "right" if not bool(mask[-1]) else "left"
        padding = int((~mask).sum())
        sentence = (
            f"{self.sequence}decode step {step + 1}, row {row} ({padding} padding tokens on the {side}): "
            f"{AXES[axis]} is {is_}, should be {right} ({is_ - right:+d}); "
            f"{int((seen != expected).any(0).any(1).sum())} of {seen.shape[1]} rows are wrong"
        )
        return f"{sentence}; generate() needs padding on the left" if side == "right" else sentence


def _exact(positions: torch.Tensor) -> torch.Tensor:
    """Ids in a dtype in which arithmetic is exact: one with bfloat16 would round the ids that it is held against."""
    return positions.double() if positions.is_floating_point() else positions.long()


def _rounding(seen: torch.Tensor, right: torch.Tensor) -> str:
    """Words for ids that are the right ones in a float dtype too narrow for them; empty for any others.

    A dtype of ``p`` significant bits holds every whole number up to ``2**p``, and ``eps`` is ``2**(1 - p)``.
    """
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(right.to(dtype).to(seen.dtype), seen):
            most = round(2 / torch.finfo(dtype).eps)
            return (
                f"; every id is the right one rounded to {dtype_name(dtype)}, which counts without gaps up to {most} "
                "only: keep position ids integers, or in float32"
            )
    return ""


def _takes_type_ids(parts: Parts) -> bool:
    """Whether this release lays positions out by ``mm_token_type_ids``."""
    return "mm_token_type_ids" in inspect.signature(type(parts.base).forward).parameters


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of ``shape`` can be expanded to the shape ``to``."""
    return len(shape) <= len(to) and all(
        have in (1, wanted) for have, wanted in zip(reversed(shape), reversed(to), strict=False)
    )


def _constant_shift(difference: torch.Tensor) -> int:
    """The shift of a row ``(3, tokens)``: its first token's, since an error further on moves all after it.

    Where the first token's axes disagree one of them is wrong, and the commonest difference of the row
    counts.
    """
    first = difference[:, 0].tolist()
    return int(first[0]) if len({*first}) == 1 else int(difference.flatten().mode().values)
