"""Position ids that a model used against the right ones, and where they first differ."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.packing import samples_in_rows
from pytest_qvl.checks.support.placeholders import attended, describe, spans
from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import Judge
from pytest_qvl.models.quantized import dtype_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.taps import LanguageCall

AXES = ("t", "h", "w")


@dataclass
class PositionComparison:
    """Seen against expected positions of the calls of one forward or one ``generate()``.

    Attributes:
        judge: Takes the figures and the problems.
        parts: The model.
        inputs: What the model was given.
        sequence: What happened before, in words with a colon; or empty.
    """

    judge: Judge
    parts: Parts
    inputs: Mapping[str, Any]
    sequence: str = ""

    def hold(self, calls: Sequence[LanguageCall], expected: Sequence[torch.Tensor]) -> bool:
        """Compare the ids ``(3, rows, length)`` of the prompt, padding left out, then of each decode step.

        Returns:
            Whether they could be compared: as many forward passes as expected, each with ids for its rows and tokens.
        """
        import torch

        mask = attended(self.inputs).cpu()
        if not self._right_sizes(calls, expected):
            return False
        # A release may leave the rows of a text-only batch to broadcasting.
        seen = [_exact(call.position_ids.cpu()).expand_as(right) for call, right in zip(calls, expected, strict=True)]
        difference = seen[0] - expected[0]
        shift = self._shifts(difference, mask)[None]
        wrong = (difference != shift) & mask[None]
        self.judge.equal(
            f"{self.sequence}wrong position ids",
            int(wrong.sum()),
            0,
            else_say=self._prompt_sentence(seen[0] - shift, expected[0], wrong)
            + _rounding(seen[0][:, mask], (expected[0] + shift)[:, mask])
            if wrong.any()
            else "",
        )
        if len(calls) > 1:
            constant = shift.amax(dim=2, keepdim=True)
            raw, right = torch.cat(seen[1:], dim=2), torch.cat([*expected[1:]], dim=2)
            steps = raw - constant
            self.judge.equal(
                f"{self.sequence}wrong position ids while decoding",
                int((steps != right).sum()),
                0,
                else_say=self._decode_sentence(steps, right) + _rounding(raw, right + constant)
                if (steps != right).any()
                else "",
            )
        return True

    def _right_sizes(self, calls: Sequence[LanguageCall], expected: Sequence[torch.Tensor]) -> bool:
        if not self.judge.equal(
            f"{self.sequence}forward passes",
            len(calls),
            len(expected),
            else_say=f"{self.sequence}the language backbone ran {len(calls)} times, should be {len(expected)}",
        ):
            return False
        for number, (call, right) in enumerate(zip(calls, expected, strict=True)):
            seen = tuple(call.position_ids.shape)
            if not _broadcasts(seen, tuple(right.shape)):
                where = f"decode step {number}" if number else "prompt"
                self.judge.problem(
                    f"{self.sequence}{where}: the rotary embedding gets position ids of shape {seen}, should be "
                    f"{tuple(right.shape)}: they are not made from this batch"
                )
                return False
        return True

    def _shifts(self, difference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The constant ``(rows, length)`` by which each row, or each sample of a packed row, is shifted."""
        numbers = samples_in_rows(self.inputs)
        shift = difference.new_zeros(mask.shape)
        for row in range(len(mask)):
            for number in range(int(numbers[row].max()) + 1):
                own = mask[row] & (numbers[row] == number)
                if bool(own.any()):
                    shift[row][numbers[row] == number] = _constant_shift(difference[:, row, own])
        return shift

    def _prompt_sentence(self, seen: torch.Tensor, expected: torch.Tensor, wrong: torch.Tensor) -> str:
        row, token = wrong.any(0).nonzero()[0].tolist()
        axis = int(wrong[:, row, token].nonzero()[0])
        pictured = "pixel_values" in self.inputs or "pixel_values_videos" in self.inputs
        found = spans(self.parts, self.inputs) if pictured else []
        sentence = (
            f"{self.sequence}{describe(found, row, token)}: {AXES[axis]} is {int(seen[axis, row, token])}, "
            f"should be {int(expected[axis, row, token])}; {int(wrong.any(0).sum())} tokens in "
            f"{int(wrong.any(0).any(1).sum())} of {wrong.shape[1]} rows are wrong"
        )
        if found and bool((seen[:1] == seen)[:, attended(self.inputs).cpu()].all()):
            given = self.inputs.get("position_ids")
            if given is not None:
                return (
                    f"{sentence}; all three axes are equal everywhere: the batch has plain 1-D positions of its own "
                    f"(position_ids of {tuple(given.shape)}), and the model takes them as they are"
                )
            sentence += "; all three axes are equal everywhere: the model fell back to plain 1-D positions"
            if "mm_token_type_ids" not in self.inputs and _takes_type_ids(self.parts):
                sentence += (
                    ". The batch has no mm_token_type_ids, which Transformers >= 5.3 needs and misses in "
                    "silence: pass on every key that the processor returns"
                )
        return sentence

    def _decode_sentence(self, seen: torch.Tensor, expected: torch.Tensor) -> str:
        step, row = (seen != expected).any(0).T.nonzero()[0].tolist()
        axis = int((seen != expected)[:, row, step].nonzero()[0])
        is_, right = int(seen[axis, row, step]), int(expected[axis, row, step])
        mask = attended(self.inputs)[row]
        side = "right" if not bool(mask[-1]) else "left"
        padding = int((~mask).sum())
        sentence = (
            f"{self.sequence}decode step {step + 1}, row {row} ({padding} padding tokens on the {side}): "
            f"{AXES[axis]} is {is_}, should be {right} ({is_ - right:+d}); "
            f"{int((seen != expected).any(0).any(1).sum())} of {seen.shape[1]} rows are wrong"
        )
        return f"{sentence}; generate() needs padding on the left" if side == "right" else sentence


