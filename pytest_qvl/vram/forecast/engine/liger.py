"""What ``use_liger_kernel`` (liger-kernel 0.8.5) does to a training step by Transformers' and TRL's trainers.

``Trainer.train`` has ``_apply_liger_kernel_to_instance`` patch the model inside PEFT's wrapper, quantized or not:
norms, gated MLPs and rotary embeddings of its layers, and its forward, whose head and loss become one operation with
the gradient already there in the forward pass. ``SFTTrainer`` (TRL 1.16) has Liger leave the forward alone, as it has a
head of its own. What stands here in Liger's place allocates, keeps and overwrites what its autograd functions do, in
their order; what its Triton kernels fill is there already, so that they are left out, and values mean nothing.

Source: ``liger_kernel/transformers/monkey_patch.py`` (what is patched, of which family),
``transformers/model/{loss_utils,qwen2_vl,qwen2_5_vl,qwen3_vl}.py``,
``ops/{fused_linear_cross_entropy,rms_norm,layer_norm,swiglu,rope,qwen2vl_mrope}.py`` and ``transformers/rope.py``.
Of its implementations that by Triton is followed, which is chosen unless the packages of another are installed.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import transformers

from pytest_qvl.models.attributes import attributes_replaced
from pytest_qvl.models.autocast import autocast_dtype
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.models.anatomy import Parts

# Norms of a vision block and of a decoder layer that are patched, by their paths. Qwen3-VL's are another choice, and
# its gated MLPs stay (``swiglu`` is off by default there, and patches nothing).
_QWEN3_VL = "qwen3_vl"
_OF_BLOCK, _OF_LAYER, _OF_HEADS = (
    ("norm1", "norm2"),
    ("input_layernorm", "post_attention_layernorm"),
    ("self_attn.q_norm", "self_attn.k_norm"),
)
# All but Qwen3.5, known by its norms, which scale by ``1 + weight``: what Liger patches there is not followed.
_FOLLOWED = tuple(name for name, family in FAMILIES.items() if not family.zero_centred_norms)


def check_followed(model_type: str) -> None:
    """See that Liger patches a family as it is followed here.

    Raises:
        ValueError: It is another family, or Liger does not run on this Transformers.
    """
    if model_type not in _FOLLOWED:
        raise ValueError(
            f"liger is True and the model is {model_type}: Liger's kernels are followed for {', '.join(_FOLLOWED)}; "
            "use False"
        )
    if transformers.__version__.startswith("4."):
        raise ValueError(
            f"liger is True and Transformers is {transformers.__version__}: liger-kernel 0.8.5 needs 5.0 or later"
        )


@contextmanager
def layers(parts: Parts) -> Iterator[None]:
    """Inside, norms, gated MLPs and rotary embeddings are Liger's."""
    newer = parts.config.model_type == _QWEN3_VL
    of_block, of_layer = ((), (*_OF_LAYER, *_OF_HEADS)) if newer else (_OF_BLOCK, _OF_LAYER)
    backbone: Any = parts.language_backbone
    norms = [backbone.norm]
    norms += [block.get_submodule(name) for block in parts.blocks for name in of_block]
    norms += [layer.get_submodule(name) for layer in backbone.layers for name in of_layer]
    changes: list[tuple[Any, str, Any]] = [
        (norm, "forward", partial(_layer_norm if isinstance(norm, torch.nn.LayerNorm) else _rms_norm, norm))
        for norm in norms
    ]
    if not newer:
        changes += [(layer.mlp, "forward", partial(_gated_mlp, layer.mlp)) for layer in backbone.layers]
    modeling: Any = import_module(type(parts.base).__module__)
    if newer:
        changes += [(modeling, "apply_rotary_pos_emb", _rotated)]
        changes += [(modeling, "apply_rotary_pos_emb_vision", _rotated_vision)]
    elif hasattr(modeling, "apply_multimodal_rotary_pos_emb"):
        # Transformers 5.17 has none and rotates by another function, which Liger leaves alone.
        changes += [(modeling, "apply_multimodal_rotary_pos_emb", _rotated)]
    with attributes_replaced(changes):
        yield


class LigerHead:
    """In place of ``model.forward``: a loss, and no logits; outside of training the model's own, if they are wanted.

    Args:
        parts: The model.
        entered: Called before the head begins.
        keeps_logits: Whether an evaluation wants logits (it asks for ``skip_logits`` where not).
    """

    def __init__(self, parts: Parts, entered: Callable[[], None], *, keeps_logits: bool) -> None:
        self._parts, self._entered, self._keeps_logits = parts, entered, keeps_logits

    def forward(self, *args: Any, labels: torch.Tensor, **kwargs: Any) -> Any:
        """The loss of the tokens that have a label."""
        base = self._parts.base
        if self._keeps_logits and not base.training:
            return type(base).forward(base, *args, labels=labels, **kwargs)
        hidden = self._parts.core(*args, **kwargs).last_hidden_state
        self._entered()
        targets = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()
        head: Any = self._parts.lm_head
        flat = hidden.view(-1, hidden.shape[-1])
        return {"loss": _FusedLoss.apply(flat, head.weight, targets.view(-1))}  # type: ignore[no-untyped-call]


