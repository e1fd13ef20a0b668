"""What a change of one visual token or of one image moves, and what it must leave alone.

Two forward passes are compared bitwise. The pair has the same shapes throughout, hence the same kernels
(4-bit matrix products choose theirs by the number of rows), and neither matrix products nor normalisation mix
tokens. Attention mixes those it may: a masked score becomes ``exp(-inf) = 0``, which adds an exact 0 whatever
the masked value is, and can neither become a row's maximum nor enter its sum, in one pass or tile by tile
(the math, flash, memory-efficient and cuDNN kernels of PyTorch). Splits of the reduction depend on shapes
alone. So a token that cannot see a change keeps every bit (run on CPUs, sdpa and eager, in all three dtypes;
on CUDA it follows from the above). Tokens of padding may see anything and are not compared. Where a model
does not even repeat itself, :class:`CannotJudge` is raised instead.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.bitwise import differs
from pytest_qvl.checks.support.not_finite import require_finite
from pytest_qvl.checks.support.packing import is_packed, samples_in_rows
from pytest_qvl.checks.support.placeholders import attended, describe, describe_visual, model_inputs, spans
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.state import preserved
from pytest_qvl.models.taps import features_replaced, tapped
from pytest_qvl.samples import make_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from pytest_qvl.checks.support.placeholders import Span
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.samples import Sample
    from pytest_qvl.samples.batch import PaddingSide


@check(promise=5)
def causality(model: Any, batch: Mapping[str, Any], *, probes: int = 3) -> Evidence:
    """Changing one visual token moves its own placeholder's embedding, and no output before or in other rows.

    For ``probes`` visual tokens spread over the batch, one at a time: the token is negated where it leaves
    the vision tower, and the language backbone's inputs and outputs are compared bitwise with those of the
    unchanged batch. Outputs are the hidden states that the head turns into logits, position by position:
    where they are equal so are the logits, at a fraction of the memory. Where several samples are packed into a
    row (:func:`pytest_qvl.checks.support.packing.samples_in_rows`) the change must stay in its own. ``probes`` + 2
    forward passes.

    Args:
        model: Qwen-VL model, wrapped or not.
        batch: What the processor returned, any padding side, rows without an image allowed.
        probes: How many visual tokens to change, at least 1; the first and the last are among them from 2 on.

    Raises:
        CheckFailed: Names the changed visual token, and the token that moved although it cannot see it.
        CannotJudge: No image in the batch, or the model does not repeat itself bitwise.
        ValueError: The batch is malformed, or ``probes`` below 1.
    """
    import torch

    if probes < 1:
        raise InputError(f"probes must be at least 1, got {probes}")
    judge = Judge("causality", "one visual token moves its own placeholder and nothing before it")
    parts, inputs = anatomy(model), model_inputs(batch)
    found = spans(parts, inputs)
    mask = attended(inputs)
    places = (inputs["input_ids"] == parts.image_token_id).nonzero().tolist()
    chosen = sorted({round(n * (len(places) - 1) / max(1, probes - 1)) for n in range(probes)})
    embedding, outputs = _Tally(), outputs_moved(parts, inputs)
    with preserved(model, training=False), torch.no_grad():
        before = repeatable(parts, inputs)
        for visual in chosen:
            row, token = places[visual]
            after = observe(parts, inputs, _negated(visual))
            what = f"changing {describe_visual(found, visual)}"
            own = torch.zeros_like(mask)
            own[row, token] = True
            embedding.add(what, found, differs(before.embeddings, after.embeddings) != own)
            outputs.add(what, row, token, before, after)
    embedding.hold(judge, "embeddings moved wrongly", "it must move the embedding at its own placeholder only")
    outputs.hold(judge)
    judge.report("visual tokens changed", len(chosen))
    return judge.verdict()


@check(promise=5)
def image_isolation(
    model: Any, processor: Any, samples: Sequence[Sample], *, padding_side: PaddingSide = "left"
) -> Evidence:
    """Changing one image moves no other image's visual tokens, no other row, nothing earlier in its row.

    Each image in turn is replaced by its negative (same size, hence the same shapes) and goes through
    processor, vision tower and language backbone; everything is compared bitwise with the unchanged samples.
    One forward pass per image, and two more.

    Args:
        model: Qwen-VL model, wrapped or not.
        processor: Its processor.
        samples: At least two, at least one with an image; text-only ones and several images per sample
            belong in.
        padding_side: Where rows are padded.

    Raises:
        CheckFailed: Names the changed image, and what moved although it cannot see it.
        CannotJudge: Fewer than two rows, no image, or the model does not repeat itself bitwise.
        ValueError: The processor makes a malformed batch.
    """
    import torch

    judge = Judge("image_isolation", "one image moves no other image, row or earlier position")
    parts = anatomy(model)
    if len(samples) < 2 or not any(sample.images for sample in samples):
        raise CannotJudge("isolation needs two samples or more, at least one of them with an image")

    def batch_of(given: Sequence[Sample]) -> dict[str, Any]:
        return make_batch(processor, given, padding_side=padding_side, device=parts.device)

    inputs = batch_of(samples)
    found, mask = spans(parts, inputs), attended(inputs)
    pixels, embeddings, outputs = _Tally(), _Tally(), outputs_moved(parts, inputs)
    with preserved(model, training=False), torch.no_grad():
        before = repeatable(parts, inputs)
        for span in found:
            changed = batch_of(_with_negative(samples, span.row, span.in_row))
            what = f"changing {span} (sample {samples[span.row].id!r})"
            after = observe(parts, changed)
            others = torch.ones_like(mask)
            others[span.row, span.start : span.stop] = False
            patches = differs(inputs["pixel_values"], changed["pixel_values"])
            pixels.add(what, found, _at_placeholders(parts, inputs, patches) & others)
            embeddings.add(what, found, differs(before.embeddings, after.embeddings) & others)
            outputs.add(what, span.row, span.start, before, after)
    pixels.hold(judge, "other images' patches moved", "it must leave other images' pixels alone")
    embeddings.hold(
        judge,
        "other embeddings moved",
        "it must move its own visual tokens only; does vision attention mix images?",
    )
    outputs.hold(judge)
    judge.report("images changed", len(found))
    return judge.verdict()


@dataclass(frozen=True)
class _Seen:
    """What the language backbone received and put out: both ``(rows, length, hidden)``."""

    embeddings: torch.Tensor
    hidden: torch.Tensor


def observe(
    parts: Parts, inputs: Mapping[str, Any], change: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> _Seen:
    """What the language backbone receives and puts out in one forward pass, with changed visual tokens or as it is."""
    outputs: list[torch.Tensor] = []

    def after_language(_module: Any, _args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0].detach())

    handle = parts.language_backbone.register_forward_hook(after_language)
    try:
        with features_replaced(parts, change) if change else nullcontext(), tapped(parts) as tap:
            # Packed rows are for training: with a cache Transformers does not look for them.
            parts.wrapped(**inputs, logits_to_keep=1, **({"use_cache": False} if is_packed(inputs) else {}))
    finally:
        handle.remove()
    return _Seen(tap.language[0].inputs_embeds, outputs[0])


def repeatable(parts: Parts, inputs: Mapping[str, Any]) -> _Seen:
    """What two equal forward passes see; the comparison with a third means something only if they agree."""
    first, second = observe(parts, inputs), observe(parts, inputs)
    require_finite(parts, first.hidden[attended(inputs)], "the model's outputs", lambda: observe(parts, inputs))
    if bool((differs(first.hidden, second.hidden) & attended(inputs)).any()):
        raise CannotJudge("the same forward pass twice differs bitwise: what moved cannot be told from noise")
    return second


def outputs_moved(parts: Parts, inputs: Mapping[str, Any]) -> Outputs:
    """Collects what changes of a batch move that they must not, text alone in it or images too."""
    found = spans(parts, inputs) if inputs.get("pixel_values") is not None else []
    mask = attended(inputs)
    return Outputs(found, mask, samples_in_rows(inputs).to(mask.device))


def _negated(visual: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(features: torch.Tensor) -> torch.Tensor:
        changed = features.clone()
        changed[visual] = -changed[visual]
        return changed

    return change


@dataclass
class _Tally:
    """Tokens that moved, over several changes, with the place of the first one."""

    count: int = 0
    first: str = ""

    def add(self, what: str, found: Sequence[Span], moved: torch.Tensor) -> None:
        """Count the tokens of ``moved`` ``(rows, length)`` bool after the change ``what``."""
        places = moved.nonzero().tolist()
        if places and not self.count:
            self.first = f"{what} moved {describe(found, *places[0])}"
        self.count += len(places)

    def hold(self, judge: Judge, name: str, promise: str) -> None:
        """Judge that no token moved; `promise` ends the sentence otherwise."""
        judge.equal(name, self.count, 0, else_say=f"{self.first}: {promise}")


class Outputs:
    """What the outputs ``(rows, length, hidden)`` of the language backbone may do when an input changes."""

    def __init__(self, found: Sequence[Span], mask: torch.Tensor, packed: torch.Tensor) -> None:
        self.found, self.mask, self.packed = found, mask, packed
        self.earlier, self.elsewhere, self.neighbours = _Tally(), _Tally(), _Tally()
        self.unread: list[str] = []

    def add(self, what: str, row: int, start: int, before: _Seen, after: _Seen) -> None:
        """Judge the change ``what``, which begins at token ``start`` of ``row``."""
        import torch

        moved = differs(before.hidden, after.hidden) & self.mask
        if not moved[row, start:].any():
            self.unread.append(what)
        same_row = torch.zeros_like(moved)
        same_row[row] = True
        self.elsewhere.add(what, self.found, moved & ~same_row)
        self.neighbours.add(what, self.found, moved & same_row & (self.packed > self.packed[row, start]))
        moved[:, start:] = False
        self.earlier.add(what, self.found, moved & same_row)

    def hold(self, judge: Judge) -> None:
        """Judge that nothing moved outside of what each change may move, and that each moved something there."""
        self.earlier.hold(judge, "earlier outputs moved", "it must move no output before it; is attention causal?")
        self.elsewhere.hold(judge, "outputs of other rows moved", "it must move no output of another row")
        if bool(self.packed.any()):
            self.neighbours.hold(
                judge,
                "outputs of other samples in the row moved",
                "it must move no output of another sample that is packed into its row; Transformers keeps them apart "
                "where position_ids are (4, rows, length), the text positions first, with use_cache=False and without "
                "an attention_mask",
            )
        judge.equal(
            "changes without effect",
            len(self.unread),
            0,
            else_say=f"{' and '.join(self.unread[:3])} moves no output",
        )


def _at_placeholders(parts: Parts, inputs: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
    """The placeholders ``(rows, length)`` whose patches are among ``patches`` ``(patches,)``, both bool."""
    places = inputs["input_ids"] == parts.image_token_id
    marked: torch.Tensor = places.masked_scatter(places, patches.reshape(-1, parts.merge_size**2).any(dim=1))
    return marked


def _with_negative(samples: Sequence[Sample], row: int, number: int) -> list[Sample]:
    from PIL import ImageOps

    images = list(samples[row].images)
    images[number] = ImageOps.invert(images[number].convert("RGB"))
    changed = list(samples)
    changed[row] = replace(samples[row], images=tuple(images))
    return changed
