"""Which tokens of which role are learned, and whether each answer is learned to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.checks.support.turns import ANSWERS
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qvl.checks.batches.facts import View
    from pytest_qvl.checks.batches.findings import Findings
    from pytest_qvl.checks.support.turns import Turn

ROWS_SHOWN = 2
TRAINER_HELP = "train on answers only (assistant_only_loss, train_on_responses_only, or labels of your own)"


def judge_labels(view: View, findings: Findings) -> None:
    """Only answers are learned, each to its end, as the tokens that they are; no row is without one."""
    if view.labels is None:
        if view.training and "labels" not in view.batch:
            findings.unjudged["labels"] = "the batch has none"
        return
    empty = []
    for row in range(view.rows):
        learned = [place for place, label in enumerate(view.labels[row].tolist()) if label != IGNORED]
        findings.judged["learned tokens"] += len(learned)
        if not learned:
            empty.append(row)
        else:
            _Row(view, findings, row, learned).judge()
    _judge_empty(view, findings, empty)


def _judge_empty(view: View, findings: Findings, rows: Sequence[int]) -> None:
    for row in rows:
        if any(finding.row == row and finding.kind == "image-truncated" for finding in findings.found):
            continue
        turns = view.reader.turns(view.ids[row].tolist(), (~view.padding[row]).tolist())
        cut = bool(turns) and not turns[-1].closed
        cause = "the answer was not found: another response template, or a chat template without generation tags"
        if cut:
            cause = "truncation (max_length, cutoff_len) ended the row before its answer: drop such rows, or cut less"
        if len(rows) == view.rows:
            cause += "; no row of the batch teaches anything, so its loss is NaN or 0"
        findings.add(
            "answer-truncated" if cut else "nothing-learned",
            row,
            turns[-1].stop - 1 if cut else None,
            found="a row of which nothing is learned"
            + (f", which ends inside its {turns[-1].role} turn" if cut else ""),
            expected="its answer, learned",
            cause=cause,
        )


class _Row:
    """The labels of one row."""

    def __init__(self, view: View, findings: Findings, row: int, learned: list[int]) -> None:
        assert view.labels is not None
        self.view, self.findings, self.row, self.learned = view, findings, row, learned
        self.ids: list[int] = view.ids[row].tolist()
        self.labels: list[int] = view.labels[row].tolist()
        self.padding: list[bool] = view.padding[row].tolist()
        self.turns = view.reader.turns(self.ids, [not pad for pad in self.padding])

    def judge(self) -> None:
        """Enter what is wrong with the row; one finding for each cause."""
        if self._judge_values():
            return
        self._show()
        if self._judge_whole():
            return
        if not any(turn.role == ANSWERS for turn in self.turns):
            self.findings.unjudged[f"answers of row {self.row}"] = "it has no assistant turn in it"
            return
        self._judge_roles()
        self._judge_ends()

    def _judge_values(self) -> bool:
        """Whether labels are other tokens than those at their places."""
        wrong = [place for place in self.learned if self.labels[place] != self.ids[place]]
        if not wrong:
            return False
        place = wrong[0]
        shift = next((by for by in (1, -1) if self._shifted(by)), 0)
        kind = "labels-shifted" if shift else "labels-changed"
        cause = "labels were not made of these input_ids: of the text before truncation, or of another row"
        if shift:
            cause = "the collator shifted labels by one, and the model does it once more: leave them unshifted"
        self.findings.add(
            kind,
            self.row,
            place,
            found=f"label {self.view.shown([self.labels[place]])} at {self.view.token(self.row, place)}, "
            f"{len(wrong)} of {len(self.learned)} labels are other tokens",
            expected="the token at the same place, or -100",
            cause=cause,
        )
        return True

    def _shifted(self, by: int) -> bool:
        inside = [place for place in self.learned if 0 <= place + by < len(self.ids)]
        return bool(inside) and all(self.labels[place] == self.ids[place + by] for place in inside)

    def _show(self) -> None:
        """Note which role's words are learned, of the first rows."""
        if self.row >= ROWS_SHOWN:
            return
        parts = []
        for turn in self.turns:
            places = [place for place in range(turn.header, turn.stop) if self.labels[place] != IGNORED]
            if places:
                parts.append(f"{turn.role} {self.view.shown([self.ids[place] for place in places])}")
        if parts:
            self.findings.notes.append(f"row {self.row} learns: {'; '.join(parts[:4])}")

    def _judge_whole(self) -> bool:
        """Whether everything that is no padding is learned: labels that are a copy of the ids."""
        text = [place for place, pad in enumerate(self.padding) if not pad]
        vision = {place for place in text if self.ids[place] in self.view.known.vision}
        learned = set(self.learned)
        if not set(text) - vision <= learned:
            return False
        images = "image placeholders included" if vision & learned else "image placeholders left out"
        answers = [place for turn in self.turns if turn.role == ANSWERS for place in turn.places]
        if set(text) - vision <= {*answers}:
            return False
        self.findings.add(
            "whole-row-learned",
            self.row,
            min(learned),
            found=f"every token of the row is learned, {images}",
            expected=f"its answers alone, {len(answers)} of {len(text)} tokens" if answers else "its answers alone",
            cause=f"labels are a copy of input_ids with nothing but padding masked: {TRAINER_HELP}",
        )
        return True

    def _judge_roles(self) -> None:
        answers = {place for turn in self.turns if turn.role == ANSWERS for place in turn.places}
        behind = {turn.stop for turn in self.turns if turn.role == ANSWERS and turn.closed}
        vision, padding, prompt = [], [], []
        for place in self.learned:
            if self.ids[place] in self.view.known.vision:
                vision.append(place)
            elif not bool(self.view.mask[self.row, place]):
                padding.append(place)
            elif place not in answers and not (place in behind and self.ids[place] in self.view.reader.breaks):
                prompt.append(place)
        if vision:
            cause = "they were not masked in labels: the model learns to write them"
            self._say("images-learned", vision, "placeholders and other vision tokens", cause)
        if padding:
            cause = "labels are input_ids whose padding was not masked: -100 wherever the attention_mask is 0"
            self._say("padding-learned", padding, "pad tokens", cause)
        if prompt:
            role = next((turn.role for turn in reversed(self.turns) if turn.header <= prompt[0]), "no")
            header = any(turn.header <= prompt[0] < turn.start for turn in self.turns)
            cause = "the mask of answers begins too early or ends too late, or was made for another template: "
            cause += TRAINER_HELP
            self._say("prompt-learned", prompt, f"tokens of the {role} turn" + ("'s header" if header else ""), cause)

    def _say(self, kind: str, places: Sequence[int], what: str, cause: str) -> None:
        self.findings.add(
            kind,
            self.row,
            places[0],
            found=f"{len(places)} learned {what}: {self.view.shown([self.ids[place] for place in places])}",
            expected="-100 in labels there",
            cause=cause,
        )

    def _judge_ends(self) -> None:
        """Each answer of which anything is learned is learned with the ``<|im_end|>`` that closes it."""
        wrong = []
        for turn in self.turns:
            taught = [place for place in turn.places if self.labels[place] != IGNORED]
            if turn.role == ANSWERS and taught and (not turn.closed or self.labels[turn.stop - 1] == IGNORED):
                wrong.append(turn)
        if wrong:
            self._say_end(wrong[0], len(wrong))

    def _say_end(self, turn: Turn, count: int) -> None:
        answers = sum(turn.role == ANSWERS for turn in self.turns)
        of = f" ({count} of {answers} answers)" if answers > 1 else ""
        if not turn.closed:
            behind = self.ids[turn.stop] if turn.stop < len(self.ids) else None
            ended_otherwise = behind is not None and self.labels[turn.stop] != IGNORED
            self.findings.add(
                "end-not-learned" if ended_otherwise else "answer-truncated",
                self.row,
                turn.stop - 1,
                found=f"an answer that ends with {self.view.token(self.row, turn.stop - 1)}{of}",
                expected="<|im_end|> behind it, learned",
                cause="the answer was closed with another token than the chat template's"
                if ended_otherwise
                else "truncation (max_length, cutoff_len) or a template without it cut the end of the answer: the "
                "model never learns to stop",
            )
            return
        pad = self.view.tokenizer.pad_token_id
        cause = "the mask of answers ends before <|im_end|>: the model never learns to stop"
        if pad == self.view.end:
            cause = "labels were masked wherever the id is the pad token, which here is <|im_end|> too: mask by the "
            cause += "attention_mask, or give the tokenizer its own pad token (<|endoftext|>)"
        self.findings.add(
            "end-not-learned",
            self.row,
            turn.stop - 1,
            found=f"<|im_end|> of an answer that is not learned{of}",
            expected="its own id in labels",
            cause=cause,
        )
