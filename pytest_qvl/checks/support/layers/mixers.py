"""Linear attention of the language backbone (Qwen3.5): convolution, gates, recurrence, and what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_qvl.checks.support.layers.compose import FUSED, UNCALLED
from pytest_qvl.checks.support.layers.tally import multiple
from pytest_qvl.checks.support.rounding import coarsest
from pytest_qvl.models.autocast import autocast_to
from pytest_qvl.models.layers import MIXER, kept_state
from pytest_qvl.models.mixer_kernels import PYTORCH, UNKNOWN, mixer_kernels
from pytest_qvl.models.renamed import kv_cache_in
from pytest_qvl.oracles import delta, elementary
from pytest_qvl.oracles.bounds import FUNCTION, SINGLE, TAIL, Claim, underflow, unit

if TYPE_CHECKING:
    import torch

    from pytest_qvl.checks.support.layers.flow import Call, Flow
    from pytest_qvl.checks.support.layers.tally import Tally
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.layers import Layer

RECURRENCE, GATED_NORM, KEPT = "gated delta rule", "gated norm", "kept state"
# Equal computations in float32 that rounding is learned from: token by token, and by chunks of these sizes.
CHUNKS = (0, 16, 32, delta.KERNEL_CHUNK)
# Of each of them, with every rounding moved at random.
RUNS = 4
# Numbers of a state that are all those of a 16-bit dtype. One of float32 is so by chance once in 2**13, or once in 2**8
# as the product of two of bfloat16, the least that a kernel makes of a token: eight are once in 2**64.
ENOUGH = 8
# Half a step of TF32, to which Triton rounds what a product of float32 takes on a GPU.
TENSOR_FLOAT = 2.0**-11
# How much nearer to another result what was read has to be to be called that; in words only.
NEARER = 0.02


@dataclass
class _State:
    """What a layer keeps from one call to the next.

    Attributes:
        tail: The last inputs of the convolution.
        exact: S in float64.
        held: How much of the values S holds, ``(rows, heads, value width)`` (:func:`~pytest_qvl.oracles.delta.held`).
        rounded: S of each float32 computation: by chunk size, those of :data:`RUNS` behind each other as rows.
    """

    tail: torch.Tensor
    exact: torch.Tensor
    held: torch.Tensor
    rounded: list[torch.Tensor]


class Mixers:
    """Judges linear-attention mixers while they run.

    What a mixer hands to its norm is held to the recurrence in float64, on what its own projections gave, with the
    state that the earlier calls have to have left. How far a healthy one may be off is learned from sixteen runs in
    float32: in four orders of computing (:data:`CHUNKS`), with each number that is rounded moved by up to half a step
    of its dtype, by the last places that a function may be off (:data:`~.bounds.FUNCTION`), and each logarithm of a
    decay by half a step of the sum that kernels keep of them over a chunk. The sum of so many independent errors
    exceeds :data:`~.bounds.TAIL` of its standard deviations once in 4e17 (see :mod:`pytest_qvl.oracles.bounds`). Where
    a package's kernels take several tokens, all sixteen go in their order and move what they round inside, too. These
    are taken over the runs and the width of a head, relative to how much of the values the state holds, since what is
    read may be a small difference of them. Sixteen runs find less than half of one once in a thousand times, so that no
    token's counts for less than the mean of its head's.

    Args:
        parts: The model.
        tally: Where findings go.
        flow: What modules are given and make.
        attended: ``(rows, length)`` bool: which tokens of the prompt are no padding.
    """

    def __init__(self, parts: Parts, tally: Tally, flow: Flow, attended: torch.Tensor) -> None:
        self._parts, self._tally, self._flow, self._attended = parts, tally, flow, attended
        self._states: dict[int, _State] = {}
        # S in float32 that the forward before left, and that this one did where nothing goes on: in words only.
        self._before: dict[int, torch.Tensor] = {}
        self._left: dict[int, torch.Tensor] = {}
        self._goes_on = True
        self._eps = float(parts.text_config.rms_norm_eps)
        self._gates: dict[int, torch.Tensor] = {}
        self._by_kernel = mixer_kernels(parts).get("prompts", PYTORCH) not in (PYTORCH, UNKNOWN)

    def restart(self, attended: torch.Tensor) -> None:
        """Forget the sequence so far, and take which tokens of the next prompt are no padding.

        From now on nothing goes on behind a call: sixteen states of every layer are much of a GPU's memory.
        """
        self._attended, self._goes_on = attended, False
        self._before = self._left or {number: state.exact.float() for number, state in self._states.items()}
        self._left, self._states = {}, {}

    def watch(self, layer: Layer) -> None:
        """Put a hook on the norm of a mixer."""

        def keep_gate(call: Call) -> None:
            gate = call.kwargs.get("gate", call.positional[1] if len(call.positional) > 1 else None)
            if gate is not None:
                self._gates[layer.number] = gate.detach()

        self._flow.watch(layer.attention.norm, keep_gate)

    def judge(self, layer: Layer, call: Call) -> None:
        """One call of a mixer."""
        flow, tally, name = self._flow, self._tally, f"{layer.name}.{MIXER}"
        mixer: Any = layer.attention
        modules = (*layer.inputs, layer.output)
        if not flow.seen(modules):
            tally.leave_out(FUSED, name)
        else:
            is_normed = flow.seen((mixer.norm,)) and layer.number in self._gates
            self._judge_handing_on(layer, call, name, is_normed=is_normed)
            claim, tokens = self._read(layer, call.autocast)
            if is_normed:
                got = flow.given_to(mixer.norm).view(claim.value.shape)
                tally.hold(RECURRENCE, name, got, claim, partial(self._words, layer, tokens, got, claim))
                self._judge_norm(layer, name)
            else:
                self._judge_norm_uncalled(layer, name, claim)
        self._judge_kept(layer, call, name)
        flow.forget((*modules, mixer.norm))
        self._gates.pop(layer.number, None)

    def _judge_handing_on(self, layer: Layer, call: Call, name: str, *, is_normed: bool) -> None:
        flow, tally = self._flow, self._tally
        given = call.given
        if not bool(self._attended.all()) and given.shape[:2] == self._attended.shape:
            given = given * self._attended.to(given.device)[..., None]  # padding enters no state
        for linear in layer.inputs:
            words = "does not give its own input, padding zeroed, to its linears"
            tally.handed_on(name, flow.given_to(linear), given, words)
        if is_normed:
            normed = flow.made_by(layer.attention.norm)
            words = "does not give what its norm returned to out_proj"
            tally.handed_on(name, flow.given_to(layer.output).flatten(), normed.flatten(), words)
            gate = flow.made_by(layer.inputs[1])
            words = "does not gate its norm by in_proj_z"
            tally.handed_on(name, self._gates[layer.number].flatten(), gate.flatten(), words)
        tally.handed_on(name, call.made, flow.made_by(layer.output), "does not return what out_proj does")

    def _judge_kept(self, layer: Layer, call: Call, name: str) -> None:
        """The state that the next call goes on with is one of float32: of it, and not rounded to less.

        Between 16-bit queries, keys and values, what its rounding does to one call is lost; over a reply it adds up.
        Autocast rounds the matrix product that writes the state of several tokens, and by that the state behind them.
        """
        cache = kv_cache_in(call.kwargs)
        if cache is None:
            return
        state = kept_state(cache, layer.number)
        if state is None:
            self._tally.leave_out(f"the state in a {type(cache).__name__} of this kind", name)
            return
        if call.autocast is not None and call.given.shape[1] > 1 and state.dtype.itemsize > 2:
            return
        self._tally.count(KEPT, 1)
        if dtype := rounded_to(state):
            self._tally.fail(KEPT, name, f"is rounded to {dtype} between two calls, where it has to be one of float32")

    def _read(self, layer: Layer, autocast: torch.dtype | None) -> tuple[Claim, delta.Tokens]:
        """What a mixer has to read, ``(rows, length, heads, value width)``, and its heads are given.

        Its state is that behind it afterwards.
        """
        import torch

        mixer, flow = layer.attention, self._flow
        joint, _gate, share, rate = (flow.made_by(linear) for linear in layer.inputs)
        state = self._states.get(layer.number) or self._fresh(mixer, joint)
        generator = torch.Generator(joint.device).manual_seed(layer.number)
        sums = _Sums.of(mixer, joint, state.tail, share, rate, autocast=autocast)
        tokens = _tokens(mixer, sums)
        read, exact = delta.recurrent(tokens, state.exact)
        held = delta.held(tokens, state.held)
        size = read.abs() + held * tokens.query.norm(dim=-1, keepdim=True) + underflow(torch.float32)
        dtype = coarsest((joint.dtype, sums.dtypes[0]))
        # Kernels for several tokens round inside; those for one behind a state compute in float32.
        by_kernel = self._by_kernel and (joint.shape[1] > 1 or layer.number not in self._states)
        moved = partial(_moved, by=max(unit(dtype), TENSOR_FLOAT), generator=generator)
        spread, rounded = torch.zeros_like(read[..., :1]), []
        for chunk, before in zip(CHUNKS, state.rounded, strict=True):
            single = _runs(mixer, sums, tokens, generator)
            with autocast_to(joint.device.type, autocast):  # rounds what is multiplied, as it does the mixer's
                if by_kernel:
                    out, after = delta.chunked_by_kernel(single, before, moved)
                else:
                    out, after = delta.chunked(single, before, chunk) if chunk else delta.recurrent(single, before)
            del single
            for run in torch.split(out, len(read)):
                spread += ((run.double() - read) / size).square_().mean(dim=-1, keepdim=True)
            if self._goes_on:
                rounded.append(after)
        found = spread / (RUNS * len(CHUNKS))
        deviation = torch.maximum(found, found.mean(dim=1, keepdim=True)).sqrt() * size
        value = read.float()
        limit = (TAIL * deviation).float() + unit(dtype) * value.abs() + underflow(dtype)
        if self._goes_on:
            tail = torch.cat((state.tail, joint), dim=1)[:, joint.shape[1] :]
            # Copies: views keep what all tokens have.
            self._states[layer.number] = _State(tail.clone(), exact, held[:, -1].clone(), rounded)
        else:
            self._left[layer.number] = exact.float()
        return Claim(value, limit), tokens

    def _fresh(self, mixer: Any, joint: torch.Tensor) -> _State:
        import torch

        shape = (joint.shape[0], mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)
        empty = torch.zeros(shape, dtype=torch.float64, device=joint.device)
        tail = joint.new_zeros(joint.shape[0], mixer.conv_kernel_size - 1, joint.shape[2])
        return _State(tail, empty, empty[:, :, 0], [empty.float().repeat(RUNS, 1, 1, 1) for _ in CHUNKS])

    def _judge_norm(self, layer: Layer, name: str) -> None:
        """``w norm(x) silu(z)``, x and its gain rounded to the dtype, the gate in float32, the product rounded."""
        norm, flow = layer.attention.norm, self._flow
        x, got, gate = flow.given_to(norm), flow.made_by(norm), self._gates[layer.number].float()
        plain = elementary.rms_norm(x, norm.weight.detach(), self._eps, got.dtype)
        self._tally.hold(GATED_NORM, f"{name}.norm", got, _gated(plain, gate, got.dtype))

    def _judge_norm_uncalled(self, layer: Layer, name: str, read: Claim) -> None:
        """The same, of what the mixer has to have read: its norm has not run as a module, and says not what it was."""
        norm, flow = layer.attention.norm, self._flow
        got, gate = (
            each.reshape(read.value.shape) for each in (flow.given_to(layer.output), flow.made_by(layer.inputs[1]))
        )
        plain = elementary.rms_norm_behind(read, norm.weight.detach(), self._eps, got.dtype)
        claim = _gated(plain, gate.float(), got.dtype)
        self._tally.hold(GATED_NORM, f"{name}.norm", got, claim, lambda: UNCALLED)

    def _words(self, layer: Layer, tokens: delta.Tokens, got: torch.Tensor, claim: Claim) -> str:
        before = self._before.get(layer.number)
        if before is not None and len(before) == len(got):
            read, _state = delta.recurrent(tokens, before.double())
            if float((got.float() - read.float()).norm()) <= NEARER * float((got.float() - claim.value).norm()):
                return "begins with the state that the forward before left: it is kept from one batch to the next"
        return _words(got, claim)


def _moved(x: torch.Tensor, *, by: float, generator: torch.Generator) -> torch.Tensor:
    """Each number moved at random by up to a share of itself, as rounding moves it."""
    import torch

    return x * (1 + by * (2 * torch.rand(x.shape, generator=generator, device=x.device) - 1))


def rounded_to(state: torch.Tensor) -> str:
    """The name of the 16-bit dtype of a state ``(rows, ...)``, or that all numbers of one of its rows are of."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        nonzero = (state != 0).flatten(1).sum(dim=1)
        alike = (state.to(dtype).to(state.dtype) == state).flatten(1).all(dim=1)
        if state.dtype == dtype or bool((alike & (nonzero >= ENOUGH)).any()):
            return str(dtype).removeprefix("torch.")
    return ""


