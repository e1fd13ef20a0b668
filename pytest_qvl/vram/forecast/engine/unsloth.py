"""What Unsloth (2026.10.9) does otherwise than Transformers, TRL and PEFT in a training step.

Checkpoints give their inputs to the host and get them back through two buffers on the device; the head and its loss
are one operation over some tokens at a time, which has its gradient before backward begins; the adapter's product is
added in place of a sum. Everything is written after what ``unsloth`` and ``unsloth_zoo`` allocate, in their order; what
their Triton kernels fill is there already, so that they are left out, and values mean nothing.

Source: ``unsloth_zoo/gradient_checkpointing.py`` (``UnslothCheckpointFunction``), ``unsloth_zoo/fused_losses``
(``chunked_logprob.py``, ``fused_linear.py``), ``unsloth_zoo/compiler.py`` (``patch_lora_forwards``), and
``unsloth/models/vision.py`` and ``_block_compile.py``. What torch's compiler makes of a layer is not run but known by
what it keeps: products and attention, and of norms and gates their inputs, from which it makes them again.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from pytest_qvl.models.attributes import attributes_replaced
from pytest_qvl.models.autocast import autocast_dtype
from pytest_qvl.samples.batch import IGNORED
from pytest_qvl.vram.forecast.engine.dataless import DatalessTensor
from pytest_qvl.vram.units import GiB, MiB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.vram.forecast.engine.workload import Stage

# ``MINIMUM_SIZE`` and ``INITIAL_GPU_BUFFER_SIZE`` (in 16 bits): inputs of at most that much stay on the device.
LEAST_OFFLOADED = 2 * MiB
# ``_SMALL_CARD_BYTES``, above which a loss of fewer tokens than ``_flash_min_rows`` has rows of all logits.
SMALL_CARD = int(24.5 * GiB)
MANY_TOKENS = 4096
# Of the functions in a model's module that are compiled those that have more than their results.
_ROTARY = re.compile(r"apply_(multimodal_)?rotary_pos_emb(_vision)?")
# ``_MIN_LOGITS``, ``_MAX_ROWS``, ``_CHUNK_GB``, ``_SPLIT_COLS`` and ``_BWD_TILE_BYTES``.
_LEAST_LOGITS, _MOST_ROWS, _BUDGET, _SPLIT, _TILE = 512 * 151936, 4096, 2 * GiB, 16384, 256 * MiB


class Offloading:
    """Unsloth's checkpoints.

    Args:
        parts: The model; its layers have been told to be checkpointed.
        stage: Runs what is recomputed.
    """

    def __init__(self, parts: Parts, stage: Stage) -> None:
        self._parts, self._stage = parts, stage
        self.buffers: list[torch.Tensor] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, layers are checkpointed so; the last one's input stays, as from the second step on."""
        last = self._parts.language_backbone.layers[-1]
        layers = [m for m in self._parts.base.modules() if hasattr(m, "_gradient_checkpointing_func")]
        function = "_gradient_checkpointing_func"
        try:
            with attributes_replaced(
                (layer, function, partial(self._checkpoint, offloads=layer is not last)) for layer in layers
            ):
                yield
        finally:
            self.buffers.clear()

    def begin(self, batch: dict[str, Any], *, vision: bool) -> None:
        """Have both buffers as large as the largest input that a batch of these shapes gives to the host.

        Unsloth makes them larger where a checkpoint needs it; here that is done before the first.
        """
        if self.buffers:
            return
        first: Any = self._parts.language_backbone.layers[0]
        text = first.input_layernorm.weight
        sizes = [batch["input_ids"].numel() * text.shape[0] * text.element_size()]
        if vision:
            first = self._parts.blocks[0]
            block = first.norm1.weight
            patches = sum(batch[name].shape[0] for name in ("pixel_values", "pixel_values_videos") if name in batch)
            sizes.append(patches * block.shape[0] * block.element_size())
        self.buffers += [text.new_empty(max(LEAST_OFFLOADED, *sizes), dtype=torch.uint8) for _ in range(2)]

    def _checkpoint(self, function: Any, hidden: torch.Tensor, *others: Any, offloads: bool) -> Any:
        run = self._stage.recomputed(partial(_with, function, others))
        gone = offloads and hidden.requires_grad and hidden.nbytes > LEAST_OFFLOADED
        return _Offloaded.apply(run, self.buffers[0] if gone else None, hidden)  # type: ignore[no-untyped-call]


def _with(function: Any, others: Any, hidden: torch.Tensor) -> Any:
    return function(hidden, *others)


