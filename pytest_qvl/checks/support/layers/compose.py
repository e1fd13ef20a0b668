"""What happens between the linears of a layer: gates, residual sums, and that data is handed on as it is.

A norm whose module did not run is judged all the same, by what the next module was given: a kernel may compute it from
the module's weight, or nobody does.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.layers.linears import NORM, normed
from pytest_qvl.checks.support.layers.tally import HANDED_ON, error_over_limit
from pytest_qvl.oracles import elementary
from pytest_qvl.oracles.bounds import Claim
from pytest_qvl.oracles.chained import chained

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pytest_qvl.checks.support.layers.flow import Call, Flow
    from pytest_qvl.checks.support.layers.tally import Tally
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.layers import Layer, Merger, Mlp

MLP, RESIDUAL, MERGER = "activation in an MLP", "residual sum", "merger as a whole"
ELEMENTS = 2**24
"""Activations that are held in float32 at a time: 64 MiB; with less, a GPU waits for its next call."""
FUSED = "a fused kernel runs in place of its modules"
SKIPPED = "returns its own input: it is skipped"
_LAST = "does not return what its last linear does"
UNCALLED = "its module is never called, and what goes on is not what it has to return"


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


def judge_norm_uncalled(
    tally: Tally, parts: Parts, name: str, norm: Any, *, x: torch.Tensor, got: torch.Tensor
) -> None:
    """What a module was given, ``(..., width)``, which a norm has to have made of `x`, that has not run as a module."""
    tally.hold(NORM, name, got, normed(parts, name, norm, x, got.dtype), lambda: UNCALLED)


def judge_merger(tally: Tally, parts: Parts, flow: Flow, merger: Merger, call: Call) -> None:
    """``second(gelu(first(norm(x))))``, four neighbouring patches side by side.

    Where its linears do not run as modules, its result is held to all four at once, on its own input.
    """
    norm, linears = merger.norm, (merger.first, merger.second)
    given = call.given.reshape(-1, norm.weight.shape[-1])
    if not flow.seen(linears):
        _judge_whole_merger(tally, parts, merger, given, call.made)
        flow.forget((norm, *linears))
        return
    first = flow.given_to(merger.first)
    if flow.seen((norm,)):
        tally.handed_on(
            merger.name, flow.given_to(norm).flatten(), given.flatten(), "does not give its own input to its norm"
        )
        words = "does not put the normed patches of a square side by side, in order"
        tally.handed_on(merger.name, first.flatten(), flow.made_by(norm).flatten(), words)
    else:
        judge_norm_uncalled(tally, parts, _inside(merger, norm), norm, x=given, got=first.reshape(given.shape))
    got, before = flow.given_to(merger.second), flow.made_by(merger.first)
    tell = partial(_other_activation, "gelu", got, partial(elementary.activation, x=before))
    tally.hold(MLP, merger.name, got, elementary.activation("gelu", before), tell)
    tally.handed_on(merger.name, call.made, flow.made_by(merger.second), _LAST)
    flow.forget((norm, *linears))


def _judge_whole_merger(tally: Tally, parts: Parts, merger: Merger, given: torch.Tensor, made: torch.Tensor) -> None:
    """A merger's result from its input, where no module inside of it says what was handed on."""
    from torch import nn

    if not type(merger.first) is type(merger.second) is nn.Linear:
        tally.leave_out(FUSED, merger.name)  # 4-bit, or with an adapter
        return
    behind = (
        _product(merger.first),
        partial(elementary.activation, "gelu", dtype=given.dtype),
        _product(merger.second),
    )
    words = "does not return second(gelu(first(norm(x)))) of its own input, and calls none of its linears"
    width = merger.first.in_features
    squares, results = given.reshape(-1, width), made.reshape(-1, made.shape[-1])
    step = max(1, ELEMENTS // max(width, merger.first.out_features))
    for start in range(0, len(squares), step):
        x = squares[start : start + step].reshape(-1, given.shape[-1])
        claim = normed(parts, merger.name, merger.norm, x, x.dtype)
        claim = chained(Claim(*(each.expand_as(x).reshape(-1, width) for each in claim)), behind)
        tally.hold(MERGER, merger.name, results[start : start + step], claim, lambda: words)


def _inside(parent: Layer | Merger, norm: Any) -> str:
    """The dotted name of a norm inside of a layer or merger."""
    return f"{parent.name}.{next(name for name, module in parent.module.named_modules() if module is norm)}"


def _product(linear: Any) -> Callable[[torch.Tensor], Claim]:
    """What a linear makes of an input, its weight in float32 once for many."""
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    return partial(elementary.linear, weight=weight.float(), bias=bias, dtype=weight.dtype)


def judge_order(tally: Tally, layer: Layer, due: int) -> None:
    """A layer or block runs behind the one before it; `due` is the number of the one that had to run now."""
    if layer.number > due:
        place = f"{layer.name.rpartition('.')[0]}.{due}"
        tally.fail(HANDED_ON, place, f"is never called before {layer.number} is, as if it were not there")


def judge_residuals(tally: Tally, parts: Parts, flow: Flow, layer: Layer) -> None:
    """``h = x + attention(norm(x))``, then ``h + mlp(norm(h))`` (pre-norm), and which module is given what."""
    first, second = layer.norms
    attention, mlp, name = layer.attention, layer.mlp.module, layer.name
    x, made = flow.given_to(layer.module), flow.made_by(layer.module)
    if not flow.seen((attention, mlp)):
        if made.equal(x):  # what no kernel computes
            tally.fail(RESIDUAL, name, SKIPPED)
        else:
            tally.leave_out(FUSED, name)
        flow.forget((first, second, attention, mlp))
        return
    if flow.seen((first,)):
        tally.handed_on(name, flow.given_to(first), x, "does not give its own input to its first norm")
        words = "does not give its first norm's output to attention"
        tally.handed_on(name, flow.given_to(attention), flow.made_by(first), words)
    else:
        judge_norm_uncalled(tally, parts, _inside(layer, first), first, x=x, got=flow.given_to(attention))
    if flow.seen((second,)):
        middle = flow.given_to(second)
        tally.hold(RESIDUAL, name, middle, elementary.added(x, flow.made_by(attention)))
        words = "does not give its second norm's output to the MLP"
        tally.handed_on(name, flow.given_to(mlp), flow.made_by(second), words)
    else:
        middle = x + flow.made_by(attention)  # one rounding, which every kernel rounds alike
        judge_norm_uncalled(tally, parts, _inside(layer, second), second, x=middle, got=flow.given_to(mlp))
    claim = elementary.added(middle, flow.made_by(mlp))
    tally.hold(RESIDUAL, name, made, claim, lambda: SKIPPED if made.equal(x) else "")
    flow.forget((first, second, attention, mlp))
