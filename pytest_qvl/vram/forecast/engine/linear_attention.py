"""Linear attention by the code that is asked for, whatever is installed: Transformers' PyTorch code, or kernels.

In place of the kernels of flash-linear-attention (fla-core 0.6.0, its Triton code) and causal-conv1d stands what
allocates, keeps and frees what their autograd functions do, in their order: a Triton kernel fills what is there
already, so it is left out. Followed from source: of fla ``ops/gated_delta_rule/{chunk,chunk_fwd,wy_fast}.py``,
``ops/gated_delta_rule/fused_recurrent.py``, ``ops/common/{chunk_delta_h,chunk_o}.py`` and ``modules/norm/l2norm.py``;
``causal_conv1d/{causal_conv1d_interface,cpp_functions}.py``. The values mean nothing.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pytest_qvl.models.attributes import attributes_replaced
from pytest_qvl.models.layers import language_layers
from pytest_qvl.models.mixer_kernels import FUNCTIONS, mixer_kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.vram.forecast.request import LinearAttention

CHUNK = 64  # tokens
# Widest tile of a head that the backward kernel works on, by which it splits the gradients of the gate: by a block's
# shared memory (CUDA programming guide, technical specifications per compute capability), which is at least 163 KiB on
# these, and 99 KiB on others from 8.0 on.
_MUCH_SHARED_MEMORY = {(8, 0), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0)}
_TILE_LARGE, _TILE_USUAL, _TILE_SMALL = 128, 64, 32


def installed(parts: Parts) -> LinearAttention:
    """What computes linear attention in this process, as :attr:`Request.linear_attention` has it."""
    found = mixer_kernels(parts)
    if found.get("prompts") != "fla":
        return "torch"
    return "fla+causal-conv1d" if found["convolution of prompts"] == "causal_conv1d" else "fla"


@contextmanager
def linear_attention_by(parts: Parts, asked: LinearAttention, capability: tuple[int, int]) -> Iterator[None]:
    """Inside, linear attention is computed by what was asked for; nothing for a model that has none.

    Args:
        parts: The model.
        asked: As :attr:`pytest_qvl.vram.forecast.request.Request.linear_attention`.
        capability: Of the card.

    Raises:
        ValueError: Kernels are asked for, and the installed Transformers calls them in a way that is not followed.
    """
    mixers = [layer.attention for layer in language_layers(parts) if not layer.attends]
    if not mixers:
        yield
        return
    home: Any = sys.modules[type(mixers[0]).__module__]
    there = {name: getattr(home, name) for name in FUNCTIONS.values() if hasattr(home, name)}
    # Each wraps what was found when it was imported; what it wraps is Transformers' own.
    own = {name: found.__wrapped__ for name, found in there.items() if hasattr(found, "__wrapped__")}
    if asked != "torch" and own.keys() != set(FUNCTIONS.values()):
        import transformers

        raise ValueError(
            f"linear_attention is {asked!r}: how Transformers {transformers.__version__} calls these kernels is not "
            "followed (that of 5.17 is); use 'torch', which takes more memory"
        )
    functions = {**own, **_kernels(asked, capability)}
    with attributes_replaced((home, name, function) for name, function in functions.items()):
        yield


def _kernels(asked: LinearAttention, capability: tuple[int, int]) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    if asked != "torch":
        usual = _TILE_USUAL if capability >= (8, 0) else _TILE_SMALL
        tile = _TILE_LARGE if capability in _MUCH_SHARED_MEMORY else usual
        found["torch_chunk_gated_delta_rule"] = partial(_chunk_gated_delta_rule, tile)
        found["torch_recurrent_gated_delta_rule"] = _fused_recurrent
    if asked == "fla+causal-conv1d":
        found["causal_conv1d_fn"] = _causal_conv1d
        found["causal_conv1d_update"] = _causal_conv1d_update
    return found


def _chunk_gated_delta_rule(  # noqa: PLR0917  (Transformers' own signature)
    tile: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    **_: Any,
) -> Any:
    return _ChunkGatedDeltaRule.apply(  # type: ignore[no-untyped-call]
        query, key, value, g, beta, initial_state, output_final_state, tile
    )


class _ChunkGatedDeltaRule(torch.autograd.Function):
    """``ChunkGatedDeltaRuleFunction`` with as many heads of queries as of values, and norms of queries and keys."""

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes by position)
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor | None,
        wants_state: bool,
        tile: int,
    ) -> Any:
        """The output in ``v``'s dtype and the last state in fp32, if it is wanted."""
        given = q, k, v, g, beta = tuple(tensor.contiguous() for tensor in (q, k, v, g, beta))
        q, q_rstd = _normed(q)
        k, k_rstd = _normed(k)
        g, a, out, final = _forward_of_chunks(k, v, g, wants_state)
        ctx.save_for_backward(q, q_rstd, k, k_rstd, v, g, beta, a, state)
        ctx.tile = tile
        del given  # until here, as in fla
        return out.to(q.dtype), final

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
        """The states of all chunks once more, then the gradients."""
        grad = grad.contiguous()
        saved = ctx.saved_tensors
        dq, dk, dv, dbeta, dg, dstate = _backward_of_chunks(saved, grad, ctx.tile)
        dq = torch.empty_like(dq)  # of what is not normed, in the place of the normed one's
        dk = torch.empty_like(dk)
        return dq, dk, dv, dg, dbeta, dstate, None, None


