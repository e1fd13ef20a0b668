"""An adapter that arrived is worth something only if it is made of finite numbers and changes the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.lora import SINGULAR_VALUES, rewrites_base, start_at_zero
from pytest_qvl.checks.support.lora_request import frozen_on_purpose
from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.models.adapters import adapted_layers, adapter_configs, auxiliary_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from pytest_qvl.evidence import Judge
    from pytest_qvl.models.anatomy import Parts

# Per layer: what multiplies the input first, and what multiplies the result.
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def judge_numbers(judge: Judge, saved: Mapping[str, torch.Tensor], what: str) -> None:
    """Hold every tensor of a file to a floating-point dtype.

    PEFT copies whole numbers into its matrices without a word: what an 8-bit export keeps as -127 to 127 arrives as
    weights of that size, without the scale that belongs to them.
    """
    whole = {name: str(value.dtype).removeprefix("torch.") for name, value in saved.items() if not _is_float(value)}
    judge.equal(
        f"{what}: tensors that are no floating-point numbers",
        len(whole),
        0,
        else_say=(
            f"{len(whole)} of {len(saved)} tensors of {what} are {tally(whole.values())}: {some(list(whole))}; PEFT "
            "takes such numbers as they are, without a scale: save the adapter in bfloat16 or float32"
        ),
    )


def judge_finite(judge: Judge, held: Mapping[str, torch.Tensor], what: str) -> None:
    """Hold every adapter tensor to finite values; one NaN makes every logit NaN."""
    bad = [name for name, value in held.items() if not _all_finite(value)]
    judge.equal(
        "adapter tensors with NaN or infinity",
        len(bad),
        0,
        else_say=(
            f"{len(bad)} of {len(held)} adapter tensors of {what} hold NaN or infinity: {some(bad)}; its training "
            "diverged, so take an earlier checkpoint"
        ),
    )


def judge_effect(judge: Judge, parts: Parts, adapter: str, what: str) -> None:
    """Hold an adapter that was saved to doing anything at all.

    What a layer adds is ``scaling * B A x``. It is zero for every ``x`` exactly if the factor is zero or no rank has
    both a row of A and a column of B with a value in it (two ranks that cancel each other are as good as never met).
    An adapter whose training has begun has no such layer, except where no training sample passed: in a vision tower
    trained on text. So all layers without effect are a finding, and some are a note.

    Not judged: layers with DoRA, whose magnitude acts while B is zero.
    """
    layers = {name: layer for name, layer in adapted_layers(parts).items() if _has_pair(layer, adapter)}
    if any(adapter in getattr(layer, "lora_magnitude_vector", ()) for layer in layers.values()):
        judge.note("DoRA: not judged whether the adapter does anything, because its magnitude acts while B is zero")
        return
    idle = {name: why for name, layer in layers.items() if (why := _why_idle(parts, layer, adapter))}
    judge.report("adapted layers that do something", len(layers) - len(idle))
    if not idle:
        return
    sentence = f"{len(idle)} of {len(layers)} adapted layers of {what} add nothing to the model, whatever goes in"
    if len(idle) < len(layers) or _copies_differ(parts, adapter):
        judge.note(f"{sentence}: {some(list(idle))} ({next(iter(idle.values())).why})")
        return
    by_reason: dict[_Idle, list[str]] = {}
    for name, reason in idle.items():
        by_reason.setdefault(reason, []).append(name)
    told = "; ".join(f"{reason.why} in {len(names)}, first {names[0]}" for reason, names in by_reason.items())
    causes = "; ".join(dict.fromkeys(reason.cause for reason in by_reason))
    judge.problem(f"the adapter does nothing: {sentence} ({told}); {causes}")


@dataclass(frozen=True)
class _Idle:
    """Why a layer adds nothing, and what usually makes it so."""

    why: str
    cause: str


_UNTRAINED = "it was saved before its training, or its matrices were lost on the way"
_LOST = "its matrices were lost on the way, since training does not make them so"
_OTHER_ALPHA = "put back the lora_alpha of the training (alpha_pattern too) into adapter_config.json"
_NO_ALPHA = "a training with it learns nothing: train again with a lora_alpha above 0"
_SCALED_AWAY = "it was scaled so after it was loaded, as by set_scale(): load it again"


def _why_idle(parts: Parts, layer: Any, adapter: str) -> _Idle | None:
    dead = _why_dead(parts, layer, adapter)
    if layer.scaling.get(adapter, 1):
        return dead
    if layer.lora_alpha.get(adapter):
        return _Idle("its scaling is 0", _SCALED_AWAY)
    return _Idle("lora_alpha is 0", _NO_ALPHA if dead and dead.cause == _UNTRAINED else _OTHER_ALPHA)


def _why_dead(parts: Parts, layer: Any, adapter: str) -> _Idle | None:
    """Why no rank has values in all of its matrices; None where one has."""
    config = adapter_configs(parts)[adapter]
    for pair in _PAIRS:
        if adapter not in getattr(layer, pair[0], ()):
            continue
        kinds = {kind for kind in (*pair, SINGULAR_VALUES) if adapter in getattr(layer, kind, ())}
        trained = kinds - {*frozen_on_purpose(config, None)}
        started = () if rewrites_base(config) else start_at_zero(trained)
        down, up = (_values(getattr(layer, kind)[adapter]) for kind in pair)
        rows, columns = (down != 0).any(dim=1), (up != 0).any(dim=0)
        if getattr(getattr(layer, pair[1])[adapter], "bias", None) is not None:
            return None  # lora_bias: B adds something of its own
        for kind, filled in ((pair[1], columns), (pair[0], rows)):
            if not bool(filled.any()):
                short = kind.removeprefix("lora_") if "embedding" not in kind else kind
                return _Idle(f"{short} is all zero", _UNTRAINED if kind in {*started} & trained else _LOST)
        return _why_no_rank(rows & columns, _values(layer.lora_E[adapter]) if SINGULAR_VALUES in kinds else None)
    return None


def _why_no_rank(ranks: torch.Tensor, factors: torch.Tensor | None) -> _Idle | None:
    """Ranks with a row of A and a column of B; AdaLoRA multiplies each by a factor, ``(rank, 1)``, in between."""
    if not bool(ranks.any()):
        return _Idle("where A has a row, B has no column", _LOST)
    if factors is None:
        return None
    own = (factors != 0).any(dim=1)
    if not bool(own.any()):
        return _Idle("E is all zero", _UNTRAINED)
    return None if bool((ranks & own).any()) else _Idle("E is zero wherever A has a row and B a column", _LOST)


def _copies_differ(parts: Parts, adapter: str) -> bool:
    """Whether a trained copy or token row holds anything else than the base model does."""
    import torch

    for wrapper in auxiliary_layers(parts).values():
        copies = getattr(wrapper, "modules_to_save", None)
        if copies is not None and adapter in copies:
            own = dict(wrapper.original_module.named_parameters())
            if any(not torch.equal(p.to(own[n].dtype), own[n]) for n, p in copies[adapter].named_parameters()):
                return True
        tokens = getattr(wrapper, "token_adapter", None)
        if tokens is not None and adapter in tokens.trainable_tokens_delta:
            delta, rows = tokens.trainable_tokens_delta[adapter], tokens.trainable_tokens_original[adapter]
            if not torch.equal(delta.to(rows.dtype), rows):
                return True
    return False


def _has_pair(layer: Any, adapter: str) -> bool:
    return any(adapter in getattr(layer, kind, ()) for pair in _PAIRS for kind in pair)


def _values(entry: Any) -> torch.Tensor:
    values: torch.Tensor = getattr(entry, "weight", entry)
    return values.detach()


def _is_float(value: torch.Tensor) -> bool:
    return bool(value.is_floating_point())


def _all_finite(value: torch.Tensor) -> bool:
    import torch

    return not _is_float(value) or bool(torch.isfinite(value.detach().float()).all())
