"""Generation: greedy means argmax, the same words whatever the company and the cache, and an end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.greedy import Reply, greedy, own_defaults, stop_ids
from pytest_qvl.checks.support.not_finite import origin_of_not_finite
from pytest_qvl.checks.support.placeholders import attended
from pytest_qvl.checks.support.reference import LOGITS, MAX_NEW_TOKENS, NoiseFloor, Reference
from pytest_qvl.checks.support.scoring import chunks, coarsest_dtype, without_labels
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.quantized import dtype_name
from pytest_qvl.models.state import preserved
from pytest_qvl.samples import Sample, make_batch
from pytest_qvl.samples.batch import END_OF_TURN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

STEPS = 8
REPEATS = 3
BANG_RUN = 4
NOT_FINITE = "replies with logits that are not finite"
FORM = {
    "without an end": "full precision ends here; an adapter trained without <|im_end|> forgets to",
    "that loop": "full precision does not",
    "with runs of token 0": "argmax of logits that are broken",
    "with vision tokens": "placeholders belong into prompts, and must not be in the loss",
    "with ids beyond the vocabulary": "these rows of the head are untrained padding",
}


@check(promise=8)
def greedy_is_argmax(model: Any, batch: dict[str, torch.Tensor], *, max_new_tokens: int = STEPS) -> Evidence:
    """Every token that greedy decoding chooses has the highest raw logit of its step.

    Exact: the chosen token's logit is compared with the maximum of the same step's logits, so there is no
    tolerance, and ties may go either way; and the scores that tokens were chosen by are those logits, so that
    a penalty is seen too where it tips no token of these probes. Sampling, beams and penalties are switched
    off in a generation config of this check's own, the model's being set aside: ``do_sample=False`` alone
    leaves the ``repetition_penalty=1.05`` that released Qwen-VL checkpoints carry, which the evidence notes.

    Args:
        model: Wrapped or not.
        batch: Left-padded inputs; `labels` are ignored.
        max_new_tokens: At most so many per row.

    Returns:
        Evidence with the number of tokens looked at.

    Raises:
        CheckFailed: A chosen token is not an argmax, or something altered the logits first.
        ValueError: The batch is padded on the right.
    """
    _check_left_padded(batch)
    judge, parts = Judge("greedy_is_argmax", "greedy decoding chooses the most probable token"), anatomy(model)
    _note_own_defaults(judge, parts)
    inputs = without_labels(batch)
    replies = greedy(model, inputs, max_new_tokens=max_new_tokens, keep_logits=True, compare_scores=True)
    if not _finite(judge, parts, _rows(replies), inputs):
        return judge.verdict()
    wrong: list[str] = []
    altered, altered_row = 0.0, 0
    for row, reply in enumerate(replies):
        if reply.altered is not None and not reply.altered <= altered:
            altered, altered_row = reply.altered, row
        for step, (token, logits) in enumerate(zip(reply.ids, _logits(reply), strict=True)):
            best = int(logits.argmax())
            if not bool(logits[token] >= logits[best]):
                earlier = best in inputs["input_ids"][row].tolist() or best in reply.ids[:step]
                hint = ", which occurs earlier in the row: a repetition penalty would do that" if earlier else ""
                wrong.append(
                    f"row {row}, step {step}: chose token {token} (logit {float(logits[token]):.4g}) over "
                    f"token {best} ({float(logits[best]):.4g}){hint}"
                )
    judge.report("tokens", sum(len(reply.ids) for reply in replies))
    judge.equal(
        "tokens that are not the argmax",
        len(wrong),
        0,
        else_say="something samples or penalises although all of that is switched off: " + "; ".join(wrong[:2]),
    )
    judge.equal(
        "largest difference between logits and scores",
        altered,
        0.0,
        else_say=f"a logits processor changes logits although none is configured, most in row {altered_row}",
    )
    return judge.verdict()


@check(promise=8, needs=("time",))
def generation_repeatable(model: Any, batch: dict[str, torch.Tensor], *, max_new_tokens: int = STEPS) -> Evidence:
    """The same inputs give bitwise the same logits at every step, and so the same tokens, twice in a row.

    Exact, in eval mode with the same kernels and two random seeds: whatever differs was random (dropout that
    stayed on) or remembered from the first time (a cache, positions).

    Args:
        model: Wrapped or not.
        batch: Left-padded inputs; `labels` are ignored.
        max_new_tokens: At most so many per row.

    Returns:
        Evidence with the largest difference of any logit.

    Raises:
        CheckFailed: Logits or tokens differ.
        ValueError: The batch is padded on the right.
    """
    _check_left_padded(batch)
    judge = Judge("generation_repeatable", "generation repeats itself bitwise")
    inputs = without_labels(batch)
    # A list: out of a generator, a StopIteration of the model would come as an error of this function.
    first, again = [
        greedy(model, inputs, max_new_tokens=max_new_tokens, keep_logits=True, seed=seed) for seed in range(2)
    ]
    if not _finite(judge, anatomy(model), _rows([*first, *again]), inputs):
        return judge.verdict()
    apart = _Apart()
    for row, (one, other) in enumerate(zip(first, again, strict=True)):
        apart.take(f"row {row}", one, other)
    judge.equal(
        "largest difference of a logit",
        apart.largest,
        0.0,
        else_say=f"logits of two runs on the same inputs differ, most at {apart.where}: something is random "
        "(dropout that stays on in eval mode) or remembered between calls",
    )
    judge.equal(
        "replies that differ",
        sum(one.ids != other.ids for one, other in zip(first, again, strict=True)),
        0,
        else_say="two runs on the same inputs choose different tokens",
    )
    judge.report("steps compared", apart.steps)
    return judge.verdict()


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
    different tokens; what comes after has different inputs. Each may differ by the limit of the noise floor
    (:attr:`pytest_qvl.checks.support.reference.NoiseFloor.limit_for`) at most, so a different token is healthy exactly
    when the two candidates were that close. The classic defect leaves the first step right and the later ones
    wrong: text positions of padded rows while decoding (huggingface/transformers#40136, 4.54.0 to 4.56.2).

    Args:
        model: Wrapped or not.
        processor: Its processor.
        samples: At least two, of different lengths.
        reference: Whose noise floor judges; measured on a reference or base model in the dtype that `model`
            computes in.
        max_new_tokens: At most so many per reply.

    Returns:
        Evidence with the largest difference and the number of replies that diverged within the noise.

    Raises:
        CheckFailed: A logit differs by more than the limit.
        CannotJudge: All rows have the same length, so that none is padded.
        ValueError: The floor was measured in another dtype.
    """
    parts, floor = anatomy(model), _floor(reference)
    _check_dtype(parts, floor)
    batch = make_batch(processor, samples, device=parts.device)
    if bool(batch["attention_mask"].all()):
        raise CannotJudge(f"{len(samples)} samples of the same length: no row of the batch is padded")
    judge = Judge("generation_batch_invariance", "alone and in a left-padded batch a sample gets the same reply")
    together = greedy(model, batch, max_new_tokens=max_new_tokens, keep_logits=True)
    names = [f"sample {sample.id!r}" for sample in samples]
    if not _finite(judge, parts, list(zip(names, together, strict=True)), batch):
        return judge.verdict()
    apart = _Apart()
    for sample, name, reply in zip(samples, names, together, strict=True):
        single = make_batch(processor, [sample], device=parts.device)
        [alone] = greedy(model, single, max_new_tokens=max_new_tokens, keep_logits=True)
        if not _finite(judge, parts, [(f"{name} alone", alone)], single):
            return judge.verdict()
        apart.take(name, reply, alone)
    _judge_apart(
        judge,
        "alone against batch",
        apart,
        floor,
        "a reply depends on the rows beside it: look at positions and mask of padded rows, and at decoding",
    )
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
    the limit of the noise floor (:attr:`pytest_qvl.checks.support.reference.NoiseFloor.limit_for`) at most. So a defect
    that both ways of generating share is seen as well.

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
    parts, floor = anatomy(model), _floor(reference)
    _check_left_padded(batch)
    _check_dtype(parts, floor)
    inputs = without_labels(batch)
    judge = Judge("generation_cache_invariance", "with and without cache generation follows a plain forward")
    # A placeholder without a picture would make the plain forward refuse the reply.
    generate = partial(
        greedy,
        model,
        inputs,
        max_new_tokens=max_new_tokens,
        keep_logits=True,
        suppress=parts.vision_token_ids,
    )
    cached = generate()
    if not _finite(judge, parts, _rows(cached), inputs):
        return judge.verdict()
    if max(len(reply.ids) for reply in cached) < 2:
        raise CannotJudge("every reply ends with its first token: no step was decoded from the cache")
    plain = _teacher_forced(parts, inputs, cached)
    if not _finite(judge, parts, _rows(plain), inputs, lambda: _teacher_forced(parts, inputs, cached)):
        return judge.verdict()
    uncached = generate(use_cache=False)
    if not _finite(judge, parts, _rows(uncached), inputs, lambda: generate(use_cache=False)):
        return judge.verdict()
    ways = {
        "with cache": (cached, "look at positions and cache of the decode steps"),
        "without cache": (uncached, "look at pictures, positions and mask of every step after the first"),
    }
    for name, (replies, hint) in ways.items():
        apart = _Apart()
        for row, (reply, forced) in enumerate(zip(replies, plain, strict=True)):
            apart.take(f"row {row}", reply, forced)
        _judge_apart(judge, f"generation {name} against plain forward", apart, floor, hint)
    return judge.verdict()


