"""Numbers in memory, or in the checkpoint, that are not those of the model: nothing raises, answers get worse."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.definitions.disk import changed_checkpoint, loaded_from_changed, rolled_head
from pytest_qvl.faults.tools import all_of, load_again, values
from pytest_qvl.models.adapters import base_modules
from pytest_qvl.models.anatomy import anatomy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import torch

    from pytest_qvl.faults.case import Case

LAYER = "model.language_model.layers.1.mlp.up_proj"
_WRITTEN = f"{LAYER}.weight: its "
_BLOCKS = 4096  # block statistics among which one is looked for that can be changed


def quantized_weight(case: Case) -> Any:
    """The packed 4-bit weight of one language linear, ``(bytes, 1)`` uint8; its state is ``.quant_state``."""
    weight: Any = base_modules(anatomy(case.model))[LAYER].weight
    return weight


def exchange_codes(code: torch.Tensor) -> torch.Tensor:
    """Two entries of an NF4 code book, ``(16,)`` float32, change places."""
    code[[3, 12]] = code[[12, 3]]
    return code


@fault(
    "code-book-exchanged",
    "Two entries of a layer's NF4 code book changed places: kernels for the CPU do not read it, those of a GPU do.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}code book differs in 2 of 16 elements, first at [3]",),
)
def _code_book(case: Case) -> Iterator[None]:
    with values(quantized_weight(case).quant_state.code, exchange_codes):
        yield


@contextmanager
def block_times(case: Case, factor: float) -> Iterator[None]:
    """Scale the absmax of the first block whose nearest code is another one then."""
    import torch

    state = quantized_weight(case).quant_state
    codes, book = state.absmax[:_BLOCKS].long(), state.state2.code
    size = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(codes)]
    wanted = factor * (book[codes] * size + state.offset)
    nearest = ((wanted - state.offset) / size)[:, None].sub(book[None]).abs().argmin(dim=1)
    block = int((nearest != codes).nonzero()[0])

    def change(absmax: torch.Tensor) -> torch.Tensor:
        absmax[block] = nearest[block].to(torch.uint8)
        return absmax

    with values(state.absmax, change):
        yield


@fault(
    "absmax-of-one-block-zero",
    "The scale of one block of 64 weights is zero, and so are they.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}absmax differs in 1 of",),
)
def _block_zero(case: Case) -> Iterator[None]:
    with block_times(case, 0.0):
        yield


@fault(
    "absmax-of-one-block-halved",
    "The scale of one block of 64 weights is half of what it should be.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}absmax differs in 1 of",),
)
def _block_halved(case: Case) -> Iterator[None]:
    with block_times(case, 0.5):
        yield


@fault(
    "absmax-of-one-block-2-percent-off",
    "The scale of one block of 64 weights is 2 % too large.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}absmax differs in 1 of",),
)
def _block_two_percent(case: Case) -> Iterator[None]:
    with block_times(case, 1.02):
        yield


@fault(
    "nested-absmax-2-percent-off",
    "The scale that double quantization keeps for 256 block scales is 2 % too large.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}nested absmax differs in 1 of",),
)
def _nested(case: Case) -> Iterator[None]:
    with nested_block(case, lambda absmax: 1.02 * absmax):
        yield


def nested_block(case: Case, change: Callable[[torch.Tensor], torch.Tensor]) -> AbstractContextManager[None]:
    """Change the scale that double quantization keeps for the first 256 block scales, a float32 scalar."""

    def first(absmax: torch.Tensor) -> torch.Tensor:
        absmax[0] = change(absmax[0])
        return absmax

    return values(quantized_weight(case).quant_state.state2.absmax, first)


@fault(
    "offset-of-double-quantization-lost",
    "A layer lost the offset of its double quantization: every weight is too small.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{LAYER}.weight: the offset of its double quantization is 0 instead of",),
)
def _offset(case: Case) -> Iterator[None]:
    with offset(case, lambda offset: offset * 0):
        yield


def offset(case: Case, change: Callable[[torch.Tensor], torch.Tensor]) -> AbstractContextManager[None]:
    """Change the offset of one layer's double quantization, a float32 scalar."""
    return values(quantized_weight(case).quant_state.offset, change)


