"""M-RoPE positions: what the rotary embedding receives, against the definition in the papers.

Position ids are integers, so every comparison is exact. A shift of a whole row by one constant is no defect:
rotary attention sees only differences between positions, and releases differ in where a padded row starts
counting. Anything else is judged by the ids and not by the logits, because a wrong axis of a few visual
tokens moves the logits of a 16-bit model by less than its own rounding.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.batches.facts import facts
from pytest_qvl.checks.batches.places import positions_of_samples
from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.packing import is_packed, samples_in_rows, tokens_of_samples
from pytest_qvl.checks.support.placeholders import (
    attended,
    grids_of,
    kinds_of,
    model_inputs,
    refuse_positions_in_generation,
    seconds_per_grid,
    spans,
)
from pytest_qvl.checks.support.position_comparison import PositionComparison
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.state import preserved
from pytest_qvl.models.taps import forget_positions, tapped
from pytest_qvl.releases import is_before

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.taps import LanguageCall


@check(promise=6, videos=True)
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
        batch: What the processor returned, any padding side, rows without an image allowed.
        training: Look at a forward in train mode.

    Raises:
        CheckFailed: Some id is wrong; names row, token, axis, the id and the right one.
        CannotJudge: Neither image nor video in the batch, or the model bypasses its rotary embedding module.
        ValueError: The batch is malformed, or has ``position_ids`` of another shape.
    """
    judge = Judge("mrope_positions", "M-RoPE ids of a forward equal the papers' definition")
    parts, inputs = anatomy(model), model_inputs(batch)
    spans(parts, inputs)
    packed = is_packed(inputs)
    with preserved(model, training=training):
        calls = _forward(parts, inputs)
    PositionComparison(judge, parts, inputs).hold(calls, [_expected(parts, inputs)])
    judge.report("position ids compared", 3 * int(attended(inputs).sum()))
    if packed:
        judge.report("samples packed into rows", int((samples_in_rows(inputs).amax(dim=1) + 1).sum()))
    return judge.verdict()


@check(promise=6, videos=True)
def decode_positions(model: Any, batch: Mapping[str, Any], *, steps: int = 4) -> Evidence:
    """Positions inside ``generate()`` equal the oracle at prefill, and grow by one with each decode step.

    The n-th new token of a row stands n - 1 after the row's largest prefill id, on all three axes, whatever
    its padding: a padded row that counts its padding while decoding was a public loss of accuracy
    (huggingface/transformers#40154, #41180). Greedy generation of ``steps`` + 1 tokens with the cache on;
    tokens that stand for vision or end the text are suppressed, so that every row takes every step.

    What the model keeps for a caller who goes on from its cache without position ids, ``rope_deltas``, is held too: of
    each row the largest prefill id, plus one, less its tokens (before Transformers 5.3 less its length with padding).

    Args:
        model: Qwen-VL model, wrapped or not.
        batch: What the processor returned. Left padding is what generation wants; positions are judged on
            either side.
        steps: Decode steps to look at, at least 1.

    Raises:
        CheckFailed: Some id is wrong; names the step, row, axis, the id and the right one.
        CannotJudge: No image in the batch, or the model bypasses its rotary embedding module.
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
        deltas = parts.core.rope_deltas
    following = [(last + step)[None, :, None].expand(3, -1, 1) for step in range(1, steps + 1)]
    PositionComparison(judge, parts, inputs).hold(calls, [prefill, *following])
    _judge_deltas(judge, deltas, last, attended(inputs).cpu())
    judge.report("decode steps", steps)
    return judge.verdict()


def _judge_deltas(judge: Judge, deltas: torch.Tensor | None, last: torch.Tensor, mask: torch.Tensor) -> None:
    """Hold the model's ``rope_deltas`` ``(rows, 1)`` to the largest ids of the prompt, ``(rows,)``."""
    if deltas is None:
        judge.note("rope_deltas were not judged: generate() leaves none in this model")
        return
    padded, counts = is_before("transformers", "5.3"), mask.sum(dim=1)
    right = last + 1 - (mask.shape[1] if padded else counts)
    seen = deltas.flatten().tolist()
    wrong = [row for row, value in enumerate(right.tolist()) if seen[row : row + 1] != [value]]
    row = wrong[0] if wrong else 0
    judge.equal(
        "wrong rope_deltas",
        len(wrong) if len(seen) == len(right) else len(seen),
        0,
        else_say=(
            f"rope_deltas of row {row} is {seen[row] if row < len(seen) else 'missing'}, should be {int(right[row])} "
            f"(largest id {int(last[row])} + 1 - {mask.shape[1] if padded else int(counts[row])} tokens): who goes on "
            f"from the cache without position ids gets wrong ones; {len(wrong)} of {len(right)} rows are wrong, and "
            f"the model keeps {len(seen)}"
        ),
    )


@check(promise=6, needs=("time",))
def position_state(model: Any, batch: Mapping[str, Any], *, steps: int = 2) -> Evidence:
    """What an earlier call leaves in the model (``rope_deltas``) changes no position of a later one.

    Forward and ``generate()``, each after ``generate()`` on other inputs (the batch after a text-only prompt,
    a text-only prompt after the batch, with different numbers of rows), against the same call with nothing
    left behind. Whether the ids are right at all is for :func:`mrope_positions` and :func:`decode_positions`
    to say. Leaks gave wrong logits up to Transformers 4.48 (huggingface/transformers#36013) and a crash in
    5.2 and 5.3 (#44873). A decode loop written by hand that passes no mask after a forward with images is
    not judged: it reads the state by design.

    Args:
        model: Qwen-VL model, wrapped or not.
        batch: What the processor returned, with at least one image.
        steps: Decode steps to look at in each ``generate()``, at least 1.

    Raises:
        CheckFailed: A position depends on an earlier call, or a call crashed after one; names the sequence of
            calls.
        CannotJudge: No image in the batch, or the model bypasses its rotary embedding module.
        ValueError: The batch is malformed, or ``steps`` below 1.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    judge = Judge("position_state", "positions do not depend on earlier calls (rope_deltas)")
    parts, inputs = anatomy(model), model_inputs(batch)
    spans(parts, inputs)
    _refuse_packed(inputs)
    images_first = (("images", inputs), ("text only", _text_only(parts, inputs)))
    broken = 0
    with preserved(model, training=False):
        for (earlier, before), (later, after) in (images_first, images_first[::-1]):
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
                compare = PositionComparison(judge, parts, after, f"{sequence}: ")
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

    ids = inputs["input_ids"]
    own = tokens_of_samples(samples_in_rows(inputs), attended(inputs).cpu())
    positions = torch.zeros(3, *ids.shape, dtype=torch.int64)
    if not own:
        return positions
    images, videos = (grids_of(inputs, kind) for kind in kinds_of(parts))
    alone = positions_of_samples(
        facts(parts.base),
        ids.cpu(),
        own,
        image_grids=images,
        video_grids=videos,
        seconds=seconds_per_grid(inputs),
    )
    for piece, (row, tokens) in enumerate(own):
        positions[:, row, tokens] = alone[:, piece, tokens]
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
