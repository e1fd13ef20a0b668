"""Question 3: what adapter_config.json says beside targets and rank: alpha, how A and B start, trained token ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.preflight.commands import red
from pytest_qvl.preflight.findings import Finding, neutral, some

if TYPE_CHECKING:
    from pytest_qvl.preflight.subject import Subject

NUMBER = 3
_red = partial(red, NUMBER)
# Starts that take a part out of the base weights which nothing finds again: PEFT repeats them whenever it loads.
_STARTS = {
    re.compile(r"pissa_niter_\d+"): "a randomized SVD (torch.svd_lowrank), which finds another part with every load",
    re.compile("lora_ga"): "the gradients of the training's start, which a load does not have",
}
_CONVERTED = (
    "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START) after the training, where START has the "
    "adapter as it was saved before the first step: that writes a plain LoRA, which fits the base as it is"
)


def settings(subject: Subject) -> Iterator[Finding]:
    """Settings by which the adapter, although all of its keys land, is not what was trained."""
    yield from _alpha(subject)
    yield from _start(subject)
    yield from _token_ids(subject)


def _alpha(subject: Subject) -> Iterator[Finding]:
    config = subject.lora
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern[{neutral(repr(key), 80)}]": value for key, value in (config.alpha_pattern or {}).items()}
    off = {name: value for name, value in alphas.items() if not isinstance(value, int | float) or not value > 0}
    if not off:
        return
    zero = all(value == 0 for value in off.values())
    text = any(not isinstance(value, int | float) for value in off.values())
    does = "multiplied by zero" if zero else "subtracted from the base instead of added"
    does = "scaled by what is no number" if text else does
    yield _red(
        subject,
        "alpha-zero" if zero else "alpha-negative",
        f"{', '.join(f'{name} is {neutral(value, 40)}' for name, value in off.items())}: the adapter is {does}",
        cause="adapter_config.json was written or edited with another alpha than the training had",
        fix="put back the lora_alpha of the training",
    )


def _start(subject: Subject) -> Iterator[Finding]:
    """An adapter that was trained beside weights which the base does not have, and no load makes again."""
    assert subject.adapter is not None
    start = subject.adapter.init
    how = next((words for name, words in _STARTS.items() if isinstance(start, str) and name.fullmatch(start)), "")
    if how:
        yield _red(
            subject, "start-not-repeatable",
            f"init_lora_weights is {neutral(repr(start), 40)}: no load makes the base weights again that this adapter "
            "was trained beside, so base plus adapter is not the model that was trained",
            cause=f"that start takes a part out of the base weights by {how}",
            fix=_CONVERTED,
        )  # fmt: skip


def _token_ids(subject: Subject) -> Iterator[Finding]:
    """Ids of trained rows that no row of the embeddings has, or that stand there twice."""
    asked: Any = subject.lora.trainable_token_indices
    for name, ids in (asked if isinstance(asked, dict) else {"embed_tokens": asked} if asked else {}).items():
        rows = _rows(subject, str(name))
        if rows and (said := _wrong_ids(ids, rows)):
            yield _red(
                subject, "token-ids",
                f"trainable_token_indices of {neutral(name, 80)} {said}",
                cause="PEFT puts the trained rows in place of those that the list names; it was edited, is of another "
                "tokenizer, or the vocabulary was larger in the training",
                fix="put back the list of the training; if tokens were added for it, give the base that has them",
            )  # fmt: skip


def _rows(subject: Subject, name: str) -> int:
    """Rows of the embedding that a name of ``trainable_token_indices`` means; 0 if there is none."""
    for full, module in subject.parts.base.named_modules():
        if (full == name or full.endswith(f".{name}")) and getattr(module, "weight", None) is not None:
            return int(module.weight.shape[0])
    return 0


def _wrong_ids(ids: Any, rows: int) -> str:
    """What is wrong with token ids, in words; empty for nothing."""
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        return f"is {neutral(repr(ids), 80)} and no list of token ids"
    twice = sorted(i for i, count in Counter(ids).items() if count > 1)
    negative, beyond = sorted(i for i in ids if i < 0), sorted(i for i in ids if i >= rows)
    said = [f"{some(map(str, negative))}, and ids start at 0"] if negative else []
    said += [f"{some(map(str, beyond))}, and the embedding has {rows} rows"] if beyond else []
    said += [f"{some(map(str, twice))} twice, and only one of the rows can count"] if twice else []
    return f"names {'; '.join(said)}" if said else ""
