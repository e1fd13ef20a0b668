"""``attention_mask`` against padding, and ``mm_token_type_ids`` against the placeholders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.checks.support.placeholders import type_ids
from pytest_qvl.releases import installed, is_before

if TYPE_CHECKING:
    import torch

    from pytest_qvl.checks.batches.dummies import Dummies
    from pytest_qvl.checks.batches.facts import View
    from pytest_qvl.checks.batches.findings import Findings


def judge_mask(view: View, findings: Findings, dummies: Dummies) -> None:
    """The mask is 0 exactly on padding and on dummies; also where the pad token is the one that ends a text."""
    given = view.batch.get("attention_mask")
    if view.tokenizer.pad_token_id is None:
        findings.unjudged["padding"] = "the tokenizer has no pad token"
        return
    if given is not None and view.aligned("attention_mask") is None:
        findings.unjudged["attention_mask"] = f"its shape is {tuple(given.shape)}, not (rows, length)"
        return
    findings.judged["pad tokens"] += int(view.padding.sum())
    why = "the batch has no attention_mask" if given is None else "the attention_mask is 1 there"
    _report(view, findings, "padding-attended", view.padding & view.mask, (
        "pad tokens that are attended to",
        "0 in the attention_mask wherever input_ids are padded",
        f"{why}: hand on the mask that the processor returns, padded with 0 where the ids are padded",
    ))  # fmt: skip
    hidden = view.text & ~view.mask
    if bool((hidden & dummies.tokens).any()):
        findings.notes.append(
            "images that no token attends to: dummies, behind all text or of one colour, which teach nothing"
        )
    _report(view, findings, "text-not-attended", hidden & ~dummies.tokens, (
        "tokens of the sample that are not attended to",
        "1 in the attention_mask on every token that is no padding",
        "the mask was made by comparing ids with a pad token that also ends turns, or was padded on another side than "
        "input_ids",
    ))  # fmt: skip


def _report(view: View, findings: Findings, kind: str, wrong: torch.Tensor, words: tuple[str, str, str]) -> None:
    what, expected, cause = words
    for row in wrong.any(dim=1).nonzero().flatten().tolist():
        places = wrong[row].nonzero().flatten().tolist()
        found = f"{len(places)} {what}, from {view.token(row, places[0])} on"
        findings.add(kind, row, places[0], found=found, expected=expected, cause=cause)


def judge_types(view: View, findings: Findings) -> None:
    """Token types are there where positions are made of them, and mark exactly the placeholders."""
    import torch

    wanted = type_ids(view.ids, view.known.kinds)
    types = view.aligned("mm_token_type_ids")
    if view.batch.get("mm_token_type_ids") is None:
        has_positions = view.batch.get("position_ids") is not None
        if bool(wanted.any()) and not has_positions and not is_before("transformers", "5.3"):
            findings.add(
                "types-missing",
                None,
                None,
                found="no mm_token_type_ids in a batch with images",
                expected="0 for text, 1 for placeholders of images, 2 for those of videos, (rows, length)",
                cause=f"the collator dropped it: Transformers {installed('transformers')} lays M-RoPE positions out by "
                "it and falls back to plain text positions in silence; hand on every key of the processor",
            )
        return
    if types is None:
        return
    kept = view.mask | wanted.bool()
    wrong = (types.long() != wanted) & kept
    for row in wrong.any(dim=1).nonzero().flatten().tolist():
        token = int(wrong[row].nonzero()[0])
        shifted = bool((types[row] != 0).sum() == (wanted[row] != 0).sum()) and bool(types[row].any())
        cause = "the collator made them anew or filled them with one value: hand on the processor's"
        if shifted:
            cause = "they were padded on another side than input_ids, or cut at another place"
        elif torch.equal((types[row] != 0), (wanted[row] != 0)):
            cause = "images and videos were taken for each other: 1 is an image, 2 a video"
        findings.add(
            "types-apart",
            row,
            token,
            found=f"type {int(types[row, token])} at {view.token(row, token)}, {int(wrong[row].sum())} wrong in it",
            expected=f"{int(wanted[row, token])}",
            cause=cause,
        )
