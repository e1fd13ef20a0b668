"""Positions that are not those of the papers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import at_tokens, attribute, before
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.taps import positions_changed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    import torch

    from pytest_qvl.faults.case import Case
    from pytest_qvl.faults.tools import Change


def at_images(case: Case, change: Change) -> AbstractContextManager[None]:
    """Pass positions ``(3, rows, length)`` of every prompt with an image through ``change(positions, its places)``."""
    parts = anatomy(case.model)
    return at_tokens(parts, parts.image_token_id, positions_changed, change)


def _counted(positions: torch.Tensor) -> torch.Tensor:
    """Plain 1-D positions in place of ``(3, rows, length)`` ones."""
    import torch

    return torch.arange(positions.shape[-1], device=positions.device).expand_as(positions)


@fault(
    "type-ids-dropped",
    "A collator drops mm_token_type_ids: plain 1-D positions, and nothing raised.",
    target="batch",
    check="mrope_positions",
    expected_words=("plain 1-D positions", "no mm_token_type_ids", "pass on every key"),
    source="ModelTC/LightX2V#1416, NVIDIA-NeMo/Megatron-Bridge#3040",
    transformers=(5, 3),
    requires=("silence without type ids",),
)
def _type_ids(case: Case) -> Iterator[None]:
    case.collators.append(lambda batch, _: {k: v for k, v in batch.items() if k != "mm_token_type_ids"})
    yield


@fault(
    "one-dimensional-in-training",
    "The training forward counts 1-D positions; evaluation is right.",
    target="model",
    check="mrope_positions",
    expected_words=("plain 1-D positions",),
    source="huggingface/transformers#33487, linkedin/Liger-Kernel#276",
)
def _training_1d(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)

    def flat(positions: torch.Tensor) -> torch.Tensor:
        if not parts.base.training:
            return positions
        return _counted(positions)

    with positions_changed(parts, flat):
        yield


@fault(
    "axis-off-by-one",
    "Image tokens are one column too far to the right.",
    target="model",
    check="mrope_positions",
    expected_words=("(image 0, visual token 0): w is", "tokens in"),
    source="QwenLM/Qwen-VL#515",
)
def _axis(case: Case) -> Iterator[None]:
    def move(positions: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        positions[2][places] += 1
        return positions

    with at_images(case, move):
        yield


@fault(
    "height-and-width-exchanged",
    "Rows are counted as columns.",
    target="model",
    check="mrope_positions",
    expected_words=("visual token 1): h is",),
    source="vllm-project/vllm#45244",
)
def _exchanged(case: Case) -> Iterator[None]:
    with at_images(case, lambda positions, _: positions[[0, 2, 1]]):
        yield


@fault(
    "one-visual-token-misplaced",
    "One visual token of the batch is off by one on one axis; every logit stays within rounding.",
    target="model",
    check="mrope_positions",
    expected_words=("1 tokens in 1 of", "w is"),
)
def _one_token(case: Case) -> Iterator[None]:
    def move(positions: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        if places.any():
            row, token = places.nonzero()[-1].tolist()
            positions[2, row, token] += 1
        return positions

    with at_images(case, move):
        yield


@fault(
    "text-counts-visual-tokens",
    "Text goes on after the number of visual tokens, not after the largest id.",
    target="model",
    check="mrope_positions",
    expected_words=("(text): t is", "should be"),
    source="vllm-project/vllm#37055",
)
def _text_counts(case: Case) -> Iterator[None]:
    def move(positions: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        seen = places.long().cumsum(dim=1).masked_fill(places, 0)
        return positions + seen

    with at_images(case, move):
        yield


@fault(
    "padding-counted-while-decoding",
    "Decode steps of left-padded rows count the padding: first tokens right, the rest worse.",
    target="model",
    check="decode_positions",
    expected_words=("decode step 1", "padding tokens on the left", "should be"),
    source="huggingface/transformers#40136, #40154, #41180",
)
def _padding_counted(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    seen: dict[str, Any] = {}

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask")
        seen["padding"] = (mask == 0).sum(dim=1)[None, :, None] if mask is not None and mask.ndim == 2 else 0

    def counted(positions: torch.Tensor) -> torch.Tensor:
        return positions + seen.get("padding", 0) if positions.shape[-1] == 1 else positions

    with before([parts.core], note), positions_changed(parts, counted):
        yield


@fault(
    "one-axis-off-while-decoding",
    "New tokens are one column too far to the right; their logits stay within rounding.",
    target="model",
    check="decode_positions",
    expected_words=("decode step 1", "w is", "(+1)"),
    source="huggingface/transformers#41180",
)
def _decode_axis(case: Case) -> Iterator[None]:
    def move(positions: torch.Tensor) -> torch.Tensor:
        if positions.shape[-1] == 1:
            positions = positions.clone()
            positions[2] += 1
        return positions

    with positions_changed(anatomy(case.model), move):
        yield


@fault(
    "decoding-stands-still",
    "Decode steps ignore rope_deltas: new text is placed among the image's own positions.",
    target="model",
    check="decode_positions",
    expected_words=("decode step 1", "should be"),
    source="QwenLM/Qwen-VL#515",
)
def _stands_still(case: Case) -> Iterator[None]:
    def still(positions: torch.Tensor) -> torch.Tensor:
        return positions + 4 if positions.shape[-1] == 1 else positions

    with positions_changed(anatomy(case.model), still):
        yield


@fault(
    "rope-deltas-off-by-one",
    "The rope_deltas that are kept for later steps are one too large: who goes on from the cache skips a position.",
    target="model",
    check="decode_positions",
    expected_words=("rope_deltas of row 0 is", "should be", "from the cache without position ids"),
)
def _deltas_off(case: Case) -> Iterator[None]:
    core: Any = anatomy(case.model).core
    own = core.get_rope_index

    def off(*args: Any, **kwargs: Any) -> Any:
        positions, deltas = own(*args, **kwargs)
        return positions, deltas + 1

    with attribute(core, "get_rope_index", off):
        yield


@fault(
    "stale-rope-deltas",
    "A forward reuses the rope_deltas that an earlier call left in the model.",
    target="model",
    check="position_state",
    expected_words=("after generate() on", "should be"),
    source="huggingface/transformers#36009, #36013",
)
def _stale(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    seen: dict[str, Any] = {"last": 0}

    def reused(positions: torch.Tensor) -> torch.Tensor:
        if positions.shape[-1] == 1:
            return positions
        images = bool((positions != positions[:1]).any())
        stale, seen["last"] = seen["last"], images
        if images and stale == "text":
            return _counted(positions)
        seen["last"] = "images" if images else "text"
        return positions

    with positions_changed(parts, reused), attribute(parts.core, "rope_deltas", parts.core.rope_deltas):
        yield


@fault(
    "crash-after-another-batch-size",
    "A forward without images repeats the rope_deltas of the last generate() for a batch with fewer rows.",
    target="model",
    check="position_state",
    expected_words=(
        "forward on text only after generate() on images",
        "state left by an earlier call breaks a later one",
    ),
    source="huggingface/transformers#44873, #43952",
)
def _crash(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    seen: dict[str, Any] = {}

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        ids, images = kwargs.get("input_ids"), kwargs.get("image_grid_thw")
        text_prompt = ids is not None and ids.shape[1] > 1 and images is None
        seen["deltas"] = parts.core.rope_deltas if text_prompt else None

    def repeated(positions: torch.Tensor) -> torch.Tensor:
        """As Transformers 5.2 and 5.3 do: one row against the deltas of four leaves positions of no row at all."""
        deltas: torch.Tensor | None = seen.get("deltas")
        if deltas is None:
            return positions
        return positions + deltas.repeat_interleave(positions.shape[1] // len(deltas), dim=0).to(positions)

    with before([parts.core], note), positions_changed(parts, repeated):
        yield


@fault(
    "text-alone-decodes-on-one-axis",
    "After a prompt without any image, decode steps write the first of the three axes only: rows and columns stay 0.",
    target="model",
    check="generation_batch_invariance",
    expected_words=(
        "alone against batch: positions differ in 1 of ",
        "decode step 1: h is 0 alone and ",
        "depends on the rows beside it",
    ),
    source="vllm-project/vllm#18407, QwenLM/Qwen3-VL#1215",
)
def _text_alone(case: Case) -> Iterator[None]:
    import torch

    parts = anatomy(case.model)
    alone = [False]

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids")
        if ids is not None and ids.shape[1] > 1:  # a decode step goes on as its prompt began
            alone[0] = bool((ids != parts.image_token_id).all())

    def written(positions: torch.Tensor) -> torch.Tensor:
        if not alone[0] or positions.shape[-1] > 1:
            return positions
        return torch.cat([positions[:1], torch.zeros_like(positions[1:])])

    with before([parts.core], note), positions_changed(parts, written):
        yield


@fault(
    "positions-in-bfloat16",
    "Position ids are cast to bfloat16, which cannot count beyond 256: neighbours in a long row share a position.",
    target="model",
    check="decode_positions",
    expected_words=("rounded to bfloat16", "up to 256 only"),
    source="huggingface/transformers#29285, NVIDIA/Megatron-LM#531",
)
def _bfloat16(case: Case) -> Iterator[None]:
    import torch

    with positions_changed(anatomy(case.model), lambda positions: positions.to(torch.bfloat16)):
        yield


@fault(
    "rotary-base-wrong",
    "The rotary embedding's base is 1,000 times too large: right ids, wrong angles.",
    target="model",
    check="alignment",
    expected_words=("answers are right",),
)
def _rotary_base(case: Case) -> Iterator[None]:
    from pytest_qvl.faults.tools import values

    rotary = anatomy(case.model).language_backbone.rotary_emb
    count = len(rotary.inv_freq)

    def slower(frequencies: torch.Tensor) -> torch.Tensor:
        import torch

        return frequencies * 1000.0 ** (-torch.arange(count, device=frequencies.device) / count)

    with values(rotary.inv_freq, slower):
        yield