class _Offloaded(torch.autograd.Function):
    """A reentrant checkpoint whose input comes back into a buffer."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], buffer: torch.Tensor | None, hidden: torch.Tensor) -> Any:
        """What is checkpointed, without a graph."""
        ctx.run, ctx.buffer, ctx.shape, ctx.dtype = run, buffer, hidden.shape, hidden.dtype
        ctx.autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        if buffer is None:
            ctx.save_for_backward(hidden)
        with torch.no_grad():
            return run(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Run it again on the input, then back through it."""
        if ctx.buffer is None:
            hidden = ctx.saved_tensors[0].detach()
        else:
            size = prod(ctx.shape) * ctx.dtype.itemsize
            hidden = ctx.buffer[:size].view(ctx.dtype).view(ctx.shape).detach()
        hidden.requires_grad_(True)
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out = ctx.run(hidden)
        torch.autograd.backward(out if isinstance(out, tuple) else (out,), gradients)
        return None, None, hidden.grad


class UnslothHead:
    """In place of ``model.forward``: a loss, and no logits.

    Args:
        parts: The model.
        entered: Called before the head begins.
        small_card: Whether the card has at most :data:`SMALL_CARD`, and tensor cores for fp32 sums of 16 bits.
    """

    def __init__(self, parts: Parts, entered: Callable[[], None], *, small_card: bool) -> None:
        self._parts, self._entered, self._small_card = parts, entered, small_card

    def forward(self, *args: Any, labels: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The mean loss of the tokens that have a label."""
        hidden = self._parts.core(*args, **kwargs).last_hidden_state
        self._entered()
        ignored = torch.full_like(labels[..., :1], IGNORED)
        targets = torch.cat((labels[..., 1:], ignored), dim=-1).reshape(-1)
        head: Any = self._parts.lm_head
        flat = hidden.reshape(-1, hidden.shape[-1])
        return {"loss": _FusedLoss.apply(flat, head.weight, targets, self._small_card)}  # type: ignore[no-untyped-call]


class _FusedLoss(torch.autograd.Function):
    """The cross-entropy of (n, width) hidden states by a frozen head of (vocabulary, width), and its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, small_card: bool) -> Any:
        """Some tokens at a time: logits in fp32, what becomes of them in their place, and the gradient from it."""
        dtype = autocast_dtype(hidden.device.type) or weight.dtype
        labelled = (targets != IGNORED).nonzero().squeeze(-1)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = hidden.new_zeros(hidden.shape) if needs_gradient else None
        losses = hidden.new_empty(len(labelled), dtype=torch.float32)
        tiled = len(labelled) >= (0 if small_card else MANY_TOKENS)
        work = _tiles if tiled else _rows
        work(hidden, weight.to(dtype), labelled, gradient)
        ctx.save_for_backward(gradient)
        return losses.double().sum().float()

    @staticmethod
    def backward(ctx: Any, loss: torch.Tensor) -> Any:  # noqa: ARG004 - a scale
        """The gradient times the loss's."""
        (gradient,) = ctx.saved_tensors
        return torch.empty_like(gradient), None, None, None


