"""Placeholders against grids, row by row, and grids against pixels; images and videos alike."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.placeholders import (
    Kind,
    empty_problem,
    fitting,
    placeholder_runs,
    show_grid,
    visual_tokens,
    why_other,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pytest_qvl.checks.batches.facts import Facts, View
    from pytest_qvl.checks.batches.findings import Findings

Grid = tuple[int, int, int]
Run = tuple[int, int, int]


@dataclass(frozen=True)
class Piece:
    """What fills one unbroken run of placeholders: an image, or a frame group of a video.

    Attributes:
        item: Number of the image (video) in the batch.
        grid: Of the image (video).
        size: Its visual tokens.
    """

    item: int
    grid: Grid
    size: int


@dataclass(frozen=True)
class Layout:
    """Where images (videos) are.

    Attributes:
        kind: Which of both.
        grids: All of them.
        rows: Row of each image (video); empty where that cannot be told.
        tokens: Place in its row at which its run of placeholders begins; empty like :attr:`rows`.
        sound: Whether every run of placeholders fits its grid.
    """

    kind: Kind
    grids: tuple[Grid, ...]
    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    sound: bool

    def behind_text(self, view: View) -> frozenset[int]:
        """Numbers of the images (videos) that stand behind all that their row attends to: dummies, seen by no token."""
        return self._where(view.behind_text)

    def not_attended(self, view: View) -> frozenset[int]:
        """Numbers of the images (videos) that no row attends to, wherever they stand."""
        return self._where(~view.mask)

    def _where(self, there: torch.Tensor) -> frozenset[int]:
        places = zip(self.rows, self.tokens, strict=True)
        return frozenset(number for number, place in enumerate(places) if bool(there[place]))


def lay_out(view: View, findings: Findings, kind: Kind) -> Layout:
    """Judge the placeholders of one kind against its grids, and its grids against its pixels."""
    grids = _grids(view, findings, kind)
    if grids is None:
        return Layout(kind, (), (), (), sound=False)
    findings.judged[f"{kind.noun}s"] += len(grids)
    found = placeholder_runs(view.ids, kind.placeholder)
    sound = _judge_pixels(view, findings, kind, grids, found)
    pieces = list(_pieces(view.known, kind, grids))
    if sound and (found or pieces):
        dealt = _deal(found, [piece.size for piece in pieces], apart=kind.noun == "video" and view.known.frames_apart)
        if dealt is not None:
            places = dict(zip((piece.item for piece in pieces), dealt, strict=True)).values()
            rows, tokens = (tuple(each[axis] for each in places) for axis in (0, 1))
            return Layout(kind, tuple(grids), rows, tokens, sound=True)
        _Mismatch(view, findings, kind, pieces, found).report()
        sound = False
    return Layout(kind, tuple(grids), (), (), sound)


def _grids(view: View, findings: Findings, kind: Kind) -> list[Grid] | None:
    given = view.batch.get(kind.grids)
    if given is None:
        return []
    if given.ndim != 2 or given.shape[1] != 3 or given.is_floating_point():
        findings.add(
            "grid-dtype",
            None,
            None,
            found=f"{kind.grids} {tuple(given.shape)} of {_name(given.dtype)}",
            expected=f"({kind.noun}s, 3) of int64: frames, rows and columns of patches",
            cause="the collator stacked grids or cast every tensor to the training dtype: concatenate them along the "
            "first axis, and cast pixels alone",
        )
        return None
    return [(t, h, w) for t, h, w in given.tolist()]


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _judge_pixels(view: View, findings: Findings, kind: Kind, grids: Sequence[Grid], found: Sequence[Run]) -> bool:
    """Whether there are pixels, grids and placeholders at all, and pixels as many as the grids say."""
    pixels = view.batch.get(kind.pixels)
    if pixels is not None and (nothing := empty_problem(view.batch, kind)):
        there, _, cause = nothing.partition(": ")
        row, token = found[0][:2] if found else (None, None)
        findings.add(
            "grids-apart" if pixels.numel() else "pixels-missing",
            row,
            token,
            found=there,
            expected=f"{kind.pixels} and {kind.grids} of every {kind.noun}, or neither",
            cause=cause,
        )
        return False
    if pixels is None or not grids:
        if not found and pixels is None and not grids:
            return True
        _judge_missing(findings, kind, found, pixels, grids)
        return False
    for number, grid in enumerate(grids):
        if grid[1] % view.known.merge or grid[2] % view.known.merge:
            findings.add(
                "grids-apart",
                None,
                None,
                found=f"grid {show_grid(grid)} of {kind.noun} {number}",
                expected=f"rows and columns that are multiples of the merge size {view.known.merge}",
                cause="the image was resized to another grid than visual tokens make: let the model's own processor "
                "resize",
            )
            return False
    promised = sum(t * h * w for t, h, w in grids)
    if pixels.ndim != 2 or len(pixels) != promised:
        findings.add(
            "grids-apart",
            None,
            None,
            found=f"{kind.pixels} of shape {tuple(pixels.shape)}",
            expected=f"{promised:,} rows, one for each patch of {len(grids)} grids",
            cause="patches of all images belong behind each other, as the grids do: concatenate pixel_values and "
            "image_grid_thw of the samples along the first axis in one order; do not stack, cut or pad them",
        )
        return False
    return True


def _judge_missing(findings: Findings, kind: Kind, found: Sequence[Run], pixels: Any, grids: Sequence[Grid]) -> None:
    if found and pixels is None:
        row, token, length = found[0]
        total = sum(run[2] for run in found)
        findings.add(
            "images-without-pixels",
            row,
            token,
            found=f"{length} placeholders ({total} in the batch) and no {kind.pixels}",
            expected=f"the {kind.pixels} that the processor made with them",
            cause=f"the collator (or the Trainer's remove_unused_columns) dropped {kind.pixels}: the model reads the "
            "placeholder's own embedding there and raises nothing",
        )
        return
    if pixels is None:
        what = f"{len(grids)} grids"
    else:
        what = f"{kind.pixels} of {len(pixels):,} patches" + ("" if grids else f" and no {kind.grids}")
    findings.add(
        "pixels-missing",
        None,
        None,
        found=what,
        expected=f"{kind.pixels} and {kind.grids} together",
        cause="the collator handed on one of both: hand on all that the processor returns",
    )


def _pieces(known: Facts, kind: Kind, grids: Sequence[Grid]) -> Iterator[Piece]:
    for item, grid in enumerate(grids):
        if kind.noun == "video" and known.frames_apart:
            each = visual_tokens((1, *grid[1:]), known.merge)
            yield from (Piece(item, grid, each) for _ in range(grid[0]))
        else:
            yield Piece(item, grid, visual_tokens(grid, known.merge))


def _deal(found: Sequence[Run], sizes: Sequence[int], *, apart: bool) -> list[tuple[int, int]] | None:
    """Row and first token of the run of each size; None where sizes do not fill the runs in order (`apart`: singly)."""
    places: list[tuple[int, int]] = []
    for row, token, length in found:
        count = fitting(sizes[len(places) :], length)
        if not count or (apart and count > 1):
            return None
        places += [(row, token)] * count
    return places if len(places) == len(sizes) else None


@dataclass(frozen=True)
class _Mismatch:
    """Runs of placeholders that do not fit the grids, told apart by what usually makes them so."""

    view: View
    findings: Findings
    kind: Kind
    pieces: Sequence[Piece]
    found: Sequence[Run]

    def report(self) -> None:
        """Say of each run and of each image that has none what is wrong with it."""
        if not self.found:
            self._nowhere(range(len(self.pieces)))
            return
        if len(self.found) == len(self.pieces):
            pairs = list(zip(self.found, self.pieces, strict=True))
            for run, piece in pairs:
                if run[2] != piece.size:
                    self._say(run, piece)
            return
        self._aligned()

    def _aligned(self) -> None:
        """As many runs and images as fit each other in order are right; what is between them is not."""
        lengths, sizes = [run[2] for run in self.found], [piece.size for piece in self.pieces]
        matcher = SequenceMatcher(None, lengths, sizes, autojunk=False)
        for tag, first, last, begin, end in matcher.get_opcodes():
            if tag == "equal":
                continue
            both = min(last - first, end - begin)
            for run, piece in zip(self.found[first : first + both], self.pieces[begin : begin + both], strict=True):
                self._say(run, piece)
            for row, token, length in self.found[first + both : last]:
                self.findings.add(
                    "images-without-pixels",
                    row,
                    token,
                    found=f"{length} placeholders for which no grid is left",
                    expected=f"one grid in {self.kind.grids} for each {self.kind.noun} of the text",
                    cause="the text has more images than the processor was given, or the collator lost some: give both "
                    "the same list, image by image",
                )
            if end - begin > both:
                self._nowhere(range(begin + both, end))

    def _nowhere(self, numbers: range) -> None:
        """Images without placeholders: cut off with their row, or never written into the text."""
        cut = self._cut_rows()
        first = self.pieces[numbers[0]]
        if cut:
            row, token = cut[0]
            self.findings.add(
                "image-truncated",
                row,
                token,
                found=f"the row ends inside a turn, and {len(numbers)} {self.kind.noun}s have no placeholders",
                expected=f"the {first.size} placeholders of {self.kind.noun} {first.item} "
                f"(grid {show_grid(first.grid)})",
                cause="truncation (max_length, cutoff_len) cut the row and left its pixels: leave rows with images "
                "whole, or give the processor fewer pixels (max_pixels)",
            )
            return
        self.findings.add(
            "pixels-without-images",
            None,
            None,
            found=f"{len(numbers)} {self.kind.noun}s with pixels and without placeholders, the first of grid "
            f"{show_grid(first.grid)}",
            expected=f"{first.size} placeholders in the text of the row that it belongs to",
            cause="the text was made without its images (content as a string, a template of a text model), or images "
            "of another row were added",
        )

    def _cut_rows(self) -> list[tuple[int, int]]:
        """Rows that end inside a turn or begin with a placeholder, with their last token."""
        view, ended = self.view, {self.view.end, *self.view.reader.breaks}
        cut = []
        for row in range(view.rows):
            places = view.text[row].nonzero().flatten().tolist()
            if places and int(view.ids[row, places[-1]]) not in ended:
                cut.append((row, places[-1]))
        return cut

    def _say(self, run: Run, piece: Piece) -> None:
        row, token, length = run
        kind, cause = self._why(run, piece)
        self.findings.add(
            kind,
            row,
            token,
            found=f"{length} placeholders",
            expected=f"{piece.size}, which grid {show_grid(piece.grid)} of {self.kind.noun} {piece.item} makes",
            cause=cause,
        )

    def _why(self, run: Run, piece: Piece) -> tuple[str, str]:
        row, token, length = run
        places = self.view.text[row].nonzero().flatten().tolist()
        if length == 1 < piece.size:
            return (
                "images-not-expanded",
                "the text went through the tokenizer alone: the processor writes one placeholder for each visual "
                "token, so give it text and images together",
            )
        if length < piece.size and token + length - 1 == places[-1]:
            return (
                "image-truncated",
                "truncation (max_length, cutoff_len) ended the row inside of the image and left its pixels: leave rows "
                "with images whole, or give the processor fewer pixels (max_pixels)",
            )
        if length < piece.size and token == places[0]:
            return (
                "image-truncated",
                "truncation from the left (truncation_side) began the row inside of the image and left its pixels",
            )
        if length > piece.size and length == piece.size**2:
            return (
                "images-expanded-twice",
                "a text whose placeholders were expanded already went through the processor once more",
            )
        if self.view.known.frames_apart and self.kind.noun == "video":
            return (
                "placeholders-apart",
                "Qwen3-VL writes the frames of a video apart, each behind its time: was the text expanded by the "
                "processor of another family?",
            )
        merged = why_other(length, piece.grid, self.view.known.merge)
        return (
            "placeholders-apart",
            "the processor that counted placeholders is not the one that made the pixels, or images of the row are in "
            f"another order than its text{merged}",
        )
