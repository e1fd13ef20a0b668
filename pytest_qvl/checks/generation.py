"""Generation is what it says: greedy means argmax, and twice the same is bitwise the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.greedy import STEPS, greedy, note_own_defaults
from pytest_qvl.checks.support.reply_logits import (
    LogitsApart,
    by_row,
    judge_finite_logits,
    logits_of,
    require_left_padding,
)
from pytest_qvl.checks.support.scoring import without_labels
from pytest_qvl.evidence import Evidence, Judge
from pytest_qvl.models.anatomy import anatomy

if TYPE_CHECKING:
    import torch


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
    require_left_padding(batch)
    judge, parts = Judge("greedy_is_argmax", "greedy decoding chooses the most probable token"), anatomy(model)
    note_own_defaults(judge, parts)
    inputs = without_labels(batch)
    replies = greedy(model, inputs, max_new_tokens=max_new_tokens, keep_logits=True, compare_scores=True)
    if not judge_finite_logits(judge, parts, by_row(replies), inputs):
        return judge.verdict()
    wrong: list[str] = []
    altered, altered_row = 0.0, 0
    for row, reply in enumerate(replies):
        if reply.altered is not None and not reply.altered <= altered:
            altered, altered_row = reply.altered, row
        for step, (token, logits) in enumerate(zip(reply.ids, logits_of(reply), strict=True)):
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
    require_left_padding(batch)
    judge = Judge("generation_repeatable", "generation repeats itself bitwise")
    inputs = without_labels(batch)
    # A list: out of a generator, a StopIteration of the model would come as an error of this function.
    first, again = [
        greedy(model, inputs, max_new_tokens=max_new_tokens, keep_logits=True, seed=seed) for seed in range(2)
    ]
    if not judge_finite_logits(judge, anatomy(model), by_row([*first, *again]), inputs):
        return judge.verdict()
    apart = LogitsApart()
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
