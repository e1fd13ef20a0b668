"""Replies are made of finite logits and real words, and come to an end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.greedy import Reply, greedy, note_own_defaults, stop_ids
from pytest_qvl.checks.support.reference import MAX_NEW_TOKENS, Reference
from pytest_qvl.checks.support.reply_logits import NOT_FINITE, judge_finite_logits
from pytest_qvl.checks.support.scoring import chunks
from pytest_qvl.evidence import Evidence, Judge
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.samples import Sample, make_batch
from pytest_qvl.samples.batch import END_OF_TURN

if TYPE_CHECKING:
    from collections.abc import Sequence


REPEATS = 3
BANG_RUN = 4
FORM = {
    "without an end": "full precision ends here; an adapter trained without <|im_end|> forgets to",
    "that loop": "full precision does not",
    "with runs of token 0": "argmax of logits that are broken",
    "with vision tokens": "placeholders belong into prompts, and must not be in the loss",
    "with ids beyond the vocabulary": "these rows of the head are untrained padding",
}


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
    without an image in the next turn) and no id beyond the tokenizer's vocabulary (the rows of the embedding
    above it are untrained padding). Without a reference, or with one that has no knowledge, these five are not judged
    (docs/limits.md#form-of-replies).

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
    note_own_defaults(judge, parts)
    _judge_stops(judge, parts, processor)
    replies: dict[Sample, Reply] = {}
    for group in chunks(samples):
        batch = make_batch(processor, group, device=parts.device)
        made = greedy(model, batch, max_new_tokens=max_new_tokens)
        replies.update(zip(group, made, strict=True))
    broken = {sample: reply for sample, reply in replies.items() if reply.not_finite is not None}
    named = [(f"sample {sample.id!r}", reply) for sample, reply in broken.items()]
    inputs = make_batch(processor, list(broken)[:1], device=parts.device) if broken else {}
    if judge_finite_logits(judge, parts, named, inputs):
        judge.equal(NOT_FINITE, 0, 0, else_say="")
    if reference is None or not reference.has_knowledge:
        why = "no reference" if reference is None else f"{reference.source} knows nothing about the images"
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
