"""What is asked of a collator: each property, the rows it is asked with, and which findings of a batch break it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from collating.parts import CUT, Row, rows_of, several_turns, with_video

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ONE_IMAGE = ("colour", "count", "list")
MIXED = ("colour", "text", "count")


@dataclass(frozen=True)
class Case:
    """Rows, and what the collator is asked for.

    Attributes:
        rows: Made for the pixels of a scene's cell.
        asked: Fields of :class:`collating.parts.Asked` beside the set-up.
    """

    rows: Callable[[int], list[Row]]
    asked: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(lambda cell: rows_of(ONE_IMAGE, cell)),
    "left": Case(lambda cell: rows_of(ONE_IMAGE, cell), {"side": "left"}),
    "cut": Case(lambda cell: rows_of(ONE_IMAGE, cell), {"limit": CUT}),
    "turns": Case(several_turns),
    "mixed": Case(lambda cell: rows_of(MIXED, cell)),
    "text": Case(lambda cell: [*rows_of(("text",), cell), *rows_of(("text",), cell, seed=1)]),
    "several": Case(lambda cell: rows_of(("nth_colour", "nth_shape"), cell)),
    "packed": Case(lambda cell: rows_of(MIXED, cell), {"packed": True}),
    "video": Case(with_video),
}


@dataclass(frozen=True)
class Property:
    """One row of the table.

    Attributes:
        name: In words.
        case: Of :data:`CASES`.
        kinds: Findings that break it; where there are none, every finding breaks it of which the plain rows have
            nothing alike.
        needs: Beginnings of what ``checks.batch`` has to judge for it; where that says it could not, nobody knows.
    """

    name: str
    case: str
    kinds: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def broken_by(self, finding: Mapping[str, Any]) -> bool:
        """Whether a finding is about it. One that the whole row is learned says of placeholders, too."""
        if finding["kind"] == "whole-row-learned" and "images-learned" in self.kinds:
            return "placeholders included" in finding["found"]
        return finding["kind"] in self.kinds


def is_new(finding: Mapping[str, Any], plain: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the plain rows have no finding of this kind, and none that breaks the same property."""
    alike = {finding["kind"]}.union(*(each.kinds for each in PROPERTIES if finding["kind"] in each.kinds))
    return not any(each["kind"] in alike for each in plain)


PROPERTIES = (
    Property(
        "placeholders of each row fit its grids",
        "plain",
        (
            "ids-dtype",
            "ids-without-embedding",
            "shapes-apart",
            "template-twice",
            "images-not-expanded",
            "images-expanded-twice",
            "images-without-pixels",
            "pixels-without-images",
            "placeholders-apart",
            "grid-dtype",
            "grids-apart",
            "video-time",
        ),
    ),
    Property("`mm_token_type_ids` mark the placeholders", "plain", ("types-missing", "types-apart", "positions-apart")),
    Property(
        "attention mask fits the padding",
        "plain",
        ("padding-attended", "text-not-attended"),
        needs=("padding", "attention_mask"),
    ),
    Property("the same when padded on the left", "left"),
    Property(
        "labels: answers only",
        "plain",
        (
            "labels-shifted",
            "labels-changed",
            "whole-row-learned",
            "padding-learned",
            "prompt-learned",
            "nothing-learned",
            "another-answer",
        ),
        needs=("labels", "answers of row"),
    ),
    Property("labels: the end of an answer is learned", "plain", ("end-not-learned", "answer-truncated")),
    Property("labels: no image placeholder is learned", "plain", ("images-learned",)),
    Property(
        "pixels: dtype, range and normalisation",
        "plain",
        (
            "pixels-missing",
            "patch-size",
            "pixels-dtype",
            "pixels-not-finite",
            "pixels-not-rescaled",
            "pixels-not-normalised",
            "pixels-blank",
            "patches-misplaced",
            "image-turned",
            "colours-exchanged",
        ),
    ),
    Property(
        "images stand in their row, in order",
        "plain",
        ("row-of-another-sample", "images-missing", "images-repeated", "images-exchanged"),
        needs=("batch against samples", "images against samples"),
    ),
    Property("a limit of length cuts no image", "cut"),
    Property("several turns", "turns"),
    Property("a text-only row among rows with images", "mixed"),
    Property("a batch of text-only rows", "text"),
    Property("several images in a row", "several"),
    Property("packed samples do not see each other", "packed"),
    Property("video", "video"),
)
