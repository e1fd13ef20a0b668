"""Training rows with other thoughts in front of their answers, where the chat template opens them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.faults.tools import rebuilt
from pytest_qvl.samples.batch import CLOSES, IGNORED, OPENS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_qvl.faults.case import Batch, Case
    from pytest_qvl.samples import Sample

    Pieces = Sequence[tuple[str, bool]]


def thought_of(answer: str) -> str:
    """A thought of several tokens that an answer follows from."""
    return f"the answer is {answer}"


def put_thoughts(case: Case, pieces_of: Callable[[str], Pieces]) -> None:
    """Put others in place of the thoughts that the template wrote, in every batch that has labels.

    Args:
        case: Its collators are added to.
        pieces_of: What stands between the header and an answer, as texts that are taught or not.
    """
    tokenizer = case.processor.tokenizer
    opens = tokenizer.convert_tokens_to_ids(OPENS)

    def collate(batch: Batch, samples: Sequence[Sample]) -> Batch:
        if "labels" not in batch:
            return batch
        rows = []
        given = zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), samples, strict=True)
        for row, row_labels, mask, sample in given:
            ids, labels = row[mask].tolist(), row_labels[mask].tolist()
            begin = next(place for place, label in enumerate(labels) if label != IGNORED)
            block = len(ids) - 1 - ids[::-1].index(opens)
            made: list[int] = ids[:block]
            taught = [IGNORED] * block
            for text, is_taught in pieces_of(sample.answer):
                own: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
                made += own
                taught += own if is_taught else [IGNORED] * len(own)
            rows.append((made + ids[begin:], taught + labels[begin:]))
        return rebuilt(case, batch, rows)

    case.collators.append(collate)


def whole(answer: str, *, taught: bool) -> Pieces:
    """A thought, taught with its end or left out with it; ``<think>`` is what the generation prompt gives."""
    return [(f"{OPENS}\n", False), (f"{thought_of(answer)}\n{CLOSES}\n\n", taught)]
