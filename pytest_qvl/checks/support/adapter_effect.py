"""An adapter that arrived is worth something only if it is made of finite numbers and changes the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.models.adapters import adapted_layers, auxiliary_layers

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
    idle = {name: why for name, layer in layers.items() if (why := _why_idle(layer, adapter))}
    judge.report("adapted layers that do something", len(layers) - len(idle))
    if not idle:
        return
    first = next(iter(idle.values()))
    sentence = f"{len(idle)} of {len(layers)} adapted layers of {what} add nothing to the model, whatever goes in"
    if len(idle) < len(layers) or _copies_differ(parts, adapter):
        judge.note(f"{sentence}: {some(list(idle))} ({first})")
        return
    judge.problem(
        f"the adapter does nothing: {sentence} ({first} in {list(idle.values()).count(first)}, first {next(iter(idle))}"
        "); it was saved before its training, or its matrices were lost on the way"
    )


def _why_idle(layer: Any, adapter: str) -> str:
    if not layer.scaling.get(adapter, 1):
        return "lora_alpha is 0"
    for first, second in _PAIRS:
        if adapter not in getattr(layer, first, ()):
            continue
        down, up = (_values(getattr(layer, kind)[adapter]) for kind in (first, second))
        rows, columns = (down != 0).any(dim=1), (up != 0).any(dim=0)
        if getattr(getattr(layer, second)[adapter], "bias", None) is not None:
            return ""  # lora_bias: B adds something of its own
        if not bool(columns.any()):
            return "B is all zero" if first == "lora_A" else f"{second} is all zero"
        if not bool(rows.any()):
            return "A is all zero" if first == "lora_A" else f"{first} is all zero"
        return _why_no_rank(rows & columns, _values(layer.lora_E[adapter]) if _has_values(layer, adapter) else None)
    return ""


def _why_no_rank(ranks: torch.Tensor, factors: torch.Tensor | None) -> str:
    """Ranks with a row of A and a column of B; AdaLoRA multiplies each by a factor, ``(rank, 1)``, in between."""
    if not bool(ranks.any()):
        return "where A has a row, B has no column"
    if factors is None:
        return ""
    own = (factors != 0).any(dim=1)
    if not bool(own.any()):
        return "E is all zero"
    return "" if bool((ranks & own).any()) else "E is zero wherever A has a row and B a column"


def _has_values(layer: Any, adapter: str) -> bool:
    return adapter in getattr(layer, "lora_E", ())


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