class _FusedLoss(torch.autograd.Function):
    """``LigerFusedLinearCrossEntropyFunction`` of (n, width) hidden states by a frozen head of (vocabulary, width)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
        """Some tokens at a time: logits, their gradient in their place, and that of the hidden states."""
        rows = rows_at_once(len(hidden), hidden.shape[1], len(weight))
        gradient = torch.zeros_like(hidden)
        losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
        (targets != IGNORED).sum().item()
        into_buffer = _products_stay_as_they_are(hidden, weight)
        buffer = hidden.new_empty((rows, len(weight))) if into_buffer else None
        for start in range(0, len(hidden), rows):
            part, found = hidden[start : start + rows], gradient[start : start + rows]
            logits = part @ weight.t() if buffer is None else torch.mm(part, weight.t(), out=buffer[: len(part)])
            if ctx.needs_input_grad[0] and buffer is None:
                found.copy_(logits @ weight)
            elif ctx.needs_input_grad[0]:
                torch.mm(logits, weight, out=found)
            del logits
        del buffer  # until here, as in Liger
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, loss: torch.Tensor) -> Any:  # noqa: ARG004 - a scale, by which it is multiplied in its place
        """The gradient that is there."""
        (gradient,) = ctx.saved_tensors
        return gradient, None, None


def _products_stay_as_they_are(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product of both is in their dtype, so that it goes into a buffer (``_can_use_mm_out``)."""
    return hidden.dtype == weight.dtype and autocast_dtype(hidden.device.type) in {None, hidden.dtype}


def rows_at_once(tokens: int, width: int, vocabulary: int) -> int:
    """Tokens whose logits are there at once: a power of two with about as many logits as there are hidden states."""
    parts = -(-vocabulary // width)
    return min(1 << (-(-tokens // parts) - 1).bit_length(), tokens)


def _rms_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _RMSNorm.apply(hidden_states, self.weight)  # type: ignore[no-untyped-call]
    return out


def _layer_norm(self: Any, input: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _LayerNorm.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
    return out


def _gated_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    gated = _Gated.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
    out: torch.Tensor = self.down_proj(gated)
    return out


class _RMSNorm(torch.autograd.Function):
    """``LigerRMSNormFunction`` by a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """In the dtype of ``x``, which is kept, with a number for each row."""
        rows = x.contiguous().view(-1, x.shape[-1])
        out = torch.empty_like(rows)
        scales = rows.new_empty(len(rows), dtype=torch.float32)
        ctx.save_for_backward(rows, weight, scales)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # noqa: ARG004
        """In the place of the gradient that comes (``in_place``)."""
        return gradient.contiguous(), None


class _LayerNorm(torch.autograd.Function):
    """``LigerLayerNormFunction`` by frozen weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """In the dtype of ``x``, which is kept, with two numbers for each row; autocast does not raise it to fp32."""
        rows = x.contiguous().view(-1, x.shape[-1])
        out = torch.empty_like(rows)
        means, scales = (rows.new_empty(len(rows), dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(rows, weight, bias, means, scales)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """In a tensor of its own."""
        gradient = gradient.contiguous()
        return torch.empty_like(ctx.saved_tensors[0]).view(gradient.shape), None, None


class _Gated(torch.autograd.Function):
    """``LigerSiLUMulFunction``: ``silu(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Both are kept, and nothing between."""
        width = gate.shape[-1]
        gates, ups = (tensor.contiguous().view(-1, width) for tensor in (gate, up))
        out = torch.empty_like(gates)
        ctx.save_for_backward(gates, ups)
        return out.view(gate.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """In the places of what was kept."""
        gradient = gradient.contiguous()
        gates, ups = ctx.saved_tensors
        return gates.view(gradient.shape), ups.view(gradient.shape)


def _rotated(queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any) -> Any:
    return _Rotated.apply(queries, keys, cos, sin)  # type: ignore[no-untyped-call]


def _rotated_vision(queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """``liger_rotary_pos_emb_vision`` of (patches, heads, width): in fp32, and back."""
    q, k = (tensor.to(torch.float32).unsqueeze(0).transpose(1, 2) for tensor in (queries, keys))
    q, k = _rotated(q, k, cos.to(torch.float32), sin.to(torch.float32))
    return q.transpose(1, 2).squeeze(0).to(queries.dtype), k.transpose(1, 2).squeeze(0).to(keys.dtype)


class _Rotated(torch.autograd.Function):
    """``LigerRopeFunction`` and ``LigerQwen2VLMRopeFunction`` of (batch, heads, length, width)."""

    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """In their places, if heads lie within tokens; cosine and sine are kept."""
        ctx.save_for_backward(cos.contiguous(), sin.contiguous())
        return tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (queries, keys))

    @staticmethod
    def backward(ctx: Any, queries: torch.Tensor, keys: torch.Tensor) -> Any:  # noqa: ARG004
        """As before."""
        return *(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (queries, keys)), None, None