def _gated(plain: Claim, gate: torch.Tensor, dtype: torch.dtype) -> Claim:
    """What a norm gives, times SiLU of a gate in float32, rounded to `dtype`."""
    factor = delta.silu(gate)
    value = plain.value * factor
    limit = plain.limit * factor.abs() + 2 * FUNCTION * SINGLE * plain.value.abs() * gate.abs()
    return Claim(value, limit + (unit(dtype) + 2 * SINGLE) * (value.abs() + limit) + underflow(dtype))


def _words(got: torch.Tensor, claim: Claim) -> str:
    """What is wrong with what was read, ``(rows, length, heads, width)``, and from where on if the first is right."""
    wrong = ~((got.float() - claim.value).abs() <= claim.limit)
    first = int(wrong.transpose(0, 1).flatten(1).any(dim=1).nonzero()[0])
    return multiple(got, claim.value) + (f" from token {first} on" if first else "")


class _Sums(NamedTuple):
    """What a mixer makes of its projections before anything is rounded, in float64.

    Attributes:
        mixed: The convolution's sums, ``(rows, length, channels)``.
        terms: The same of sizes: what the roundings of a sum are a share of, whose terms may cancel.
        decay: Logarithms, ``(rows, length, heads)``.
        share: Ditto, from 0 to 1.
        dtypes: Of the convolution, and of what ``in_proj_b`` gave.
        given: What ``in_proj_qkv`` gave.
    """

    mixed: torch.Tensor
    terms: torch.Tensor
    decay: torch.Tensor
    share: torch.Tensor
    dtypes: tuple[torch.dtype, torch.dtype]
    given: torch.dtype

    @classmethod
    def of(
        cls,
        mixer: Any,
        joint: torch.Tensor,
        tail: torch.Tensor,
        share: torch.Tensor,
        rate: torch.Tensor,
        *,
        autocast: torch.dtype | None,
    ) -> _Sums:
        """Of one call.

        Args:
            mixer: The mixer.
            joint: What ``in_proj_qkv`` gave, ``(rows, length, channels)``.
            tail: What it gave for the tokens before, as many as the convolution reaches back.
            share: What ``in_proj_b`` gave, ``(rows, length, heads)``.
            rate: What ``in_proj_a`` gave, ditto.
            autocast: To which the convolution may be cast.
        """
        import torch

        kernel = mixer.conv1d.weight.detach().squeeze(1)
        return cls(
            delta.convolved(joint, tail, kernel),
            delta.convolved(joint.abs(), tail.abs(), kernel.abs()),
            delta.decays(rate, mixer.A_log.detach(), mixer.dt_bias.detach()),
            torch.sigmoid(share.double()),
            (coarsest((joint.dtype, kernel.dtype, autocast)), share.dtype),
            joint.dtype,
        )


