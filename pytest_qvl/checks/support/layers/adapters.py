"""What LoRA adds to each layer, with random B: scaling, input, matrices and dropout of every active adapter."""

from __future__ import annotations

import inspect
import math
import re
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.bitwise import identity_of
from pytest_qvl.checks.support.layers.linears import ELEMENTS, packed_of, weight_rows
from pytest_qvl.checks.support.layers.tally import error_over_limit, factor
from pytest_qvl.models.adapters import adapted_layers, adapter_configs, chosen_adapter
from pytest_qvl.models.training import weights_restored
from pytest_qvl.oracles import lora, nf4
from pytest_qvl.oracles.bounds import SINGLE, Claim, unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from pytest_qvl.checks.support.layers.flow import Call
    from pytest_qvl.checks.support.layers.tally import Tally
    from pytest_qvl.models.anatomy import Parts

    Plain = Callable[[], Claim]

OPERATION, SHARED, DROPOUT = "LoRA", "LoRA's matrices", "LoRA dropout"
# Of the base layer's output, how much the random adapter adds: enough to be seen beside its rounding in 16 bits.
SHARE = 0.25
# An NF4 block's largest of 64 normally distributed weights is 2.4 standard deviations on average.
ABSMAX_OVER_DEVIATION = 2.4
CLOSE = 0.01


