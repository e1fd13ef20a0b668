"""An adapter that has learned nothing, or is switched off, changes nothing."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.lora import (
    GRADIENT_INITIALISATION,
    foreign_types,
    matrix_of,
    no_adapter,
    rewrites_base,
    zero_initialised_matrices,
)
from pytest_qvl.checks.support.unpacked_weights import require_unpacked_weights
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.adapters import (
    AdapterSlot,
    adapted_layers,
    adapter_configs,
    adapter_parameters,
    copies_disabled,
    is_merged,
    original_module,
)
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.attributes import attributes_replaced
from pytest_qvl.models.autocast import autocast_dtype, autocast_to
from pytest_qvl.models.compiled import uncompiled
from pytest_qvl.models.fingerprint.digests import digests
from pytest_qvl.models.quantized import linear_states
from pytest_qvl.models.state import preserved
from pytest_qvl.models.training import checkpointing, trained_biases, trained_copies

if TYPE_CHECKING:
    import torch
    from torch import nn

    Batch = Mapping[str, torch.Tensor]

_MAGNITUDE = "lora_magnitude_vector"
_SEED = 20_311


@check(promise=3)
def adapter_neutrality(model: Any, batches: Batch | Sequence[Batch]) -> Evidence:
    """Prove that an adapter which has learned nothing, or is switched off, leaves the logits bitwise alone.

    Three computations of the same logits, in eval and in train mode, over the same kernels, compared for equality
    (docs/limits.md#exact; a zero equals a zero of the other sign):

    - the base model, its own layers put back in place of PEFT's, and twice: where its own kernels do not repeat
      themselves, equality proves nothing and the check says so. It runs under the autocast that the wrapped model's
      forward brings (Accelerate's);
    - the wrapped model inside PEFT's ``disable_adapter()``;
    - the wrapped model with its adapter on and B = 0 (the adapter's own B is set aside and put back bitwise); not with
      DoRA, whose rounding alone moves logits.

    What torch.compile has compiled is run as it was written, since it rounds by what it fused. Said and not judged:
    that initialisations which write into the base weights (OLoRA, PiSSA, CorDA, LoftQ, LoRA-GA) leave a base model that
    is no longer the one loaded, and how far the adapter as found moves the logits.

    Args:
        model: The model wrapped by PEFT; its adapter may be fresh or trained.
        batches: Model inputs, at least one with ``pixel_values``; labels are ignored.

    Raises:
        CheckFailed: Logits differ; names the first adapted layer whose output does.
        CannotJudge: No images in any batch, a merged adapter, repacked weights or kernels that do not
            repeat.
        ValueError: The model is not wrapped, or has no adapter.
    """
    import torch

    parts = anatomy(model)
    parameters = adapter_parameters(parts)
    if not parameters:
        raise InputError(no_adapter(parts))
    given = [batches] if isinstance(batches, Mapping) else list(batches)
    if not any("pixel_values" in batch for batch in given):
        raise CannotJudge("no batch has images (pixel_values), so the adapter would only be seen on text")
    if is_merged(parts):
        raise CannotJudge("the adapter is merged into the base weights, so there is no base model to compare with")
    require_unpacked_weights(parts)
    judge = Judge("adapter_neutrality", "an untrained or disabled adapter changes nothing")
    found = {name: p.detach().to("cpu", copy=True) for name, p in zero_initialised_matrices(parameters).items()}
    zero = not any(bool(value.any()) for value in found.values())
    fresh = zero and not trained_copies(parts)
    probe = _Probe(parts, given, zero_initialised_matrices(parameters), found)
    modes = _modes(judge, parts)
    unjudged = _not_zero_by_b(parts, parameters)
    with (
        preserved(model),
        torch.no_grad(),
        checkpointing(parts, False),
        uncompiled() as compiled,
    ):
        _enable(parts)
        for mode in modes:
            for number in range(len(given)):
                probe.judge_disabled(judge, mode, number)
                if not unjudged:
                    probe.judge_zero(judge, mode, number)
        if unjudged or not fresh:
            judge.report("adapter as found: largest logit change", probe.effect())
    if compiled:
        judge.note("what torch.compile has compiled was run as it was written, since compiled code rounds as it fuses")
    if unjudged:
        judge.note(unjudged)
    if trained_biases(parts):
        judge.note(
            f"{len(trained_biases(parts))} biases of the base model are trained with the adapter (bias of its "
            "configuration) and stay as trained while it is off: the base model here has the trained ones"
        )
    _note_initialisation(judge, parts, fresh=fresh)
    _note_gradient_initialisation(judge, parts, zero=zero)
    return judge.verdict()


def _not_zero_by_b(parts: Parts, parameters: Mapping[str, nn.Parameter]) -> str:
    """Why the adapter is not zero where B is; empty for LoRA."""
    if any(matrix_of(name) == _MAGNITUDE for name in parameters):
        return (
            "DoRA: B = 0 is not judged, because the magnitude vector scales the base output, by a ratio "
            "that rounding keeps from 1 even before training"
        )
    others = foreign_types(parts)
    return (
        f"{', '.join(others)}: only the disabled adapter is judged, because it has no B as LoRA has" if others else ""
    )


class _Probe:
    """Runs one model as base, disabled and with B = 0 on the same inputs."""

    def __init__(
        self,
        parts: Parts,
        batches: Sequence[Batch],
        gate_parameters: Mapping[str, nn.Parameter],
        found: Mapping[str, torch.Tensor],
    ) -> None:
        self._parts = parts
        self._inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
        self._gates = gate_parameters
        self._found = found
        self._slot = AdapterSlot.of(parts.wrapped)
        self._base: dict[tuple[str, int], torch.Tensor] = {}
        self._autocast: torch.dtype | None = None  # what the wrapper's forward ran the base model under

    def judge_disabled(self, judge: Judge, mode: str, number: int) -> None:
        self._compare(judge, "disabled adapter", self._disabled, mode, number)

    def judge_zero(self, judge: Judge, mode: str, number: int) -> None:
        self._compare(judge, "adapter with B = 0", self._zeroed, mode, number)

    def effect(self) -> float:
        """Largest change of a logit in eval mode by the adapter as it was found."""
        return max(
            _largest(self._run(number, "eval"), self._reference("eval", number)) for number in range(len(self._inputs))
        )

    def _run(self, number: int, mode: str) -> torch.Tensor:
        """Logits of the wrapped model: the base model's own, where the wrapper only hands them on in a wider dtype."""
        import torch

        made: dict[str, torch.Tensor] = {}
        device, base = self._parts.device.type, self._parts.base
        own = base.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._autocast = autocast_dtype(device)
            output = own(*args, **kwargs)
            made["logits"] = output.logits
            return output

        with attributes_replaced([(base, "forward", forward)]):
            returned = self._logits(self._parts.wrapped, number, mode)
        inner = made.get("logits", returned)
        wider = torch.promote_types(inner.dtype, returned.dtype) == returned.dtype
        return inner if wider and _same(inner.to(returned.dtype), returned) else returned

    def _logits(self, model: Any, number: int, mode: str) -> torch.Tensor:
        import torch

        model.train(mode == "train")
        torch.manual_seed(_SEED)
        self._parts.core.rope_deltas = None
        logits: torch.Tensor = model(**self._inputs[number], use_cache=False).logits
        return logits

    def _bare(self, number: int, mode: str) -> torch.Tensor:
        self._slot.detach()
        try:
            # The wrapper passes everything through, but may look for its adapter first.
            with autocast_to(self._parts.device.type, self._autocast):
                return self._logits(self._parts.base, number, mode)
        finally:
            self._slot.attach()

    def _disabled(self, number: int, mode: str) -> torch.Tensor:
        with warnings.catch_warnings():
            # PEFT's tuners_utils.py; what it says about trained biases is said by adapter_census.
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
            with _disabled(self._parts):
                return self._run(number, mode)

    def _zeroed(self, number: int, mode: str) -> torch.Tensor:
        try:
            for parameter in self._gates.values():
                parameter.zero_()
            with copies_disabled(self._parts):
                return self._run(number, mode)
        finally:
            for name, parameter in self._gates.items():
                parameter.copy_(self._found[name])

    def _reference(self, mode: str, number: int) -> torch.Tensor:
        if (mode, number) not in self._base:
            first = self._bare(number, mode).cpu()
            second = self._bare(number, mode)
            if not _same(first, second):
                raise CannotJudge(
                    f"two forwards of the base model alone ({mode} mode, batch {number}) differ by up to "
                    f"{_largest(first, second):.4g}: this device's kernels do not repeat themselves bitwise"
                )
            self._base[mode, number] = first
        return self._base[mode, number]

    def _compare(self, judge: Judge, what: str, run: Any, mode: str, number: int) -> None:
        logits = run(number, mode)  # first, since it says what the base model runs under
        base = self._reference(mode, number)
        if logits.dtype != base.dtype:
            judge.problem(f"{what} ({mode} mode): logits are {logits.dtype} but {base.dtype} in the base model")
        same = _same(base, logits)
        name = f"{what}, {mode} mode: largest logit change"
        if same:
            judge.equal(name, 0.0, 0.0, else_say="")
            return
        differ = sum(int((one != other).sum()) for one, other in _by_rows(base, logits))
        judge.equal(
            name,
            _largest(base, logits) or float("nan"),
            0.0,
            else_say=(
                f"{what} ({mode} mode, batch {number}) changes {differ:,} of {base.numel():,} logits of the "
                f"base model; {self._first_difference(run, mode, number)}"
            ),
        )

    def _first_difference(self, run: Any, mode: str, number: int) -> str:
        base = self._layer_outputs(self._bare, mode, number)
        for place, value in self._layer_outputs(run, mode, number).items():
            if base.get(place) != value:
                return f"first at the output of {place}"
        return "no adapted layer's output differs, so it comes from elsewhere in the model"

    def _layer_outputs(self, run: Any, mode: str, number: int) -> dict[str, int]:
        """Digest of each adapted layer's output in order of the calls, whichever layer is in its place."""
        seen: dict[str, int] = {}
        handles = []

        def watch(place: str) -> Any:
            def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
                seen[place] = digests([("", output + 0)])[""]  # + 0 turns a negative zero into a positive one

            return hook

        for place, (_, _, layer) in self._slot.layers.items():
            module = original_module(layer) if run == self._bare else layer
            handles.append(module.register_forward_hook(watch(place)))
        try:
            run(number, mode)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of every element; NaN equals NaN, and zeros are equal whatever their sign."""
    import torch

    return a.dtype == b.dtype and all(
        bool(((one == other) | (torch.isnan(one) & torch.isnan(other))).all()) for one, other in _by_rows(a, b)
    )


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    import torch

    return float(torch.stack([(one.float() - other.float()).abs().max() for one, other in _by_rows(a, b)]).max())


def _by_rows(kept: torch.Tensor, logits: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Row by row on the device of the second: logits are as many as a vocabulary has words, for every token."""
    for one, other in zip(kept, logits, strict=True):
        yield one.to(other.device), other


def _enable(parts: Parts) -> None:
    if parts.is_peft:
        layers: Any = parts.wrapped.base_model
        layers.enable_adapter_layers()
    else:
        parts.base.enable_adapters()


@contextmanager
def _disabled(parts: Parts) -> Iterator[None]:
    """Adapters off the way users switch them off: by PEFT, or by Transformers where ``add_adapter`` was used."""
    if parts.is_peft:
        model: Any = parts.wrapped
        with model.disable_adapter():
            yield
        return
    parts.base.disable_adapters()
    try:
        yield
    finally:
        parts.base.enable_adapters()


def _modes(judge: Judge, parts: Parts) -> tuple[str, ...]:
    dropout = float(getattr(parts.text_config, "attention_dropout", 0.0) or 0.0)
    if dropout:
        judge.note(f"eval mode only: the base model's own attention dropout ({dropout}) draws other numbers under LoRA")
        return ("eval",)
    return ("eval", "train")


def _note_initialisation(judge: Judge, parts: Parts, *, fresh: bool) -> None:
    for config in adapter_configs(parts).values():
        kind = getattr(config, "init_lora_weights", True)
        if rewrites_base(config):
            judge.note(
                f"init_lora_weights={kind!r} wrote into the base weights when it attached: with the adapter "
                "off this is not the model that was loaded, and what was judged holds for the rewritten "
                "weights; it fits no other base unless PEFT converts it when it is saved "
                "(path_initial_model_for_weight_conversion)"
            )
        elif kind is False and not fresh:
            judge.note("init_lora_weights=False starts with a random B: as attached, the adapter is not neutral")


def _note_gradient_initialisation(judge: Judge, parts: Parts, *, zero: bool) -> None:
    """Say whether LoRA-GA (arXiv:2407.05000) wrote into the base weights.

    PEFT's ``lora_ga_init`` subtracts the adapter's start, whose B is not zero, from the base weights where
    ``preprocess_loraga`` has left gradients on the layers, which refuses 4-bit layers. Without gradients, as on
    loading, it falls back to the default (B = 0) without a word.
    """
    kinds = [getattr(config, "init_lora_weights", True) for config in adapter_configs(parts).values()]
    if GRADIENT_INITIALISATION not in kinds:
        return
    four_bit = {state.name for state in linear_states(parts) if state.is_4bit}
    packed = not four_bit.isdisjoint(adapted_layers(parts))
    if packed or zero:
        why = "preprocess_loraga refuses 4-bit weights" if packed else "preprocess_loraga has left none"
        judge.note(
            f"init_lora_weights={GRADIENT_INITIALISATION!r} found no gradients to start from ({why}): PEFT initialised "
            "the adapter as by default, and the base weights are those that were loaded"
        )
        return
    judge.note(
        f"init_lora_weights={GRADIENT_INITIALISATION!r} writes into the base weights if preprocess_loraga ran before "
        "the adapter attached: with the adapter off this is then not the model that was loaded. Loading the adapter "
        "does not write them again, so it fits no other base unless PEFT converts it when it is saved "
        "(path_initial_model_for_weight_conversion)"
    )
