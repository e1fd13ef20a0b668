"""Generation says the same words alone and in a batch, with a cache and without."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.greedy import STEPS, Reply, greedy, stop_ids
from pytest_qvl.checks.support.noise_floor import NoiseFloor
from pytest_qvl.checks.support.own_rounding import HeldLogits, own_response
from pytest_qvl.checks.support.placeholders import attended
from pytest_qvl.checks.support.position_comparison import AloneAgainstBatch, ids_of_row
from pytest_qvl.checks.support.reference import Reference, floor_of
from pytest_qvl.checks.support.reply_logits import (
    HeldReplies,
    by_row,
    judge_finite_logits,
    require_left_padding,
)
from pytest_qvl.checks.support.scoring import without_labels
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.state import preserved
from pytest_qvl.models.taps import tapped
from pytest_qvl.samples import Sample, make_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@check(promise=8, needs=("time",))
def generation_batch_invariance(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    reference: Reference | NoiseFloor,
    *,
    max_new_tokens: int = STEPS,
) -> Evidence:
    """A sample gets the same reply alone and in a left-padded batch.

    Compared are the raw logits of each step, up to and including the first step at which the two choose
    different tokens; what comes after has different inputs. Each may differ by the limit of the noise floor at most
    (:meth:`pytest_qvl.checks.support.noise_floor.NoiseFloor.limit_for`), or of the sample's own rounding alone where it
    is beyond that (docs/limits.md#own-rounding), so a different token is healthy exactly when the two candidates were
    that close. The position ids of each token and step are integers and have to be the same, up to a constant per row:
    wrong ones may move the logits of a short row by less than rounding does. Tokens that stand for vision are not
    chosen. The classic defect leaves the first step right and the later ones wrong: text positions of padded rows while
    decoding (huggingface/transformers#40136, 4.54.0 to 4.56.2).

    Args:
        model: Wrapped or not.
        processor: Its processor.
        samples: At least two, of different lengths.
        reference: Whose noise floor judges; measured on a reference or base model in the dtype that `model`
            computes in.
        max_new_tokens: At most so many per reply.

    Returns:
        Evidence with the largest difference, the number of replies that diverged within the noise, and that of position
        ids that differ.

    Raises:
        CheckFailed: A logit differs by more than the limit, or a position id differs.
        CannotJudge: All rows have the same length, so that none is padded.
        ValueError: The floor was measured in another dtype.
    """
    parts = anatomy(model)
    floor = floor_of(parts, reference)
    batch = make_batch(processor, samples, device=parts.device)
    if bool(batch["attention_mask"].all()):
        raise CannotJudge(f"{len(samples)} samples of the same length: no row of the batch is padded")
    judge = Judge("generation_batch_invariance", "alone and in a left-padded batch a sample gets the same reply")
    # A placeholder without an image would make a plain forward refuse the reply.
    generate = partial(greedy, model, max_new_tokens=max_new_tokens, keep_logits=True, suppress=parts.vision_token_ids)
    with tapped(parts) as tap:
        together = generate(batch)
    names = [f"sample {sample.id!r}" for sample in samples]
    if not judge_finite_logits(judge, parts, list(zip(names, together, strict=True)), batch):
        return judge.verdict()
    replies, positions, mask = HeldReplies(HeldLogits(floor)), AloneAgainstBatch(), attended(batch).cpu()
    for row, (sample, name, reply) in enumerate(zip(samples, names, together, strict=True)):
        single = make_batch(processor, [sample], device=parts.device)
        with tapped(parts) as tap_alone:
            [alone] = generate(single)
        ids = ids_of_row(tap_alone.language, attended(single).cpu(), 0)
        positions.take(name, int(mask[row].sum()), ids_of_row(tap.language, mask, row), ids)
        if not judge_finite_logits(judge, parts, [(f"{name} alone", alone)], single):
            return judge.verdict()
        forced = partial(_forced_logits, parts, single, [alone])
        replies.take(name, reply, alone, partial(own_response, parts, forced, tower=True))
    hint = "a reply depends on the rows beside it: look at positions and mask of padded rows, and at decoding"
    replies.judge(judge, "alone against batch", hint)
    positions.judge(judge, "alone against batch", hint)
    return judge.verdict()


@check(promise=8, needs=("time",))
def generation_cache_invariance(
    model: Any,
    batch: dict[str, torch.Tensor],
    reference: Reference | NoiseFloor,
    *,
    max_new_tokens: int = STEPS,
) -> Evidence:
    """Generation with and without key-value cache follows the logits of one plain forward.

    The tokens that cached generation chose are appended to the prompt and go through one forward without
    cache, whose positions come from the whole sequence: the yardstick. The raw logits of cached generation,
    and those of generation with ``use_cache=False`` up to its first different token, may differ from it by
    the limit of the noise floor (:meth:`pytest_qvl.checks.support.noise_floor.NoiseFloor.limit_for`) at most, or of the
    row's own rounding in that forward where it is beyond it (docs/limits.md#own-rounding). So a defect that both ways
    of generating share is seen as well.

    Args:
        model: Wrapped or not.
        batch: Left-padded inputs; `labels` are ignored.
        reference: Whose noise floor judges; measured on a reference or base model in the dtype that `model`
            computes in.
        max_new_tokens: At most so many per row.

    Returns:
        Evidence with the largest difference of each way.

    Raises:
        CheckFailed: A logit differs by more than the limit.
        CannotJudge: Every reply ends with its first token, so that nothing was decoded from the cache.
        ValueError: The batch is padded on the right, or the floor was measured in another dtype.
    """
    parts = anatomy(model)
    require_left_padding(batch)
    floor = floor_of(parts, reference)
    inputs = without_labels(batch)
    judge = Judge("generation_cache_invariance", "with and without cache generation follows a plain forward")
    # A placeholder without an image would make the plain forward refuse the reply.
    generate = partial(
        greedy,
        model,
        inputs,
        max_new_tokens=max_new_tokens,
        keep_logits=True,
        suppress=parts.vision_token_ids,
    )
    cached = generate()
    if not judge_finite_logits(judge, parts, by_row(cached), inputs):
        return judge.verdict()
    if max(len(reply.ids) for reply in cached) < 2:
        raise CannotJudge("every reply ends with its first token: no step was decoded from the cache")
    plain = _teacher_forced(parts, inputs, cached)
    if not judge_finite_logits(judge, parts, by_row(plain), inputs, lambda: _teacher_forced(parts, inputs, cached)):
        return judge.verdict()
    uncached = generate(use_cache=False)
    if not judge_finite_logits(judge, parts, by_row(uncached), inputs, lambda: generate(use_cache=False)):
        return judge.verdict()
    ways = {
        "with cache": (cached, "look at positions and cache of the decode steps"),
        "without cache": (uncached, "look at images, positions and mask of every step after the first"),
    }
    responses = cache(partial(own_response, parts, partial(_forced_logits, parts, inputs, cached), tower=False))
    for name, (replies, hint) in ways.items():
        held = HeldReplies(HeldLogits(floor))
        for row, (reply, forced) in enumerate(zip(replies, plain, strict=True)):
            held.take(f"row {row}", reply, forced, responses, row)
        held.judge(judge, f"generation {name} against plain forward", hint)
    return judge.verdict()


def _teacher_forced(parts: Parts, inputs: dict[str, torch.Tensor], replies: list[Reply]) -> list[Reply]:
    """The same tokens as `replies`, with the logits of one forward over prompt and reply, without a cache."""
    made = []
    for reply, row in zip(replies, _forced_logits(parts, inputs, replies), strict=True):
        own = row[: len(reply.ids)]
        broken = (~own.isfinite().all(dim=-1)).nonzero().flatten().tolist()
        made.append(Reply(reply.ids, reply.stopped, next(iter(broken), None), own))
    return made


def _forced_logits(parts: Parts, inputs: dict[str, torch.Tensor], replies: list[Reply]) -> torch.Tensor:
    """float32 logits ``(rows, steps of the longest reply, vocabulary)`` of one forward over prompt and reply."""
    import torch

    steps = max(len(reply.ids) for reply in replies)
    filler = next(iter(stop_ids(parts)), 0)
    # The last token of the longest reply predicts nothing that is compared, so it is not appended.
    rows = [[*reply.ids, *[filler] * (steps - len(reply.ids))][: steps - 1] for reply in replies]
    ids = torch.tensor(rows, dtype=torch.long, device=inputs["input_ids"].device)
    tail = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.zeros_like(ids),
    }
    forced = inputs | {name: torch.cat([inputs[name], more], dim=1) for name, more in tail.items() if name in inputs}
    if (positions := inputs.get("position_ids")) is not None:  # the batch's own; a prompt ends with text
        further = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        forced["position_ids"] = torch.cat([positions, positions[..., -1:] + further], dim=-1)
    with preserved(parts.wrapped, training=False), torch.no_grad():
        logits: torch.Tensor = parts.wrapped(**forced, logits_to_keep=steps, use_cache=False).logits
    return logits[:, -steps:].float()
