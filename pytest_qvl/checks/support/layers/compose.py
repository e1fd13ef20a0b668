"""What happens between the linears of a layer: gates, residual sums, and that data is handed on as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.oracles import elementary

if TYPE_CHECKING:
    import torch

    from pytest_qvl.checks.support.layers.flow import Flow
    from pytest_qvl.checks.support.layers.tally import Tally
    from pytest_qvl.models.layers import Layer, Merger, Mlp

MLP, RESIDUAL, FLOW = "activation in an MLP", "residual sum", "what modules hand on"
FUSED = "a fused kernel runs in place of its modules"


def judge_mlp(tally: Tally, flow: Flow, mlp: Mlp) -> None:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``, each linear's own product apart."""
    first = [mlp.up] if mlp.gate is None else [mlp.gate, mlp.up]
    linears = [*first, mlp.down]
    if not flow.seen(linears):
        tally.leave_out(FUSED, mlp.name)
        return
    x = flow.given[id(mlp.module)]
    for linear in first:
        tally.same(FLOW, mlp.name, flow.given[id(linear)], x, "does not give its own input to its first linears")
    tally.same(FLOW, mlp.name, flow.made[id(mlp.module)], flow.made[id(mlp.down)], "does not return its last linear's")
    up, given = flow.made[id(mlp.up)], flow.given[id(mlp.down)]
    if mlp.gate is None:
        claim = elementary.activation(mlp.activation, up)
    else:
        claim = elementary.gated(mlp.activation, flow.made[id(mlp.gate)], up)
    tally.hold(MLP, mlp.name, given, claim)
    flow.forget(linears)


def judge_merger(tally: Tally, flow: Flow, merger: Merger) -> None:
    """``second(gelu(first(norm(x))))``, four neighbouring patches side by side."""
    if not flow.seen((merger.norm, merger.first, merger.second)):
        tally.leave_out(FUSED, merger.name)
        return
    normed = flow.made[id(merger.norm)]
    given = flow.given[id(merger.first)]
    words = "does not put the normed patches of a square side by side, in order"
    tally.same(FLOW, merger.name, given.flatten(), normed.flatten(), words)
    claim = elementary.activation("gelu", flow.made[id(merger.first)])
    tally.hold(MLP, merger.name, flow.given[id(merger.second)], claim)
    tally.same(
        FLOW, merger.name, flow.made[id(merger.module)], flow.made[id(merger.second)], "does not return its last linear's"
    )  # fmt: skip
    flow.forget((merger.norm, merger.first, merger.second, merger.module))


def judge_residuals(tally: Tally, flow: Flow, layer: Layer) -> None:
    """``h = x + attention(norm(x))``, ``h + mlp(norm(h))`` (pre-norm), and which module is given what."""
    first, second = layer.norms
    attention, mlp = layer.attention, layer.mlp.module
    if not flow.seen((first, second, attention, mlp)):
        tally.leave_out(FUSED, layer.name)
        return
    x, middle = flow.given[id(layer.module)], flow.given[id(second)]
    name = layer.name
    tally.same(FLOW, name, flow.given[id(first)], x, "does not give its own input to its first norm")
    tally.same(
        FLOW, name, flow.given[id(attention)], flow.made[id(first)], "does not give its first norm's output to attention"
    )  # fmt: skip
    tally.hold(RESIDUAL, name, middle, elementary.added(x, flow.made[id(attention)]))
    tally.same(FLOW, name, flow.given[id(mlp)], flow.made[id(second)], "does not give its second norm's output to the MLP")
    tally.hold(RESIDUAL, name, flow.made[id(layer.module)], elementary.added(middle, flow.made[id(mlp)]))
    flow.forget((first, second, attention, mlp))


def hidden_of(output: Any) -> torch.Tensor:
    """Hidden states out of what a layer returns."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