@fault(
    "half-of-the-packed-weights-zero",
    "The second half of a layer's packed bytes is zero, as after a copy that broke off.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}packed data differs in", "its values were lost after they were loaded"),
)
def _half_packed(case: Case) -> Iterator[None]:
    with packed_zero(case, quantized_weight(case).numel() // 2):
        yield


def packed_zero(case: Case, count: int) -> AbstractContextManager[None]:
    """Zero the last so many of a layer's packed bytes; those behind the last that is not zero do not count."""

    def cut(packed: torch.Tensor) -> torch.Tensor:
        flat = packed.view(-1)
        end = int(flat[-_BLOCKS:].nonzero()[-1]) + max(0, len(flat) - _BLOCKS) + 1
        flat[max(0, end - count) : end] = 0
        return packed

    return values(quantized_weight(case), cut)


@fault(
    "biases-of-q-and-v-lost",
    "The biases of all query and value projections are zero.",
    target="model",
    check="weights_as_stored",
    expected_words=("self_attn.q_proj.bias: differs in", "is zero in memory: its values were lost"),
    requires=("biases of q, k and v",),
)
def _biases(case: Case) -> Iterator[None]:
    with biases_of_q_and_v(case, lambda bias: bias * 0):
        yield


def biases_of_q_and_v(case: Case, change: Callable[[torch.Tensor], torch.Tensor]) -> AbstractContextManager[None]:
    """Change the biases of all query and value projections."""
    modules = base_modules(anatomy(case.model))
    found: list[Any] = [m.bias for n, m in modules.items() if n.endswith((".q_proj", ".v_proj")) and m.bias is not None]
    return all_of([values(bias, change) for bias in found])


@fault(
    "vision-bias-dropped",
    "The bias of one vision block's attention output is not there: the checkpoint has one, the module does not.",
    target="model",
    check="weights_as_stored",
    expected_words=("blocks.1.attn.proj.bias", "that the model has no place for"),
)
def _vision_bias(case: Case) -> Iterator[None]:
    projection: Any = anatomy(case.model).blocks[1].attn.proj  # type: ignore[union-attr]
    bias = projection.bias
    projection.bias = None
    try:
        yield
    finally:
        projection.bias = bias


@fault(
    "one-vision-weight-one-step-off",
    "One weight of the tower has another last bit: the smallest change that there is.",
    target="model",
    check="weights_as_stored",
    expected_words=("blocks.1.attn.proj.weight: differs in 1 of", "first at [0, 0]"),
)
def _one_bit(case: Case) -> Iterator[None]:
    def first(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 0] = one_step(weight[0, 0])
        return weight

    projection: Any = anatomy(case.model).blocks[1].attn.proj  # type: ignore[union-attr]
    with values(projection.weight, first):
        yield


def one_step(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, of 16 or 32 bits each, with another last bit."""
    import torch

    bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])
    return (bits ^ 1).view(tensor.dtype)


@fault(
    "language-layers-exchanged",
    "The first two language layers run in the wrong order.",
    target="model",
    check="weights_as_stored",
    expected_words=("holds the values of model.language_model.layers.1.", "two layers changed places"),
)
def _exchanged(case: Case) -> Iterator[None]:
    layers = anatomy(case.model).language_backbone.layers
    layers[0], layers[1] = layers[1], layers[0]
    try:
        yield
    finally:
        layers[0], layers[1] = layers[1], layers[0]


@fault(
    "vision-blocks-exchanged",
    "Two vision blocks of the same kind run in the wrong order.",
    target="model",
    check="weights_as_stored",
    expected_words=("holds the values of model.visual.blocks.2.", "two layers changed places"),
)
def _blocks_exchanged(case: Case) -> Iterator[None]:
    blocks = anatomy(case.model).blocks
    blocks[0], blocks[2] = blocks[2], blocks[0]
    try:
        yield
    finally:
        blocks[0], blocks[2] = blocks[2], blocks[0]


def blocks_mixed(case: Case, share: float) -> AbstractContextManager[None]:
    """Move every weight of two vision blocks towards the other's by a share of the way; by 1 they are exchanged."""
    blocks = anatomy(case.model).blocks
    first, second = list(blocks[0].parameters()), list(blocks[2].parameters())
    changes = []
    for own, other in (*zip(first, second, strict=True), *zip(second, first, strict=True)):
        towards = other.detach().clone()
        changes.append(values(own, partial(_between, share=share, other=towards)))
    return all_of(changes)


def _between(own: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    return own.lerp(other, share)


@fault(
    "head-rows-moved-by-one",
    "The rows of the head are moved by one: each token's logit is its neighbour's.",
    target="model",
    check="weights_as_stored",
    expected_words=("lm_head.weight: differs in", "rows were moved by one"),
    requires=("untied head",),
)
def _head(case: Case) -> Iterator[None]:
    head: Any = base_modules(anatomy(case.model))["lm_head"]
    with values(head.weight, lambda weight: weight.roll(1, 0)):
        yield


def _drawn_anew(case: Case, part: str) -> Iterator[None]:
    """Load a checkpoint in which a part has the values that Transformers initialises it with."""
    import torch

    def draw(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        made = {}
        for name, tensor in tensors.items():
            if part not in name:
                continue
            new = torch.full(tensor.shape, float(not name.endswith("bias")))
            if tensor.ndim > 1:
                new = torch.randn(tensor.shape, generator=generator) * 0.02
            made[name] = new.to(tensor.dtype)
        return {**tensors, **made}

    with loaded_from_changed(case, draw):
        yield


@fault(
    "checkpoint-with-a-random-tower",
    "Every tensor of the checkpoint's vision tower is there, and has the values of a fresh initialisation.",
    target="load",
    check="weights_as_stored",
    expected_words=("have weights as they were drawn", "model.visual.blocks.0", "initialised anew"),
    requires=("knowledge", "checkpoint file"),
)
def _random_tower(case: Case) -> Iterator[None]:
    yield from _drawn_anew(case, "visual.")


@fault(
    "checkpoint-with-a-random-vision-block",
    "One block of the checkpoint's vision tower has the values of a fresh initialisation.",
    target="load",
    check="weights_as_stored",
    expected_words=("layers have weights as they were drawn (model.visual.blocks.2)", "initialised anew"),
    requires=("knowledge", "checkpoint file"),
)
def _random_block(case: Case) -> Iterator[None]:
    yield from _drawn_anew(case, "blocks.2.")


@fault(
    "loaded-from-another-checkpoint",
    "The model was loaded from another folder than the one that is meant: the rows of its head are moved by one.",
    target="load",
    check="weights_as_stored",
    expected_words=("lm_head.weight: differs in", "rows were moved by one"),
    requires=("checkpoint file", "untied head"),
)
def _other_checkpoint(case: Case) -> Iterator[None]:
    with loaded_from_changed(case, rolled_head):
        case.checkpoint = Path(case.subject.source.location)
        yield


@fault(
    "cached-checkpoint-altered",
    "A file in the hub's cache is not the one that was published: the rows of its head are moved by one.",
    target="load",
    check="weights_as_stored",
    expected_words=("was altered: its SHA-256 is", "under which it was published"),
    requires=("checkpoint file", "untied head"),
)
def _altered(case: Case) -> Iterator[None]:
    import hashlib

    published = (Path(case.subject.source.location) / "model.safetensors").read_bytes()
    with changed_checkpoint(case, rolled_head) as folder:
        blob = folder.parent / "blobs" / hashlib.sha256(published).hexdigest()
        blob.parent.mkdir()
        (folder / "model.safetensors").rename(blob)
        (folder / "model.safetensors").symlink_to(blob)
        load_again(case, folder=folder)
        yield