class Adapters:
    """The LoRA layers of a model, with what their configuration asks for.

    Args:
        parts: The model.
        asked: The ``peft.LoraConfig`` that was asked for, of the adapter that is active (the first, if several are);
            None takes the model's own.
        tally: Where findings go.
    """

    def __init__(self, parts: Parts, asked: Any, tally: Tally) -> None:
        self._parts, self._asked, self._tally = parts, asked, tally
        self._configs, self._chosen = adapter_configs(parts), chosen_adapter(parts)
        self.layers: dict[str, Any] = {}
        for name, layer in adapted_layers(parts).items():
            if reason := self._refused(layer):
                tally.leave_out(reason, name)
            else:
                self.layers[name] = layer

    def _refused(self, layer: Any) -> str:
        from torch import nn

        if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) or not hasattr(layer, "scaling"):
            # PEFT calls many of its layers Linear; the package says of which method.
            kind = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
            return f"{kind}'s {type(layer).__name__} is no LoRA of plain matrices"
        if hasattr(layer, "lora_E"):
            return "AdaLoRA"
        if layer.merged:
            return "an adapter is merged into its weights"
        if not hasattr(layer.get_base_layer(), "in_features"):
            return f"LoRA on a {type(layer.get_base_layer()).__name__}"
        variants = getattr(layer, "lora_variant", {})
        others = [type(v).__name__ for v in variants.values() if not type(v).__name__.startswith("Dora")]
        return f"the variant {others[0]} of LoRA" if others else ""

    def active(self, layer: Any) -> list[str]:
        """Names of the adapters that take part in a layer's forward."""
        return [] if layer.disable_adapters else [str(n) for n in layer.active_adapters if n in layer.lora_A]

    def dropping(self) -> dict[tuple[str, str], Any]:
        """The dropout modules of active adapters that drop anything in training, by layer and adapter."""
        return {
            (place, name): layer.lora_dropout[name]
            for place, layer in self.layers.items()
            for name in self.active(layer)
            if _dropout(layer, name)
        }

    @contextmanager
    def with_random_b(self) -> Iterator[None]:
        """Give every active adapter a random B inside the block, and every bit back after it."""
        import torch

        pairs = [(layer, name) for layer in self.layers.values() for name in self.active(layer)]
        generator = torch.Generator("cpu").manual_seed(0)
        with weights_restored(layer.lora_B[name].weight for layer, name in pairs):
            for layer, name in pairs:
                weight = layer.lora_B[name].weight
                noise = torch.randn(weight.shape, dtype=torch.float32, device="cpu", generator=generator) * _deviation(
                    layer, name
                )
                weight.data.copy_(noise.to(weight.dtype))
            yield

    def judge_sharing(self) -> None:
        """No two layers may have a matrix together, unless the configuration ties them."""
        owners: dict[Any, str] = {}
        for place, layer in self.layers.items():
            for name in self.active(layer):
                if getattr(self._configs.get(name), "ensure_weight_tying", False):
                    continue
                for kind in ("lora_A", "lora_B"):
                    weight = getattr(layer, kind)[name].weight
                    other = owners.setdefault(identity_of(weight), f"{place}.{kind}")
                    if other != f"{place}.{kind}":
                        where = other.removesuffix(f".{kind}")
                        self._tally.fail(SHARED, place, f"has one {kind} together with {where}, one pair for two")
        self._tally.count(SHARED, len(owners))

    def judge(
        self,
        place: str,
        call: Call,
        dropped: dict[str, Call],
        base: torch.Tensor,
        computed_in: dict[str, torch.dtype],
    ) -> None:
        """What a layer returns, beside what its base layer did.

        Args:
            place: Dotted name of the layer.
            call: The layer's call.
            dropped: The calls of its adapters' dropout.
            base: What the base layer returned.
            computed_in: The dtype of what the adapters' B gave, of those that ran as modules.
        """
        layer, names = self.layers[place], self.active(self.layers[place])
        if not names:
            self._tally.same(OPERATION, place, call.made, base, "adds something although no adapter is active")
            return
        x = call.given.flatten(0, -2)
        if layer.training and any(_dropout(layer, name) for name in names):
            if len(names) > 1 or layer.use_dora.get(names[0], False) or names[0] not in dropped:
                self._tally.leave_out("dropout in training of several adapters, or of DoRA", place)
                return
            x = self._judge_dropout(place, dropped[names[0]], _dropout(layer, names[0])).flatten(0, -2)
        unseen = call.autocast or (call.made.dtype if _folds_in(layer) else None)
        matrices = [self._matrices(place, layer, name, computed_in.get(name, unseen)) for name in names]
        bias = getattr(layer.get_base_layer(), "bias", None)
        bias = None if bias is None else bias.detach()
        undirected = [each._replace(gain=None) for each in matrices]
        for given, got, below in _slices(x, call.made.flatten(0, -2), base.flatten(0, -2)):
            claim = lora.adapted(given, below, bias, matrices, got.dtype)
            plain = partial(lora.adapted, given, below, None, undirected, got.dtype)
            words = partial(self._words, place, names, (got, below, claim.value), plain)
            self._tally.hold(OPERATION, place, got, claim, words)

    def _judge_dropout(self, place: str, call: Call, share: float) -> torch.Tensor:
        """In training an input of A is 0 or divided by ``1 - p``, two roundings; returns them."""
        for given, made in _slices(call.given.flatten(0, -2), call.made.flatten(0, -2)):
            kept = given.float() / (1 - share)
            value = kept.where(made != 0, 0.0)
            self._tally.hold(DROPOUT, place, made, Claim(value, 2 * (unit(made.dtype) + SINGLE) * kept.abs()))
        return call.made

    def _matrices(self, place: str, layer: Any, name: str, inside: torch.dtype | None) -> lora.Matrices:
        """Those of one adapter, rounded to the dtype that its products are computed in if it is not their own."""
        down, up = layer.lora_A[name], layer.lora_B[name]
        dtype = inside or down.weight.dtype
        up_bias = None if up.bias is None else up.bias.detach().to(dtype)
        scaling = self._scaling(place, name, down.weight.shape[0])[0]
        made = lora.Matrices(down.weight.detach().to(dtype), up.weight.detach().to(dtype), up_bias, scaling)
        if not layer.use_dora.get(name, False):
            return made
        base = layer.get_base_layer()
        stored = base.weight.quant_state.dtype if packed_of(base) else base.weight.dtype
        norms = _dora_norms(base, made, dtype, stored)
        magnitude = layer.lora_magnitude_vector[name].weight.detach()
        error = 6 * unit(dtype) + (2 * unit(stored) if stored != dtype else 0.0) + 64 * SINGLE
        return made._replace(gain=lora.dora_gain(magnitude, norms), gain_error=error)

    def _scaling(self, place: str, name: str, rank: int) -> tuple[float, float, bool]:
        """Scaling that was asked for, its alpha, and whether it is rank-stabilised."""
        config: Any = self._configs[name]
        if hasattr(self._asked, "lora_alpha") and name == self._chosen:
            config = self._asked
        alpha = _by_pattern(config.alpha_pattern, place, config.lora_alpha)
        asked_rank = _by_pattern(config.rank_pattern, place, config.r) if config is self._asked else rank
        stabilised = bool(config.use_rslora)
        return lora.scaling_of(alpha, asked_rank, rank_stabilised=stabilised), float(alpha), stabilised

    def _words(
        self, place: str, names: list[str], seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor], plain: Plain
    ) -> str:
        """What is wrong with an output: what it is, what the base layer returned, what it had to be; LoRA's alone."""
        layer, (got, base, expected) = self.layers[place], seen
        if any(_dropout(layer, name) and layer.lora_dropout[name].training for name in names) and not layer.training:
            return "drops inputs of A although the layer is in eval mode: LoRA dropout is on"
        if any(layer.use_dora.get(name, False) for name in names) and error_over_limit(got, plain()) <= 1:
            return "adds what LoRA does: DoRA's magnitude is not applied"
        added, due = got.float() - base.float(), expected - base.float()
        if bool(added.norm() < CLOSE * due.norm()):
            return "adds nothing to its base layer's output: the adapter is left out"
        times, rest = factor(added, due)
        if abs(times - 1) < CLOSE and rest <= 5 * CLOSE:
            return (
                f"adds its scaling·B(A(x)), off by {max(abs(times - 1), rest):.2g} of that: more than rounding explains"
            )
        if len(names) > 1 or not math.isfinite(times) or rest > 5 * CLOSE:
            return f"adds something else than scaling·B(A(x)) of its own input ({', '.join(names)})"
        scaling, alpha, stabilised = self._scaling(place, names[0], layer.lora_A[names[0]].weight.shape[0])
        applied, rank = times * scaling, layer.lora_A[names[0]].weight.shape[0]
        reasons = {
            "lora_alpha is taken for the scaling": alpha,
            "use_rslora is ignored": alpha / rank if stabilised else math.nan,
            "alpha / sqrt(r) is taken without use_rslora": math.nan if stabilised else alpha / math.sqrt(rank),
            "the scaling is ignored": 1.0,
            f"its rank is {rank}, not the one that was asked for": math.nan if stabilised else alpha / rank,
            "lora_alpha has doubled": 2 * scaling,
        }
        why = next((words for words, value in reasons.items() if abs(applied / value - 1) < CLOSE), "")
        return f"adds {applied:.3g}·B(A(x)) where its scaling is {scaling:.3g}{f': {why}' if why else ''}"