def _rows(hidden: Any, weight: Any, labelled: Any, gradient: Any) -> None:
    """All logits of some tokens."""
    vocabulary, width = weight.shape
    rows = rows_at_once(len(labelled), width, vocabulary)
    # ``_Buffers``: in fp32, each row a multiple of eight long; 16-bit gradients lie in the same bytes.
    buffer = hidden.new_empty((rows, -(-vocabulary // 8) * 8), dtype=torch.float32)
    in_half = buffer.view(weight.dtype)
    for part in labelled.split(rows):
        own = hidden.index_select(0, part).to(weight.dtype)
        torch.mm(own, weight.t(), out=in_half[: len(part), :vocabulary])
        _statistics(hidden, 7, vocabulary, len(part))
        if gradient is not None:
            found = hidden.new_empty((len(part), width), dtype=torch.float32)
            gradient.index_copy_(0, part, found.to(gradient.dtype))
            del found
        del own


def _tiles(hidden: Any, weight: Any, labelled: Any, gradient: Any) -> None:
    """A part of the logits of many tokens, and their gradients added up in fp32."""
    vocabulary, width = weight.shape
    rows = max(min(_MOST_ROWS, len(labelled), _TILE // (_SPLIT * 4)), 1)
    columns = _SPLIT
    buffer = hidden.new_empty((rows, columns), dtype=torch.float32)
    in_half = buffer.view(weight.dtype)
    sums = None if gradient is None else hidden.new_empty((rows, width), dtype=torch.float32)
    for part in labelled.split(rows):
        own = hidden.index_select(0, part).to(weight.dtype)
        statistics = _statistics(hidden, 8, vocabulary, len(part))
        for slab in weight.split(columns):
            torch.mm(own, slab.t(), out=in_half[: len(part), : slab.shape[0]])
        del statistics, own
    del sums


def _statistics(like: Any, count: int, vocabulary: int, rows: int) -> torch.Tensor:
    """Of each token in each part of the vocabulary, in fp32."""
    made: torch.Tensor = like.new_empty((count, -(-vocabulary // _SPLIT), rows), dtype=torch.float32)
    return made


def rows_at_once(tokens: int, width: int, vocabulary: int) -> int:
    """Tokens whose logits are there at once (``fused_linear_rows``): a power of two, at least 512, in 2 GiB of fp32."""
    least = min(max(_power_of_two(_LEAST_LOGITS // vocabulary), 512), _MOST_ROWS)
    rows = min(max(_power_of_two(tokens * width // vocabulary), least), _MOST_ROWS)
    return max(min(rows, max(_BUDGET // (vocabulary * 4), 2), tokens), 1)


def _power_of_two(most: int) -> int:
    return 1 << max(most.bit_length() - 1, 0)


@contextmanager
def lora_forwards() -> Iterator[None]:
    """Inside, LoRA layers of PEFT add their product as Unsloth's do."""
    from peft.tuners.lora import bnb, layer

    with attributes_replaced((cls, "forward", _lora_forward) for cls in (layer.Linear, bnb.Linear4bit)):
        yield


def _lora_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of one adapter: its second product is added to the base layer's by the same call."""
    result: torch.Tensor = self.base_layer(x, *args, **kwargs)
    (adapter,) = self.active_adapters
    first, second = self.lora_A[adapter].weight, self.lora_B[adapter].weight
    dtype = result.dtype
    if not torch.is_autocast_enabled():
        result, x = result.to(first.dtype), x.to(first.dtype)
    with _made_again(x):
        inner = self.lora_dropout[adapter](x).to(result.dtype) @ first.to(result.dtype).t()
    added = torch.addmm(
        result.view(-1, result.shape[-1]),
        inner.view(-1, inner.shape[-1]),
        second.to(result.dtype).t(),
        alpha=self.scaling[adapter],
    )
    return added.view(result.shape).to(dtype)


@contextmanager
def compiled_layers(parts: Parts) -> Iterator[None]:
    """Inside, norms and gated MLPs keep what compiled ones keep, and rotary embeddings have their results alone."""
    modeling: Any = import_module(type(parts.base).__module__)
    changes = [(modeling, name, _rotated) for name in vars(modeling) if _ROTARY.fullmatch(name)]
    for module in parts.base.modules():
        if type(module).__name__.endswith("RMSNorm"):
            changes.append((module, "forward", partial(_norm, module)))
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            changes.append((module, "forward", partial(_gated_mlp, module)))
    with attributes_replaced(changes):
        yield


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _that_is_made_again(_Norm.apply(x, self.weight))  # type: ignore[no-untyped-call]
    return out


def _rotated(queries: torch.Tensor, keys: torch.Tensor, *_: Any, **__: Any) -> Any:
    return _Rotated.apply(queries, keys)  # type: ignore[no-untyped-call]


def _gated_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    gated = _Gated.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
    out: torch.Tensor = self.down_proj(_that_is_made_again(gated))
    return out


def _that_is_made_again(tensor: Any) -> Any:
    tensor.is_made_again = True
    return tensor


@contextmanager
def _made_again(tensor: torch.Tensor) -> Iterator[None]:
    """What is saved of ``tensor`` inside is not kept, if it is made again in backward."""
    if not getattr(tensor, "is_made_again", False):
        yield
        return
    assert isinstance(tensor, DatalessTensor)
    storage = id(tensor.storage_)  # what is saved keeps the hook, and the storage if the hook did

    def pack(saved: torch.Tensor) -> Any:
        own = isinstance(saved, DatalessTensor) and id(saved.storage_) == storage
        return partial(torch.empty, saved.shape, dtype=saved.dtype, device="cpu") if own else saved

    def unpack(packed: Any) -> torch.Tensor:
        made: torch.Tensor = packed if isinstance(packed, torch.Tensor) else packed()
        return made

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Norm(torch.autograd.Function):
    """Of hidden states: one kernel, that keeps them and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        """In the dtype of ``x``."""
        scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, scales)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # noqa: ARG004
        """The weight is frozen."""
        return torch.empty_like(gradient), None


class _Rotated(torch.autograd.Function):
    """Of queries and keys: one kernel, that keeps cosine and sine, which all layers share."""

    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, keys: torch.Tensor) -> Any:  # noqa: ARG004
        """Of their shapes and dtypes."""
        return torch.empty_like(queries), torch.empty_like(keys)

    @staticmethod
    def backward(ctx: Any, queries: torch.Tensor, keys: torch.Tensor) -> Any:  # noqa: ARG004
        """Of both."""
        return torch.empty_like(queries), torch.empty_like(keys)


class _Gated(torch.autograd.Function):
    """``act(gate) * up``: one kernel, that keeps both."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Of their shape and dtype."""
        ctx.save_for_backward(gate, up)
        return torch.empty_like(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # noqa: ARG004
        """Of both."""
        return torch.empty_like(gradient), torch.empty_like(gradient)