@check(promise=8, needs=("knowledge",))
def generation_wellformed(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    reference: Reference | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Evidence:
    """Replies are made of finite logits and real words, and come to an end.

    Judged on every model: the scores of each step are finite. Otherwise the first module whose output is not
    finite is named, as in every check of this module, and nothing else is said of that reply but its runs of
    token 0. And the generation config stops at ``<|im_end|>``, with which the chat template of every Qwen-VL ends a
    turn: where it does not, replies run on whatever the model has learned.

    Judged on the probes that the full-precision model ends by itself: the reply ends with an end-of-sequence
    token within `max_new_tokens`; it does not end in a block of tokens said three times over; it has no run
    of four tokens 0, which is what argmax makes of broken logits ("!!!!" in Qwen's vocabulary,
    huggingface/transformers#33294); it holds no vision token (one that a model generates is a placeholder
    without a picture in the next turn) and no id beyond the tokenizer's vocabulary (the rows of the embedding
    above it are untrained padding). Random weights do each of these with some probability, so without a
    reference, or with one that has no knowledge, these five are not judged.

    Args:
        model: Wrapped or not.
        processor: Its processor.
        samples: Probes.
        reference: From :func:`pytest_qvl.checks.support.reference.record_reference`.
        max_new_tokens: At most so many per reply; as many as the reference was recorded with, or more.

    Returns:
        Evidence with the number of replies judged.

    Raises:
        CheckFailed: A reply is malformed.
        ValueError: The reference was recorded for other samples.
    """
    parts = anatomy(model)
    judge = Judge("generation_wellformed", "replies are finite, real words, and end")
    _note_own_defaults(judge, parts)
    _judge_stops(judge, parts, processor)
    replies: dict[Sample, Reply] = {}
    for group in chunks(samples):
        batch = make_batch(processor, group, device=parts.device)
        made = greedy(model, batch, max_new_tokens=max_new_tokens)
        replies.update(zip(group, made, strict=True))
    broken = {sample: reply for sample, reply in replies.items() if reply.not_finite is not None}
    named = [(f"sample {sample.id!r}", reply) for sample, reply in broken.items()]
    inputs = make_batch(processor, list(broken)[:1], device=parts.device) if broken else {}
    if _finite(judge, parts, named, inputs):
        judge.equal(NOT_FINITE, 0, 0, else_say="")
    if reference is None or not reference.has_knowledge:
        why = "no reference" if reference is None else f"{reference.source} knows nothing about the pictures"
        judge.note(f"end, loops, vision tokens and ids beyond the vocabulary are not judged: {why}")
        return judge.verdict()
    judged = {sample: reply for sample, reply in replies.items() if reference.probe(sample).said.stopped}
    judge.report("replies judged for their form", len(judged))
    _judge_form(judge, parts, processor, judged, max_new_tokens)
    return judge.verdict()


def _judge_stops(judge: Judge, parts: Parts, processor: Any) -> None:
    """The id that ends a turn is among those that end a generation; exact, without a forward."""
    tokenizer = getattr(processor, "tokenizer", processor)
    end, stops = tokenizer.convert_tokens_to_ids(END_OF_TURN), stop_ids(parts)
    listed = ", ".join(f"{stop} ({tokenizer.decode([stop])!r})" for stop in stops) or "nothing"
    judge.equal(
        f"generation stops at {END_OF_TURN}",
        end in stops,
        True,
        else_say=f"the generation config stops at {listed}, and not at {end} ({END_OF_TURN}), with which the chat "
        "template ends a turn: replies run on; set generation_config.eos_token_id",
    )


def _judge_form(judge: Judge, parts: Parts, processor: Any, replies: dict[Sample, Reply], max_new_tokens: int) -> None:
    words = len(processor.tokenizer)
    stops = ", ".join(map(str, stop_ids(parts))) or "none is configured"
    found: dict[str, list[str]] = {name: [] for name in FORM}
    for sample, reply in replies.items():
        said = f"sample {sample.id!r} says {processor.tokenizer.decode(list(reply.ids[:12]))!r}"
        vision = [token for token in reply.ids if token in parts.vision_token_ids]
        foreign = [token for token in reply.ids if token >= words]
        if _longest_run(reply.ids, 0) >= BANG_RUN:
            found["with runs of token 0"].append(said)
        if reply.not_finite is not None:
            continue  # tokens chosen among NaN say nothing of what the model knows
        if not reply.stopped:
            found["without an end"].append(f"{said} and {max_new_tokens} tokens without one of {stops}")
        if period := _loop(reply):
            found["that loop"].append(f"{said} and repeats its last {period} tokens")
        if vision:
            found["with vision tokens"].append(f"{said} with vision token {vision[0]}")
        if foreign:
            found["with ids beyond the vocabulary"].append(f"{said} with id {foreign[0]} of {words}")
    for name, hint in FORM.items():
        sentences = found[name]
        judge.equal(f"replies {name}", len(sentences), 0, else_say=f"{'; '.join(sentences[:2])}: {hint}")


def _finite(
    judge: Judge,
    parts: Parts,
    named: Sequence[tuple[str, Reply]],
    inputs: dict[str, torch.Tensor],
    again: Callable[[], Any] | None = None,
) -> bool:
    """Whether all logits are finite; if not, the problem says so, and nothing else can be told from them.

    Args:
        judge: Takes the problem.
        parts: The model.
        named: Replies with what to call each.
        inputs: The batch that they answer.
        again: Computes these logits once more; if not given, cached generation.
    """
    broken = [(name, reply.not_finite) for name, reply in named if reply.not_finite is not None]
    if broken:
        name, step = broken[0]
        run = again or partial(greedy, parts.wrapped, inputs, max_new_tokens=step + 1)
        origin = origin_of_not_finite(parts, run)
        judge.equal(
            NOT_FINITE,
            len(broken),
            0,
            else_say=f"logits of {name} are not finite from step {step} on{origin}",
        )
    return not broken


def _rows(replies: Sequence[Reply]) -> list[tuple[str, Reply]]:
    return [(f"row {row}", reply) for row, reply in enumerate(replies)]


def _longest_run(ids: Sequence[int], token: int) -> int:
    longest = run = 0
    for i in ids:
        run = run + 1 if i == token else 0
        longest = max(longest, run)
    return longest


def _loop(reply: Reply) -> int | None:
    """Length of the block that a reply says three times or more at its end; None if there is none."""
    ids = reply.ids[:-1] if reply.stopped else reply.ids
    for period in range(1, len(ids) // REPEATS + 1):
        if ids[-period * REPEATS :] == ids[-period:] * REPEATS:
            return period
    return None


@dataclass
class _Apart:
    """The largest difference of logits between replies that should be the same."""

    largest: float = 0.0
    where: str = "nowhere"
    logit: float = 0.0
    steps: int = 0
    diverged: int = 0

    def take(self, name: str, one: Reply, other: Reply) -> None:
        """Compare step by step, up to and including the first step with different tokens."""
        ours, theirs = _logits(one), _logits(other).to(_logits(one).device)
        for step in range(min(len(one.ids), len(other.ids))):
            difference = float((ours[step] - theirs[step]).abs().max())
            self.logit = max(self.logit, float(ours[step].abs().max()), float(theirs[step].abs().max()))
            self.steps += 1
            if not difference <= self.largest:
                self.largest = math.inf if math.isnan(difference) else difference
                self.where = f"{name}, step {step}"
            if one.ids[step] != other.ids[step]:
                self.diverged += 1
                break


def _judge_apart(judge: Judge, name: str, apart: _Apart, floor: NoiseFloor, hint: str) -> None:
    judge.at_most(
        name,
        apart.largest,
        floor.limit_for(apart.logit),
        unit="logit",
        else_say=f"{name}: logits differ by {apart.largest:.4g} at {apart.where}, where the noise floor is "
        f"{floor.value:.3g}; {hint}",
    )
    judge.report(f"{name}: steps compared", apart.steps)
    judge.report(f"{name}: replies that diverged within the noise", apart.diverged)


def _teacher_forced(parts: Parts, inputs: dict[str, torch.Tensor], replies: list[Reply]) -> list[Reply]:
    """The same tokens as `replies`, with the logits of one forward over prompt and reply, without a cache."""
    import torch

    steps = max(len(reply.ids) for reply in replies)
    filler = next(iter(stop_ids(parts)), 0)
    # The last token of the longest reply predicts nothing that is compared, so it is not appended.
    rows = [[*reply.ids, *[filler] * (steps - len(reply.ids))][: steps - 1] for reply in replies]
    ids = torch.tensor(rows, device=inputs["input_ids"].device)
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
        logits = parts.wrapped(**forced, logits_to_keep=steps, use_cache=False).logits[:, -steps:].float()
    made = []
    for reply, row in zip(replies, logits, strict=True):
        own = row[: len(reply.ids)]
        broken = (~own.isfinite().all(dim=-1)).nonzero().flatten().tolist()
        made.append(Reply(reply.ids, reply.stopped, next(iter(broken), None), own))
    return made


def _logits(reply: Reply) -> torch.Tensor:
    assert reply.logits is not None
    return reply.logits


def _floor(reference: Reference | NoiseFloor) -> NoiseFloor:
    return reference.floor if isinstance(reference, Reference) else reference


def _check_dtype(parts: Parts, floor: NoiseFloor) -> None:
    dtype = dtype_name(coarsest_dtype(parts, LOGITS))
    if dtype != floor.dtype:
        raise InputError(
            f"the noise floor was measured in {floor.dtype}, the model computes in {dtype}: record the "
            "reference, or measure noise_floor() on the base model, in the same dtype"
        )


def _check_left_padded(batch: dict[str, torch.Tensor]) -> None:
    if not bool(attended(batch)[:, -1].all()):
        raise InputError("generation continues the last column of each row: pad the batch on the left")


def _note_own_defaults(judge: Judge, parts: Parts) -> None:
    defaults = own_defaults(parts)
    if defaults:
        judge.note(
            f"generate(do_sample=False) alone is not argmax with this model: its generation config has "
            f"{', '.join(defaults)}"
        )