def _normed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``l2norm_fwd``."""
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _states(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The state before every chunk, in the inputs' dtype."""
    batch, length, heads, width = k.shape
    return k.new_empty((batch, -(-length // CHUNK), heads, width, v.shape[-1]))


def _forward_of_chunks(
    k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, wants_state: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``chunk_gated_delta_rule_fwd``: summed gates, inverse of the chunks' systems, output, last state."""
    batch, length, heads, width = k.shape
    g = torch.empty_like(g, dtype=torch.float32)
    a = k.new_zeros((batch, length, heads, CHUNK))
    w, u = torch.empty_like(k), torch.empty_like(v)
    h = _states(k, v)
    final = k.new_zeros((batch, heads, width, v.shape[-1]), dtype=torch.float32) if wants_state else None
    new_v = torch.empty_like(u)
    out = torch.empty_like(v)
    del w, h, new_v  # until here, as in fla
    return g, a, out, final


def _backward_of_chunks(saved: Sequence[Any], grad: torch.Tensor, tile: int) -> tuple[Any, ...]:
    """``chunk_gated_delta_rule_bwd``."""
    q, _, k, _, v, g, beta, _, state = saved
    w, u = torch.empty_like(k), torch.empty_like(v)
    h, new_v = _states(k, v), torch.empty_like(u)
    dv = torch.empty_like(grad)
    dh = _states(q, v)
    dstate = None if state is None else torch.empty_like(state, dtype=torch.float32)
    dv = torch.empty_like(dv)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dg = g.new_empty((-(-k.shape[-1] // tile), *g.shape), dtype=torch.float32)
    dw = torch.empty_like(w)
    dg = dg.sum(0)
    dk_of_w, dv_of_u, dg_of_w, dbeta = (torch.empty_like(tensor) for tensor in (k, v, g, beta))
    dv = dv_of_u
    dg = torch.empty_like(dg, dtype=torch.float32)
    del h, new_v, dh, dw, dk_of_w, dg_of_w  # until here, as in fla
    return dq, dk, dv, dbeta, dg, dstate


def _fused_recurrent(  # noqa: PLR0917  (Transformers' own signature)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,  # noqa: ARG001 - as of the function it stands for
    output_final_state: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``fused_recurrent_gated_delta_rule``, which has no backward."""
    with torch.no_grad():
        query, key, value, g, beta = (tensor.contiguous() for tensor in (query, key, value, g, beta))
        out, shape = torch.empty_like(value), (key.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
        return out, query.new_empty(shape, dtype=torch.float32) if output_final_state else None


def _causal_conv1d(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,  # noqa: ARG001 - the kernel applies it in place
    **_: Any,
) -> Any:
    return _CausalConv1d.apply(hidden_states, weight, bias)  # type: ignore[no-untyped-call]


class _CausalConv1d(torch.autograd.Function):
    """``CausalConv1dFn``: the activation is the kernel's, and what it was given is all that is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(batch, channels, length) as it was given, its layout included."""
        if x.stride(2) != 1 and x.stride(1) != 1:
            x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """The gradient of the weight is computed in fp32, wanted or not."""
        x, weight, bias = ctx.saved_tensors
        if x.stride(1) == 1 and x.stride(2) != 1 and grad.stride(1) != 1:
            grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        dx = torch.empty_like(x)
        dweight = torch.empty_like(weight, dtype=torch.float32)
        dbias = None if bias is None else torch.empty_like(bias, dtype=torch.float32)
        return dx, dweight.to(weight.dtype), None if dbias is None else dbias.to(bias.dtype)


def _causal_conv1d_update(
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,  # noqa: ARG001 - updated in place
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    return torch.empty_like(hidden_states)
