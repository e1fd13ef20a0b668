"""Token ids as such, and what is laid out token by token beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.checks.support.turns import BEGIN_OF_TURN
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from pytest_qvl.checks.batches.facts import View
    from pytest_qvl.checks.batches.findings import Findings

ALIGNED = ("labels", "mm_token_type_ids", "attention_mask")


def judge_ids(view: View, findings: Findings) -> None:
    """Dtype and range of the ids, and the shapes of the tensors beside them."""
    _judge_dtypes(view, findings)
    _judge_range(view, findings)
    _judge_shapes(view, findings)
    _judge_template(view, findings)


def _judge_dtypes(view: View, findings: Findings) -> None:
    import torch

    taken = {"input_ids": (torch.int64, torch.int32), "labels": (torch.int64,)}
    for name, dtypes in taken.items():
        value = view.batch.get(name)
        if value is not None and value.dtype not in dtypes:
            findings.add(
                "ids-dtype",
                None,
                None,
                found=f"{name} of {str(value.dtype).removeprefix('torch.')}",
                expected="int64 (torch.long)",
                cause="the collator cast every tensor to one dtype, or kept that of numpy arrays: cast pixels alone",
            )


def _judge_range(view: View, findings: Findings) -> None:
    wrong = ((view.ids < 0) | (view.ids >= view.known.vocabulary)).nonzero().tolist()
    for row in dict.fromkeys(row for row, _ in wrong):
        token = next(place for at, place in wrong if at == row)
        value = int(view.ids[row, token])
        cause = "the vocabulary was trimmed below the tokenizer, or the tokenizer is another model's"
        if value == IGNORED:
            cause = "labels were put where the ids belong, or ids were padded with -100"
        elif value < 0:
            cause = "a placeholder of another framework (-200) was not replaced by the model's own"
        findings.add(
            "ids-without-embedding",
            row,
            token,
            found=f"id {value}",
            expected=f"0 to {view.known.vocabulary - 1:,}, the rows of the model's embeddings",
            cause=cause,
        )


def _judge_shapes(view: View, findings: Findings) -> None:
    shape = tuple(view.ids.shape)
    for name in ALIGNED:
        value = view.batch.get(name)
        if value is None or tuple(value.shape) == shape or (name == "attention_mask" and value.ndim == 4):
            continue
        findings.add(
            "shapes-apart",
            None,
            None,
            found=f"{name} of shape {tuple(value.shape)}",
            expected=f"that of input_ids, {shape}",
            cause=f"the collator cut or padded input_ids and not {name}: do both alike",
        )


def _judge_template(view: View, findings: Findings) -> None:
    """A turn that begins inside of another one: the chat template was applied to a text that had been through it."""
    start = view.tokenizer.convert_tokens_to_ids(BEGIN_OF_TURN)
    for row in range(view.rows):
        is_open = False
        for token, value in enumerate(view.ids[row].tolist()):
            if value == start and is_open and token - 1 not in view.starts[row]:
                nearby = view.shown(view.ids[row, max(0, token - 3) : token + 6])
                findings.add(
                    "template-twice",
                    row,
                    token,
                    found=f"a turn that begins inside of another one: {nearby}",
                    expected="<|im_end|> before the next <|im_start|>",
                    cause="the chat template was applied to a text that it had made already, or a text of the data "
                    "holds its special tokens",
                )
                break
            is_open = value == start or (is_open and value != view.end and token not in view.starts[row])
