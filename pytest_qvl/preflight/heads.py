"""A head of its own in the files of a checkpoint whose configuration ties the head to the embeddings.

What becomes of it, by ``PreTrainedModel.tie_weights``: Transformers 4.57 ties, whatever the file holds; 5.0 and later
keep both tensors where both are in the file and differ, and warn. vLLM ties by the configuration and leaves the head
unread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.preflight.commands import pytest_line
from pytest_qvl.preflight.findings import Finding
from pytest_qvl.preflight.merged import same_values
from pytest_qvl.releases import installed

if TYPE_CHECKING:
    from pytest_qvl.preflight.subject import Subject
    from pytest_qvl.preflight.weights import Weights

HEAD_APART = "the head was trained or merged apart from the embeddings, and tie_word_embeddings stayed true"
_UNTIE = 'set "tie_word_embeddings": false in config.json, with both tensors in the file'


def has_own_head(weights: Weights, head: str, table: str) -> bool:
    """Whether a checkpoint holds head and embeddings with different values.

    Raises:
        ModelSourceError: A file has become shorter.
    """
    if head not in weights or table not in weights or weights[head].shape != weights[table].shape:
        return False
    if weights.is_packed(head) or weights.is_packed(table):
        return False
    return not same_values(weights[table], weights[head])


def tied_over(number: int, subject: Subject, who: str) -> Finding:
    """What is to be said of such a checkpoint: red where what will load it throws the head away.

    Args:
        number: Of the question.
        subject: What it is about; its runtime decides.
        who: The checkpoint, in words.
    """
    version = installed("transformers") or ""
    by_file = subject.asked.runtime != "vllm" and not version.startswith("4.")
    line = f"the configuration of {who} ties lm_head to the embeddings, and its own values are in the file: "
    if by_file:
        return Finding(
            number, "head-tied-over", "not judged",
            f"{line}Transformers {version} keeps them and warns, Transformers 4 and vLLM throw them away: which "
            "model it is depends on what loads it",
            fix=_UNTIE, keeps_green=pytest_line(subject),
        )  # fmt: skip
    loader = "vLLM throws" if subject.asked.runtime == "vllm" else f"Transformers {version} throws"
    return Finding(
        number, "head-tied-over", "red", f"{line}{loader} them away",
        cause=HEAD_APART,
        fix=_UNTIE, keeps_green=pytest_line(subject),
    )  # fmt: skip
