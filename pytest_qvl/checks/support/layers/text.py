"""Attention and key-value cache of the language backbone, and what its layers hand on."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.layers.compose import (
    FUSED,
    RESIDUAL,
    judge_mlp,
    judge_norm_uncalled,
    judge_order,
    judge_residuals,
)
from pytest_qvl.checks.support.layers.linears import normed
from pytest_qvl.checks.support.layers.mixers import Mixers
from pytest_qvl.checks.support.layers.scores import other_scaling
from pytest_qvl.checks.support.layers.tally import HANDED_ON, error_over_limit, multiple
from pytest_qvl.checks.support.layers.turns import Turns
from pytest_qvl.checks.support.rounding import coarsest
from pytest_qvl.models.layers import cached_layer, head_sizes, language_layers, mergers, rope_of
from pytest_qvl.models.renamed import kv_cache_in
from pytest_qvl.oracles import attention as oracle
from pytest_qvl.oracles import elementary, rotary
from pytest_qvl.oracles.bounds import FUNCTION, SINGLE, Claim, summed, underflow, unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from pytest_qvl.checks.support.layers.flow import Call, Flow
    from pytest_qvl.checks.support.layers.tally import Tally
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.layers import Layer

    Attend = Callable[..., Claim]

KEYS_AT_ONCE = 2**24
"""Keys, one for each query head, that decode steps hold in float32 at a time: 64 MiB."""
ATTENTION, CACHE = "attention", "key-value cache"
# Of the largest number, how far rounding to 8 bits leads at most, about; in words only.
COARSE = 0.07
UNNORMED = "is not that of normed queries and keys: the modules that norm them are never called"


class Text:
    """Judges the language backbone while it runs.

    Args:
        parts: The model.
        tally: Where findings go.
        flow: What modules are given and make.
        attended: ``(rows, length)`` bool: which tokens of the prompt are no padding.
    """

    def __init__(self, parts: Parts, tally: Tally, flow: Flow, attended: torch.Tensor) -> None:
        self._parts, self._tally, self._flow, self._attended = parts, tally, flow, attended
        self._heads, _key_heads, self._width = head_sizes(parts)
        self._share = rope_of(parts).share
        self._turns = Turns(parts, tally)
        self._mixers = Mixers(parts, tally, flow, attended)
        self._history: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._before: torch.Tensor | None = None
        self._next, self._count = 0, len(parts.language_backbone.layers)
        self._between: tuple[Any, Any] = None, ()
        self._eager = parts.text_config._attn_implementation == "eager"
        self._deep = [merger.module for merger in mergers(parts) if merger.module is not parts.merger]

    def watch(self) -> None:
        """Put hooks on the backbone."""
        flow, backbone = self._flow, self._parts.language_backbone
        flow.before(backbone, self._begin)
        flow.watch(backbone.rotary_emb, self._turns.judge)
        for layer in language_layers(self._parts):
            flow.record(layer.parts)
            if layer.attends:
                flow.watch(layer.attention, partial(self._judge_attention, layer))
            else:
                self._mixers.watch(layer)
                flow.watch(layer.attention, partial(self._mixers.judge, layer))
            flow.watch(layer.mlp.module, partial(judge_mlp, self._tally, flow, layer.mlp))
            flow.watch(layer.module, partial(self._judge_layer, layer))
        flow.watch(backbone.norm, self._judge_end)
        flow.watch(self._parts.lm_head, self._judge_head)

    def restart(self, attended: torch.Tensor | None = None) -> None:
        """Forget the keys, values and states of the sequence so far; other prompts follow if `attended` is given."""
        if attended is not None:
            self._attended = attended
        self._history.clear()
        self._mixers.restart(self._attended)

    def _judge_layer(self, layer: Layer, call: Call) -> None:
        if self._before is not None:
            self._judge_handed_on(layer.name, call.given, self._before, layer.number - 1)
        judge_order(self._tally, layer, self._next)
        self._next = layer.number + 1
        judge_residuals(self._tally, self._parts, self._flow, layer)
        # Transformers 4 adds the features in place.
        added_to = self._between[0] is not None and layer.number < len(self._between[1])
        self._before = call.made.clone() if added_to else call.made
        self._flow.forget((layer.module,))

    def _judge_end(self, call: Call) -> None:
        """The last norm is given what the last layer returned."""
        root = self._parts.roots["language"]
        if 0 < self._next < self._count:
            self._tally.fail(HANDED_ON, f"{root}.layers.{self._next}", "is never called, as if it were not there")
        if self._before is not None:
            self._judge_handed_on(f"{root}.norm", call.given, self._before, self._count - 1)
        self._before = None

    def _begin(self, _args: Any, kwargs: Any) -> None:
        self._before, self._next = kwargs.get("inputs_embeds"), 0
        self._flow.forget((self._parts.language_backbone.norm,))
        self._between = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds") or ()
        if self._deep and self._flow.seen(self._deep):
            self._judge_deepstack(self._between[1])
            self._flow.forget(self._deep)

    def _judge_deepstack(self, given: Sequence[torch.Tensor]) -> None:
        """The backbone is given what each of Qwen3-VL's DeepStack mergers made of the images."""
        name, made = self._parts.roots["language"], [self._flow.made_by(merger) for merger in self._deep]
        if len(given) != len(made):
            words = f"is given the features of {len(given)} DeepStack mergers, where the tower has {len(made)}"
            self._tally.fail(HANDED_ON, name, words)
        for number, (got, expected) in enumerate(zip(given, made, strict=False)):
            words = f"is not given what DeepStack's merger {number} made"
            self._tally.handed_on(name, got, expected.to(got.dtype), words)

    def _judge_handed_on(self, name: str, given: torch.Tensor, made: torch.Tensor, number: int) -> None:
        """What comes after a layer is given its output; Qwen3-VL adds features of the tower at visual tokens first."""
        places, features = self._between
        made = made.to(given.device)
        words = "is not given what the layer before it returned" if number >= 0 else "is not given the embedded tokens"
        if places is None or not 0 <= number < len(features):
            self._tally.handed_on(name, given, made, words)
            return
        places = places.to(given.device)
        self._tally.handed_on(name, given[~places], made[~places], words)
        claim = elementary.added(made[places], features[number].to(made))
        sum_of = f"is not given what layer {number} returned plus the features of DeepStack's merger {number}"
        self._tally.hold(RESIDUAL, name, given[places], claim, lambda: sum_of)

    def _judge_head(self, call: Call) -> None:
        """The head is given the last norm's output, of all tokens or the last ones."""
        norm, name, behind = self._parts.language_backbone.norm, self._parts.roots["lm_head"], -call.given.shape[1]
        if self._flow.seen((norm,)):
            last = self._flow.made_by(norm)[:, behind:]
            self._tally.handed_on(name, call.given, last, "is not given what the last norm returned")
        elif self._before is not None and self._next == self._count:
            root, last = self._parts.roots["language"], self._before[:, behind:].to(call.given.device)
            judge_norm_uncalled(self._tally, self._parts, f"{root}.norm", norm, x=last, got=call.given)
            self._before = None

    def _judge_attention(self, layer: Layer, call: Call) -> None:
        flow, tally, name = self._flow, self._tally, f"{layer.name}.self_attn"
        if not flow.seen((*layer.inputs, layer.output)):
            tally.leave_out(FUSED, name)
            flow.forget((*layer.inputs, layer.output, *layer.head_norms))
            return
        for linear in layer.inputs:
            tally.handed_on(name, flow.given_to(linear), call.given, "does not give its own input to q, k and v")
        tally.handed_on(name, call.made, flow.made_by(layer.output), "does not return what o_proj does")
        turns = call.kwargs.get("position_embeddings")
        if turns is None or not self._turns.known:
            tally.leave_out("rotary positions do not come from the backbone's own module", name)
            return
        for got, made in zip(turns, self._turns.made, strict=True):
            tally.handed_on(name, got, made, "is given other rotary positions than the backbone's")
        query, key, value = self._projected(layer, name)
        loose = self._unnormed(layer, query.dtype)
        cosines, sines = (self._turns.combined(each)[:, None] for each in turns)
        query, new = rotary.rotated_in_part(query, cosines, sines), rotary.rotated_in_part(key, cosines, sines)
        held = kv_cache_in(call.kwargs)
        keys, values = (new, value) if held is None else self._extended(layer.number, new, value)
        cache = None if held is None else cached_layer(held, layer.number)
        if held is not None and cache is None:
            tally.leave_out(f"the keys and values in a {type(held).__name__} of this kind", name)
        exact = cache is None or self._judge_cache(name, cache, keys, values, loose)
        # Where a kernel rotates in another way than operation by operation, queries are known to as much as keys are.
        rotated, normed_too = 6 * unit(query.dtype), 4 * (3 * unit(query.dtype) + loose)  # sums of two elements of each
        inexact = (0.0, normed_too) if loose else (0.0 if exact else rotated, 0.0)
        rows, _heads, queries, width = query.shape
        got = flow.given_to(layer.output).view(rows, queries, self._heads, width).transpose(1, 2)
        gate = self._gate(layer)
        claims = zip(
            *(
                self._claims(layer, *_rounded((query, keys, values), inside, inexact))
                for inside in _computed_in(query.dtype, got.dtype, call.autocast, is_gated=gate is not None)
            ),
            strict=True,
        )
        if layer.attention.training and getattr(self._parts.text_config, "attention_dropout", 0.0):
            tally.leave_out("attention drops weights in training", name)
            claims = zip()
        for row, each_way in enumerate(claims):
            looked = each_way[0][0]
            ways = [plain if gate is None else partial(_gated, plain, gate[row][:, looked]) for _, plain in each_way]
            part = got[row][:, looked]
            words = partial(_unnormed_words if loose else _words, part, ways[0], width**-0.5)
            tally.hold_to_one(ATTENTION, name, part, (attend(width**-0.5) for attend in ways), words)
        flow.forget((*layer.inputs, layer.output, *layer.head_norms))

    def _gate(self, layer: Layer) -> torch.Tensor | None:
        """What a layer multiplies its attention by, ``(rows, heads, length, width)``; None for a family without."""
        import torch

        joint = self._flow.made_by(layer.inputs[0])
        if joint.shape[-1] == self._heads * self._width:
            return None
        split = joint.view(*joint.shape[:-1], self._heads, 2 * self._width)
        return torch.sigmoid(split[..., self._width :]).transpose(1, 2)

    def _projected(self, layer: Layer, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values by head, ``(rows, heads, length, width)``, after their norms."""
        made = []
        for place, linear in enumerate(layer.inputs):
            joint = self._flow.made_by(linear)
            split = joint.view(*joint.shape[:-1], -1, self._width)
            if place == 0 and joint.shape[-1] != self._heads * self._width:  # each head's query, then its gate
                split = joint.view(*joint.shape[:-1], self._heads, 2 * self._width)[..., : self._width]
            if place < len(layer.head_norms):
                norm = layer.head_norms[place]
                if self._flow.seen((norm,)):
                    self._tally.handed_on(name, self._flow.given_to(norm), split, "norms something else than q or k")
                    split = self._flow.made_by(norm).view(split.shape)
                else:
                    split = normed(self._parts, name, norm, split, split.dtype).value.to(split.dtype)
            made.append(split.transpose(1, 2))
        return made[0], made[1], made[2]

    def _unnormed(self, layer: Layer, dtype: torch.dtype) -> float:
        """How far keys and queries may be off, relative to their elements, whose norms did not run as modules.

        As :func:`~.elementary.rms_norm` says, and one rounding of what it claims.
        """
        if self._flow.seen(layer.head_norms):
            return 0.0
        return 3 * unit(dtype) + summed(self._width) + 8 * SINGLE

    def _extended(self, number: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if number in self._history:
            old = self._history[number]
            key, value = torch.cat((old[0], key), dim=2), torch.cat((old[1], value), dim=2)
        self._history[number] = key, value
        return key, value

    def _judge_cache(self, name: str, cache: Any, keys: torch.Tensor, values: torch.Tensor, loose: float) -> bool:
        """Whether the cache holds the keys and values of every token so far; returns whether the keys agree bitwise.

        Limit: each key is the sum of two products, three roundings in its dtype, and `loose` before them where its norm
        did not run as a module; values are handed on as they are.
        """
        import torch

        tally = self._tally
        if cache.keys.shape != keys.shape or cache.values.shape != values.shape:
            tally.fail(CACHE, name, f"holds keys of {cache.keys.shape[-2]} tokens after {keys.shape[2]}")
            return False
        single = keys.float()
        turned = int(single.shape[-1] * self._share)
        partner = torch.zeros_like(single)
        partner[..., :turned] = torch.cat(single[..., :turned].chunk(2, dim=-1)[::-1], dim=-1)
        limit = (3 * unit(keys.dtype) + loose) * (single.abs() + partner.abs()) + underflow(keys.dtype)
        words = partial(_stale, cache.keys, keys, "keys")
        tally.hold(CACHE, name, cache.keys, Claim(single, limit), (lambda: UNNORMED) if loose else words)
        tally.same(CACHE, name, cache.values, values, _stale(cache.values, values, "values"))
        return bool(torch.equal(cache.keys, keys))

    def _claims(
        self, layer: Layer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inexact: tuple[float, float]
    ) -> Iterator[tuple[torch.Tensor, Attend]]:
        """Per row which queries are no padding, and what attention has to give them: ``attend(scaling)``.

        ``attend(scaling, everyone=True)`` looks at padding as well, ``attend(scaling, later=True)`` at later tokens.
        """
        import torch

        queries, tokens = query.shape[2], keys.shape[2]
        attended = torch.ones((len(query), tokens), dtype=torch.bool, device=query.device)
        attended[:, : self._attended.shape[1]] = self._attended
        kinds = getattr(self._parts.text_config, "layer_types", None)
        sliding = kinds is not None and kinds[layer.number] == "sliding_attention"
        allowed = oracle.causal(attended, queries, self._parts.text_config.sliding_window if sliding else None)
        every = oracle.causal(torch.ones_like(attended), queries)
        attention = partial(oracle.attention, eager=self._eager, inexact=inexact[0], apart=inexact[1])
        right = query.shape[-1] ** -0.5
        steps = list(_one_query_a_row(query, keys, values, allowed, partial(attention, scaling=right)))
        for row, seen in enumerate(attended[:, tokens - queries :]):

            def attend(
                scaling: float, *, everyone: bool = False, later: bool = False, row: int = row, seen: Any = seen
            ) -> Claim:
                if steps and scaling == right and not everyone and not later:
                    return steps[row]
                looked = every[row] if everyone else attended[row].expand_as(every[row]) if later else allowed[row]
                return attention(query[row][:, seen], keys[row], values[row], looked[seen], scaling)

            yield seen, attend


def _unnormed_words(*_seen: Any) -> str:
    return UNNORMED


def _computed_in(
    given: torch.dtype, made: torch.dtype, autocast: torch.dtype | None, *, is_gated: bool
) -> dict[torch.dtype, None]:
    """To what attention rounds queries, keys and values: it gives what it makes in that (kernels, autocast).

    Only a gate, whose dtype the product may have, hides it; then autocast around the module tells first.
    """
    told = coarsest((given, made))
    return dict.fromkeys((coarsest((told, autocast)), told) if is_gated else (told,))


def _rounded(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], dtype: torch.dtype, inexact: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[float, float]]:
    """Queries, keys and values in a dtype, and how inexact they are: what was before may be rounded the other way."""
    query, keys, values = (each.to(dtype) for each in inputs)
    flips = 4 * unit(dtype) if any(inexact) and query.dtype != inputs[0].dtype else 0.0
    return query, keys, values, (inexact[0] + flips, inexact[1])


def _one_query_a_row(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor, attend: Attend
) -> Iterator[Claim]:
    """What attention has to give each row in a decode step, in which rows are so many heads more; else nothing."""
    import torch

    if not query.shape[2] == 1 < keys.shape[2]:
        return
    heads = query.shape[1]
    at_once = max(1, KEYS_AT_ONCE // (heads * keys[0, 0].numel()))
    for some in zip(*(torch.split(each, at_once) for each in (query, keys, values, allowed)), strict=True):
        claim = attend(*(each.flatten(0, 1) for each in some[:3]), some[3].repeat_interleave(heads, dim=0))
        yield from map(Claim, *(each.view(-1, heads, *each.shape[1:]) for each in claim))


def _gated(attend: Attend, gate: torch.Tensor, scaling: float, **looks: bool) -> Claim:
    """What attention gives, times a gate in its own dtype: gate and product are rounded once each."""
    plain, factor = attend(scaling, **looks), gate.float()
    value = plain.value * factor
    rounding = 2 * unit(gate.dtype) * (value.abs() + plain.limit * factor) + FUNCTION * SINGLE * plain.value.abs()
    return Claim(value, plain.limit * factor + rounding + underflow(gate.dtype))


def _words(got: torch.Tensor, attend: Attend, scaling: float, _expected: torch.Tensor) -> str:
    claim = attend(scaling)
    if error_over_limit(got, attend(scaling, everyone=True)) <= 1:
        return "attends to padding too"
    if error_over_limit(got, attend(scaling, later=True)) <= 1:
        return "attends to later tokens too: it is not causal"
    return other_scaling(got, claim, attend, scaling) or (
        f"{multiple(got, claim.value)}: softmax(q·kᵀ / sqrt(d))·v over itself and the tokens before it"
    )


def _stale(found: torch.Tensor, expected: torch.Tensor, what: str) -> str:
    """What is wrong with cached keys or values ``(rows, heads, length, width)``."""
    away = (found.float() - expected.float()).abs().amax(dim=(0, 1, 3))
    wrong = (away > 0).nonzero().flatten().tolist()
    if not wrong:
        return ""
    at = wrong[-1]
    size = expected.float().abs().amax()
    if bool((away <= COARSE * size).all()):
        return f"holds {what} that are off by up to {float(away.max() / size):.2g} of the largest: they were rounded"
    if at and bool((found[:, :, at].float() - expected[:, :, at - 1].float()).abs().amax() <= 1e-2 * size):
        return f"holds at position {at} the {what} of position {at - 1}: the cache is one step stale"
    return f"holds other {what} than those that were computed, at {len(wrong)} positions, position {wrong[0]} the first"