def _folds_in(layer: Any) -> bool:
    """Whether Unsloth's forward of a plain LoRA layer runs.

    It casts x, A and B to the dtype of what the base layer returned and adds there, by one ``addmm``
    (``lora_forward`` in unsloth_zoo/compiler.py), where PEFT computes in the dtype of A.
    """
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    return code is not None and "lora_forward" in code.co_names and not getattr(layer, "lora_variant", {})


def _slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of several matrices, as many as are held in float32 at a time."""
    step = max(1, ELEMENTS // max(tensor.shape[1] for tensor in tensors))
    for start in range(0, len(tensors[0]), step):
        yield tuple(tensor[start : start + step] for tensor in tensors)


def _dropout(layer: Any, name: str) -> float:
    holder = getattr(layer, "lora_dropout", {})
    return float(getattr(holder[name], "p", 0.0)) if name in holder else 0.0


def _by_pattern(patterns: dict[str, Any] | None, place: str, default: Any) -> Any:
    """The value of the first pattern that matches a name as its end, as PEFT reads ``rank_pattern``."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", place))
    return next(found, default)


def _deviation(layer: Any, name: str) -> float:
    """Standard deviation of B at which the adapter adds :data:`SHARE` of what the base layer gives, on white input."""
    base, down = layer.get_base_layer(), layer.lora_A[name].weight
    packed = packed_of(base)
    if packed is not None:
        import torch

        blocks = torch.arange(packed.absmax.numel(), device=packed.absmax.device)
        size = float(nf4.block_scales(packed, blocks).square().mean().sqrt()) / ABSMAX_OVER_DEVIATION
    elif base.weight.is_floating_point():
        size = float(base.weight.detach().float().square().mean().sqrt())
    else:
        size = 1 / math.sqrt(base.in_features)
    per_unit = abs(layer.scaling[name]) * float(down.detach().float().norm())
    return SHARE * size * math.sqrt(base.in_features) / per_unit if per_unit else 1.0


def _dora_norms(base: Any, adapter: lora.Matrices, dtype: torch.dtype, stored: torch.dtype) -> torch.Tensor:
    """Norm of each row of ``W + scaling * B A``, in slices; PEFT rounds both to the dtype of A."""
    import torch

    norms = []
    step = max(1, ELEMENTS // base.in_features)
    for start in range(0, base.out_features, step):
        stop = min(start + step, base.out_features)
        weight = weight_rows(base, start, stop, stored).to(dtype).float()
        update = adapter.up[start:stop].float() @ adapter.down.float()
        norms.append(torch.linalg.vector_norm(weight + adapter.scaling * update, dim=-1))
    return torch.cat(norms)
