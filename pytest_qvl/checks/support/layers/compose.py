"""What happens between the linears of a layer: gates, residual sums, and that data is handed on as it is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pytest_qvl.checks.support.layers.tally import error_over_limit
from pytest_qvl.oracles import elementary

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pytest_qvl.checks.support.layers.flow import Call, Flow
    from pytest_qvl.checks.support.layers.tally import Tally
    from pytest_qvl.models.layers import Layer, Merger, Mlp
    from pytest_qvl.oracles.bounds import Claim

MLP, RESIDUAL = "activation in an MLP", "residual sum"
ELEMENTS = 2**24
"""Activations that are held in float32 at a time: 64 MiB; with less, a GPU waits for its next call."""
FUSED = "a fused kernel runs in place of its modules"
_LAST = "does not return what its last linear does"


def judge_mlp(tally: Tally, flow: Flow, mlp: Mlp, _call: Call) -> None:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``, each linear's own product apart."""
    first = [mlp.up] if mlp.gate is None else [mlp.gate, mlp.up]
    if not flow.seen((*first, mlp.down)):
        tally.leave_out(FUSED, mlp.name)
        flow.forget((*first, mlp.down))
        return
    for linear in first:
        words = "does not give its own input to its first linears"
        tally.handed_on(mlp.name, flow.given_to(linear), flow.given_to(mlp.module), words)
    tally.handed_on(mlp.name, flow.made_by(mlp.module), flow.made_by(mlp.down), _LAST)
    up, got = flow.made_by(mlp.up).flatten(0, -2), flow.given_to(mlp.down).flatten(0, -2)
    gate = None if mlp.gate is None else flow.made_by(mlp.gate).flatten(0, -2)
    step = max(1, ELEMENTS // up.shape[-1])
    for start in range(0, len(up), step):
        mine = slice(start, start + step)

        def claim_of(name: str, mine: slice = mine) -> Claim:
            if gate is None:
                return elementary.activation(name, up[mine])
            return elementary.gated(name, gate[mine], up[mine])

        tell = partial(_other_activation, mlp.activation, got[mine], claim_of)
        tally.hold(MLP, mlp.name, got[mine], claim_of(mlp.activation), tell)
    flow.forget((*first, mlp.down))


def _other_activation(name: str, got: torch.Tensor, claim_of: Callable[[str], Claim]) -> str:
    """That a result is that of another activation, if it is."""
    others = (other for other in elementary.ACTIVATIONS if other != name)
    found = next((other for other in others if error_over_limit(got, claim_of(other)) <= 1), "")
    return f"computes {found}, not {name}" if found else ""


def judge_merger(tally: Tally, flow: Flow, merger: Merger, _call: Call) -> None:
    """``second(gelu(first(norm(x))))``, four neighbouring patches side by side."""
    inside = (merger.norm, merger.first, merger.second)
    if not flow.seen(inside):
        tally.leave_out(FUSED, merger.name)
        flow.forget(inside)
        return
    words = "does not put the normed patches of a square side by side, in order"
    tally.handed_on(merger.name, flow.given_to(merger.first).flatten(), flow.made_by(merger.norm).flatten(), words)
    got, before = flow.given_to(merger.second), flow.made_by(merger.first)
    tell = partial(_other_activation, "gelu", got, partial(elementary.activation, x=before))
    tally.hold(MLP, merger.name, got, elementary.activation("gelu", before), tell)
    tally.handed_on(merger.name, flow.made_by(merger.module), flow.made_by(merger.second), _LAST)
    flow.forget(inside)


def judge_residuals(tally: Tally, flow: Flow, layer: Layer) -> None:
    """``h = x + attention(norm(x))``, then ``h + mlp(norm(h))`` (pre-norm), and which module is given what."""
    first, second = layer.norms
    attention, mlp, name = layer.attention, layer.mlp.module, layer.name
    if not flow.seen((first, second, attention, mlp)):
        tally.leave_out(FUSED, name)
        flow.forget((first, second, attention, mlp))
        return
    x, middle = flow.given_to(layer.module), flow.given_to(second)
    tally.handed_on(name, flow.given_to(first), x, "does not give its own input to its first norm")
    words = "does not give its first norm's output to attention"
    tally.handed_on(name, flow.given_to(attention), flow.made_by(first), words)
    tally.hold(RESIDUAL, name, middle, elementary.added(x, flow.made_by(attention)))
    words = "does not give its second norm's output to the MLP"
    tally.handed_on(name, flow.given_to(mlp), flow.made_by(second), words)
    made, claim = flow.made_by(layer.module), elementary.added(middle, flow.made_by(mlp))
    tally.hold(RESIDUAL, name, made, claim, lambda: "returns its own input: it is skipped" if made.equal(x) else "")
    flow.forget((first, second, attention, mlp))