@dataclass
class AloneAgainstBatch:
    """Position ids of samples alone against those that they have in a batch, at each token and decode step.

    They are integers, so no limit hides any; one constant per sample is allowed.

    Attributes:
        samples: How many were compared.
        wrong: How many ids differ.
        first: The first that does, in words.
        off: Of how many samples some do.
        unseen: Samples whose ids could not be compared: the rotary embedding was not called, or with others.
    """

    samples: int = 0
    wrong: int = 0
    first: str = ""
    off: int = 0
    unseen: list[str] = field(default_factory=list)

    def take(self, name: str, tokens: int, batch: torch.Tensor | None, alone: torch.Tensor | None) -> None:
        """Compare the ids of one sample, see :func:`ids_of_row`; what goes on further than the other is not compared.

        Args:
            name: What to call the sample.
            tokens: Of its prompt.
            batch: Its ids in the batch, ``(3, tokens + steps)``.
            alone: Ditto alone.
        """
        if batch is None or alone is None:
            self.unseen.append(name)
            return
        length = min(batch.shape[1], alone.shape[1])
        difference = batch[:, :length] - alone[:, :length]
        shift = _constant_shift(difference)
        self.samples += 1
        differ = difference != shift
        self.wrong += int(differ.sum())
        self.off += bool(differ.any())
        if bool(differ.any()) and not self.first:
            place = int(differ.any(dim=0).nonzero()[0])
            axis = int(differ[:, place].nonzero()[0])
            where = f"token {place}" if place < tokens else f"decode step {place - tokens + 1}"
            self.first = (
                f"{name}, {where}: {AXES[axis]} is {int(alone[axis, place])} alone and "
                f"{int(batch[axis, place]) - shift} in the batch"
            )

    def judge(self, judge: Judge, what: str, hint: str) -> None:
        """Hold every id of every sample to be the same in both."""
        if self.samples:
            judge.equal(
                f"{what}: position ids that differ",
                self.wrong,
                0,
                else_say=f"{what}: positions differ in {self.off} of {self.samples} samples: {self.first}; {hint}",
            )
        if self.unseen:
            judge.note(
                f"positions of {some(self.unseen)} were not compared: the model bypasses its language "
                "backbone's rotary embedding, or does not generate token by token"
            )


def ids_of_row(calls: Sequence[LanguageCall], mask: torch.Tensor, row: int) -> torch.Tensor | None:
    """Position ids ``(3, tokens + steps)`` of a row in one ``generate()``; None where its calls are others.

    Args:
        calls: Those of the language backbone: the prompt, then a token at a time.
        mask: ``(rows, length)`` bool of the prompt, False on padding.
        row: The row.
    """
    import torch

    made = []
    for number, call in enumerate(calls):
        shape = (len(AXES), len(mask), 1 if number else mask.shape[1])
        ids = _exact(call.position_ids.cpu())
        if not _broadcasts(tuple(ids.shape), shape):
            return None
        own = ids.expand(shape)[:, row]
        made.append(own if number else own[:, mask[row]])
    return torch.cat(made, dim=1) if made else None


def _exact(positions: torch.Tensor) -> torch.Tensor:
    """Ids in a dtype in which arithmetic is exact: one with bfloat16 would round the ids that it is held against."""
    return positions.double() if positions.is_floating_point() else positions.long()


def _rounding(seen: torch.Tensor, right: torch.Tensor) -> str:
    """Words for ids that are the right ones in a float dtype too narrow for them; empty for any others.

    A dtype of ``p`` significant bits holds every whole number up to ``2**p``, and ``eps`` is ``2**(1 - p)``.
    """
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(right.to(dtype).to(seen.dtype), seen):
            most = round(2 / torch.finfo(dtype).eps)
            return (
                f"; every id is the right one rounded to {dtype_name(dtype)}, which counts without gaps up to {most} "
                "only: keep position ids integers, or in float32"
            )
    return ""


def _takes_type_ids(parts: Parts) -> bool:
    """Whether this release lays positions out by ``mm_token_type_ids``."""
    return "mm_token_type_ids" in inspect.signature(type(parts.base).forward).parameters


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of ``shape`` can be expanded to the shape ``to``."""
    return len(shape) <= len(to) and all(
        have in (1, wanted) for have, wanted in zip(reversed(shape), reversed(to), strict=False)
    )


def _constant_shift(difference: torch.Tensor) -> int:
    """The shift of a row ``(3, tokens)``: its first token's, since an error further on moves all after it.

    Where the first token's axes disagree one of them is wrong, and the commonest difference of the row
    counts.
    """
    first = difference[:, 0].tolist()
    return int(first[0]) if len({*first}) == 1 else int(difference.flatten().mode().values)
