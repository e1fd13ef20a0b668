"""The turns of a conversation in its token ids: the ChatML of every Qwen-VL release."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.samples.batch import END_OF_TURN

if TYPE_CHECKING:
    from collections.abc import Sequence

BEGIN_OF_TURN = "<|im_start|>"
ANSWERS = "assistant"
ROLES = (ANSWERS, "user", "system", "tool")


@dataclass(frozen=True)
class Turn:
    """One turn of a row.

    Attributes:
        role: One of :data:`ROLES`, or ``"another role"``.
        header: Place of its ``<|im_start|>``.
        start: Place of the first token behind its header.
        stop: Place behind its ``<|im_end|>``, or behind its last token where it has none.
        closed: Whether it ends with ``<|im_end|>``.
    """

    role: str
    header: int
    start: int
    stop: int
    closed: bool

    @property
    def places(self) -> range:
        """Its tokens, header left out, ``<|im_end|>`` included."""
        return range(self.start, self.stop)


class TurnReader:
    """Finds turns by the tokens that a tokenizer makes of their headers.

    Attributes:
        end: Id of ``<|im_end|>``.
        breaks: Ids of a line break.
    """

    def __init__(self, tokenizer: Any) -> None:
        def ids(text: str) -> list[int]:
            made: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return made

        self._headers = {role: ids(f"{BEGIN_OF_TURN}{role}\n") for role in ROLES}
        self._begin: int = tokenizer.convert_tokens_to_ids(BEGIN_OF_TURN)
        self.end: int = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.breaks = frozenset(ids("\n"))

    def turns(self, ids: Sequence[int], mask: Sequence[bool]) -> list[Turn]:
        """The turns of a row; one that is cut off ends with its row, or where the mask is False."""
        begins = [place for place, token in enumerate(ids) if token == self._begin and mask[place]]
        return [self._turn(ids, mask, place) for place in begins]

    def _turn(self, ids: Sequence[int], mask: Sequence[bool], header: int) -> Turn:
        role, start = self._role(ids, header)
        for place in range(start, len(ids)):
            if not mask[place] or ids[place] == self._begin:
                return Turn(role, header, start, place, closed=False)
            if ids[place] == self.end:
                return Turn(role, header, start, place + 1, closed=True)
        return Turn(role, header, start, max(start, len(ids)), closed=False)

    def _role(self, ids: Sequence[int], header: int) -> tuple[str, int]:
        for role, wanted in self._headers.items():
            if list(ids[header : header + len(wanted)]) == wanted:
                return role, header + len(wanted)
        return "another role", header + 1


def plain(text: str) -> str:
    """What is said in a turn as tokenizers of this family normalise it, without white space around it."""
    return unicodedata.normalize("NFC", text).strip()
