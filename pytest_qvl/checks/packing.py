"""Several samples packed into a row: each computes what it computes alone, and none sees another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.isolation import observe, outputs_moved, repeatable
from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.mrope import VisionIds, mrope_oracle
from pytest_qvl.checks.support.not_finite import require_finite
from pytest_qvl.checks.support.own_rounding import HeldLogits, own_response
from pytest_qvl.checks.support.packing import is_packed, samples_in_rows
from pytest_qvl.checks.support.placeholders import attended, model_inputs, spans
from pytest_qvl.checks.support.position_comparison import PositionComparison
from pytest_qvl.checks.support.reference import Reference, floor_of
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.state import preserved
from pytest_qvl.models.taps import tapped
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from pytest_qvl.checks.support.noise_floor import NoiseFloor
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.taps import LanguageCall


@check(promise=10)
def packing_isolation(model: Any, batch: Mapping[str, Any], reference: Reference | NoiseFloor) -> Evidence:
    """Each sample of a packed row has the logits that it has alone, and changing one sample moves no other.

    Logits are compared where they predict a label (of a batch without labels, at the last token of each sample), and
    may differ by the limit of the noise floor (:meth:`pytest_qvl.checks.support.noise_floor.NoiseFloor.limit_for`):
    packed and alone, the kernels see other shapes. A sample that differs by more is held to its own rounding, alone and
    in this model (docs/limits.md#own-rounding). Alone, a sample has its own tokens and images, and the positions of the
    papers' definition; those of the packed row must be the same up to a constant, exactly. Then one token of text is
    changed in each sample in turn, and the outputs of all other samples must stay as they are, bitwise, since the
    shapes do. Two forward passes per sample, and three; 17 more for each sample beyond the noise floor.

    They are forwards without a key-value cache. With one, Transformers does not part samples by their positions, and
    ``Trainer`` has one where nothing is checkpointed, unless the batch has ``use_cache=False``: the guard sees that
    (docs/guard.md).

    Args:
        model: Qwen-VL model, wrapped or not.
        batch: A packed batch: ``position_ids`` start again at 0 where a sample begins (``(4, rows, length)``, the text
            positions first, and no ``attention_mask``): a collator's, or what
            :func:`pytest_qvl.checks.support.packing.pack` makes.
        reference: Whose noise floor judges; measured on a reference or base model in the dtype of ``model``.

    Raises:
        CheckFailed: Names the sample whose logits differ and by how much, the token whose position is wrong, or what a
            change moved.
        CannotJudge: No row holds several samples, or the model does not repeat itself bitwise.
        ValueError: The batch is malformed, or the floor was measured in another dtype.
    """
    import torch

    judge = Judge("packing_isolation", "packed samples compute what they compute alone")
    parts, inputs = anatomy(model), model_inputs(batch)
    floor = floor_of(parts, reference)
    if not is_packed(inputs):
        raise CannotJudge(
            "no row holds several samples, which position_ids that start again at 0 would say: hand over a packed batch"
        )
    pieces = _pieces(parts, inputs, batch.get("labels"))
    held = HeldLogits(floor)
    with preserved(model, training=False), torch.no_grad():
        before = repeatable(parts, inputs)
        with tapped(parts) as tap:
            logits = parts.wrapped(**inputs, use_cache=False).logits
        require_finite(parts, logits[attended(inputs)], "the model's logits", lambda: parts.wrapped(**inputs))
        for piece in pieces:
            alone = partial(_logits, parts, piece)
            own = alone()
            require_finite(parts, own, f"the logits of {piece} alone", alone)
            packed = logits[piece.row, piece.first + piece.columns]
            held.take(str(piece), packed, own, partial(own_response, parts, alone, tower=True))
        outputs = outputs_moved(parts, inputs)
        for piece in pieces:
            if piece.text is not None:
                outputs.add(f"changing {piece}", piece.row, piece.text, before, _changed(parts, inputs, piece))
    _judge_logits(judge, held)
    _judge_positions(judge, parts, inputs, pieces, tap.language)
    outputs.hold(judge)
    judge.report("samples", len(pieces))
    if "use_cache" not in batch:
        judge.note(
            "judged without a key-value cache, with which Transformers does not part samples by their positions: "
            "Trainer has one where nothing is checkpointed, unless the collator adds use_cache=False to the batch"
        )
    return judge.verdict()


@dataclass(frozen=True)
class _Piece:
    """One sample of a packed row.

    Attributes:
        row: Its row.
        number: Its number in the row.
        first: Its first token.
        inputs: What the model is given of it alone.
        columns: Places in the sample whose logits are compared, ``(columns,)`` int64.
        text: A token of the row that is text and can be changed, its first; None where there is none.
    """

    row: int
    number: int
    first: int
    inputs: dict[str, torch.Tensor]
    columns: torch.Tensor
    text: int | None

    def __str__(self) -> str:
        return f"sample {self.number} of row {self.row}"


def _pieces(parts: Parts, inputs: Mapping[str, Any], labels: torch.Tensor | None) -> list[_Piece]:
    """Every sample of the batch by itself."""
    import torch

    ids, numbers = inputs["input_ids"], samples_in_rows(inputs)
    mask, vision_ids = attended(inputs).cpu(), VisionIds(parts.image_token_id, parts.video_token_id)
    found = spans(parts, inputs) if inputs.get("pixel_values") is not None else []
    made = []
    for row in range(len(ids)):
        for number in range(int(numbers[row].max()) + 1):
            places = ((numbers[row] == number) & mask[row]).nonzero().flatten()
            first, stop = int(places[0]), int(places[-1]) + 1
            own = ids[row : row + 1, first:stop]
            alone = {"input_ids": own, "attention_mask": torch.ones_like(own)}
            images = [span for span in found if span.row == row and first <= span.start < stop]
            if images:
                alone |= _images(inputs, images[0].image, images[-1].image + 1)
            right = mrope_oracle(own, None, alone.get("image_grid_thw"), vision_ids, parts.merge_size)
            alone["position_ids"] = right.to(ids.device)
            vision = torch.isin(own[0], own.new_tensor(parts.vision_token_ids))
            plain = (~vision).nonzero().flatten().tolist()
            made.append(
                _Piece(
                    row,
                    number,
                    first,
                    alone,
                    _columns(labels, row, first, stop).to(ids.device),
                    first + plain[0] if plain else None,
                )
            )
    return made


def _images(inputs: Mapping[str, Any], first: int, stop: int) -> dict[str, torch.Tensor]:
    """Grids and pixels of some of a batch's images, one behind the other."""
    grids = inputs["image_grid_thw"]
    sizes = grids.prod(dim=1).cumsum(dim=0).tolist()
    begin = sizes[first - 1] if first else 0
    return {"image_grid_thw": grids[first:stop], "pixel_values": inputs["pixel_values"][begin : sizes[stop - 1]]}


def _columns(labels: torch.Tensor | None, row: int, first: int, stop: int) -> torch.Tensor:
    """Places within a sample that predict one of its labels; its last token where there are none."""
    import torch

    if labels is not None:
        predicted = (labels[row, first + 1 : stop] != IGNORED).nonzero().flatten()
        if len(predicted):
            return predicted
    return torch.tensor([stop - first - 1])


def _changed(parts: Parts, inputs: Mapping[str, Any], piece: _Piece) -> Any:
    """What the language backbone sees and puts out after one token of a sample became another one of its row."""
    ids = inputs["input_ids"].clone()
    assert piece.text is not None
    vision = {*parts.vision_token_ids}
    others = [
        token for token in ids[piece.row].tolist() if token not in vision and token != int(ids[piece.row, piece.text])
    ]
    ids[piece.row, piece.text] = others[0]
    return observe(parts, {**inputs, "input_ids": ids})


def _logits(parts: Parts, piece: _Piece) -> torch.Tensor:
    """The logits ``(columns, vocabulary)`` of a sample alone."""
    first = int(piece.columns.min())
    keep = piece.inputs["input_ids"].shape[1] - first
    logits: torch.Tensor = parts.wrapped(**piece.inputs, use_cache=False, logits_to_keep=keep).logits[0]
    return logits[piece.columns - first]


def _judge_logits(judge: Judge, held: HeldLogits) -> None:
    judge.at_most(
        "packed against alone",
        held.difference,
        held.limit,
        unit="logit",
        else_say=f"{held.name} has other logits than alone, by up to {held.difference:.4g}: samples of a packed row "
        "see each other, or have another sample's positions; is the row parted where attention looks for it (text "
        "positions first, block-diagonal mask, cu_seq_lens)?",
    )
    judge.report("logits compared at places", held.places)
    judge.report("samples beyond the noise floor, held to their own rounding", held.beyond)


def _judge_positions(
    judge: Judge, parts: Parts, inputs: Mapping[str, Any], pieces: Sequence[_Piece], calls: Sequence[LanguageCall]
) -> None:
    """Every sample has the positions that it has alone, up to a constant; these are integers, so no limit hides any."""
    import torch

    if not calls:
        judge.note("positions were not compared: the model bypasses its language backbone's rotary embedding")
        return
    right = torch.zeros(3, *inputs["input_ids"].shape, dtype=torch.int64)
    for piece in pieces:
        own = piece.inputs["position_ids"][:, 0].cpu()
        right[:, piece.row, piece.first : piece.first + own.shape[1]] = own
    PositionComparison(judge, parts, inputs).hold(calls, [right])