def _tokens(mixer: Any, sums: _Sums, *, generator: torch.Generator | None = None) -> delta.Tokens:
    """What the heads are given, in float64; with a generator, as numbers that its roundings have moved."""
    import torch

    def rounded(x: torch.Tensor, dtype: torch.dtype, places: int = 1) -> torch.Tensor:
        if generator is None:
            return x
        moves = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
        return x * (1 + (unit(dtype) + (places - 1) * SINGLE) * (2 * moves - 1))

    single, keys, repeats = torch.float32, 2 * mixer.key_dim, mixer.num_v_heads
    dtype, share_dtype = sums.dtypes
    mixed = rounded(sums.mixed, dtype)
    if generator is not None:
        mixed = mixed + (rounded(sums.terms, single, mixer.conv_kernel_size) - sums.terms)
        if dtype != sums.given:  # what is summed up, and the kernel, are rounded to it first
            mixed = mixed + 2 * (rounded(sums.terms, dtype) - sums.terms)
    mixed = rounded(delta.silu(mixed), dtype, FUNCTION)
    apart = mixed[..., :keys].reshape(*mixed.shape[:2], -1, mixer.head_k_dim)
    query, key = rounded(delta.of_unit_length(apart), single, FUNCTION).chunk(2, dim=2)
    query, key = (each.repeat_interleave(repeats // mixer.num_k_heads, dim=2) for each in (query, key))
    return delta.Tokens(
        delta.scaled(query),
        key,
        mixed[..., keys:].reshape(*mixed.shape[:2], -1, mixer.head_v_dim),
        rounded(sums.decay, single, 2 * FUNCTION) + _summed(sums.decay, generator),
        rounded(sums.share, share_dtype, FUNCTION),
    )


def _runs(mixer: Any, sums: _Sums, like: delta.Tokens, generator: torch.Generator) -> delta.Tokens:
    """What the heads are given in float32, :data:`RUNS` times behind each other as rows, each rounded by chance."""
    import torch

    rows = len(like.query)
    made = delta.Tokens(
        *(torch.empty((RUNS * rows, *each.shape[1:]), dtype=torch.float32, device=each.device) for each in like)
    )
    for run in range(RUNS):
        for whole, part in zip(made, _tokens(mixer, sums, generator=generator), strict=True):
            whole[run * rows : (run + 1) * rows] = part
    return made


def _summed(decay: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor | float:
    """What a float32 sum of logarithms over a chunk does to each: half a step of the sum up to there, at random.

    In order, such a sum is that of terms that are off by the rounding of the sum at each of them.
    """
    import torch

    if generator is None:
        return 0.0
    total = decay.abs().cumsum(dim=1)
    total[:, max(CHUNKS) :] -= total[:, : -max(CHUNKS)].clone()
    moves = torch.rand(decay.shape, generator=generator, device=decay.device, dtype=torch.float64)
    return SINGLE * total * (2 * moves - 1)
