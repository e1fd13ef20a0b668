"""What a full-precision pass says, recorded so that the model can go before the quantized one comes."""

from __future__ import annotations

import math
import zlib
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.activations import leaves
from pytest_qvl.checks.support.binomial import FALSE_ALARM, tail
from pytest_qvl.checks.support.not_finite import origin_of_not_finite
from pytest_qvl.checks.support.rounding import last_place_noise, rounded_sums, step
from pytest_qvl.checks.support.scoring import (
    ABLATIONS,
    IGNORED,
    AnswerLogits,
    Said,
    Scored,
    answer_logits,
    ask,
    chunks,
    coarsest_dtype,
    score,
    scored_columns,
)
from pytest_qvl.checks.vision import TOWER, Drift, TowerOutput, tower_output, ulp_response
from pytest_qvl.evidence import CannotJudge, InputError
from pytest_qvl.models.adapters import adapted_layers, adapters_disabled
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.attention import other_attention
from pytest_qvl.models.quantized import dtype_name, linear_states
from pytest_qvl.models.state import preserved
from pytest_qvl.models.taps import positions_changed
from pytest_qvl.samples import Sample, make_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pytest_qvl.models.anatomy import Group

EVIDENCE = 1.0
FLOOR_FACTOR = 4.0
TOP = 64
POSITION_SHIFT = 16
EXTRA_PADDING = 5
MAX_NEW_TOKENS = 64
LOGITS: tuple[Group, ...] = ("language", "lm_head")  # what rounds them
SILENT = Said(right=False, stopped=False)


@dataclass(frozen=True)
class NoiseFloor:
    """How far the logits of one model move when the same thing is computed in another order.

    Attributes:
        value: Largest difference of any logit at any scored position of any probe, over all computations.
        computations: The largest difference of each computation, by name.
        dtype: What the language backbone computes in, such as ``"bfloat16"``.
        resolution: Distance of neighbouring numbers of that dtype at the largest scored logit.
        last_place: Largest change of any scored logit when the output of every module of the language backbone,
            and of the head, is off by one unit in the last place.
    """

    value: float
    computations: dict[str, float]
    dtype: str
    resolution: float
    last_place: float

    @property
    def limit(self) -> float:
        """How far two computations of logits may differ that are no larger than the largest scored one."""
        return self._limit(self.resolution)

    def limit_for(self, largest: float) -> float:
        """How far two computations of the same logits may differ: four times the floor, and a nat at most.

        The floor is a maximum over a few hundred positions, so a computation that is not among those it was
        measured with exceeds it at times: on healthy models by up to 1.3 times. Four times leaves a factor of
        three to that, while the smallest defect of the kind in question (wrong positions while decoding a
        padded row, huggingface/transformers#40154) moves logits by 0.4 where the floor of bfloat16 is below
        0.1.

        Never less than rounding alone explains. The floor depends on which kernels happen to share their order of
        additions: where they nearly all do (matrix products in bfloat16 hardware) it measures less than one step
        of a logit, and four times that may still be less. But ``|round(a) - round(b)| <= |a - b| + step`` with
        the step at the larger of the two, and ``a - b`` is what the roundings of the hidden states leave. These
        are bounded by :attr:`last_place`. A block of the backbone has 10 modules, each moved by ``eps``, and
        rounds in some 22 places (norms twice, products, activation, rotation of queries and keys, attention,
        residual sums; with an adapter in some 29) by a root mean square of ``eps / (2 * sqrt(3))``: the
        perturbation is ``sqrt(10) / sqrt(22 / 12)``, 2.3 times the rounding error of one pass (2.0 with an
        adapter) and 1.7 times (1.4) the difference of two passes that share no rounding at all, and equal
        computations share most. So the lower bound is :attr:`last_place` plus one step; since the head's own
        output is moved too it is two steps at least.

        The cap: a logit that moves by one nat changes the odds of its token by a factor of e, which is the
        least that a picture must do to count as evidence in :func:`pytest_qvl.checks.alignment`. Arithmetic
        that does as much on its own is not noise, whatever the floor. Only where logits are so large that
        their dtype itself cannot hold them to a quarter of a nat (beyond 64 in bfloat16: random weights, not
        trained ones) the cap is four of that dtype's steps.

        Args:
            largest: Largest magnitude among the logits compared: a step belongs to what is judged.
        """
        import torch

        return self._limit(max(self.resolution, step(getattr(torch, self.dtype), largest)))

    def _limit(self, resolution: float) -> float:
        noise = max(FLOOR_FACTOR * self.value, self.last_place + resolution)
        return min(noise, max(EVIDENCE, FLOOR_FACTOR * resolution))


@dataclass(frozen=True)
class Probe:
    """What was recorded of one sample.

    Attributes:
        digest: Of question, answer and pictures, so that a reference is never held against other samples.
        totals: Log-probability of the right answer (nat) with the ``"true"`` pictures and under each
            ablation.
        top_ids: ``(answer tokens, k)`` int64, the most probable tokens at each answer position.
        top_logprobs: ``(answer tokens, k)`` float32, their log-probabilities.
        tower: For each picture, what its rows look like before and after the merger.
        said: How the generated reply went; neither right nor stopped where the model has no knowledge.
    """

    digest: int
    totals: dict[str, float]
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    tower: tuple[TowerOutput, ...]
    said: Said

    def margin(self, ablation: str) -> float | None:
        """How much more probable (nat) the right answer is with the true pictures than with ablated ones."""
        return self.totals["true"] - self.totals[ablation] if ablation in self.totals else None


@dataclass(frozen=True)
class Reference:
    """The record of a full-precision pass: CPU tensors and numbers, some kilobytes a sample, picklable.

    Attributes:
        source: What it was recorded from, in words.
        probes: By sample id.
        floor: The model's own noise floor.
        vision_dtype: What the vision tower computed in.
        ulp_response: Relative change of the tower's rows, before and after the merger, when every module of
            the tower is off by one unit in the last place; see :func:`pytest_qvl.checks.vision.ulp_response`.
        caveat: What it cannot show, in words, if there is such a thing; a note of every check that uses it.
    """

    source: str
    probes: dict[str, Probe]
    floor: NoiseFloor
    vision_dtype: str
    ulp_response: tuple[Drift, Drift]
    caveat: str = ""

    def probe(self, sample: Sample) -> Probe:
        """What was recorded of `sample`.

        Raises:
            ValueError: It was not recorded, or its question, answer or pictures were others.
        """
        probe = self.probes.get(sample.id)
        if probe is None:
            raise InputError(f"the reference holds no sample {sample.id!r}: record it for the samples you check")
        if probe.digest != digest(sample):
            raise InputError(
                f"sample {sample.id!r} is not the one the reference was recorded for (question, answer or "
                "pictures differ): record the reference again"
            )
        return probe

    def sees(self, ablation: str) -> bool:
        """Whether the true pictures speak for the right answer, against the ablated ones, beyond chance.

        Among the probes whose answer moves by a nat or more, those that move the right way must be more than
        a fair coin gives in one of 10,000 runs: fourteen of fourteen, for instance.
        """
        margins = [m for p in self.probes.values() if (m := p.margin(ablation)) is not None and abs(m) >= EVIDENCE]
        return tail(sum(m > 0 for m in margins), len(margins), 0.5) <= FALSE_ALARM if margins else False

    @property
    def has_knowledge(self) -> bool:
        """Whether the recorded model draws right answers from pictures at all.

        Random weights are moved by pictures too. Swapped pictures look like the true ones to a model that
        knows nothing, so there its answers move either way alike; blank and noisy pictures look different
        from all true ones, and may push all its answers one way. So the swapped ones decide where there are
        any.
        """
        if any("swapped" in probe.totals for probe in self.probes.values()):
            return self.sees("swapped")
        return any(self.sees(ablation) for ablation in ABLATIONS)


def digest(sample: Sample) -> int:
    """CRC-32 of a sample's question, answer and pictures, the swapped ones included."""
    value = zlib.crc32(f"{sample.question}\0{sample.answer}".encode())
    for image in (*sample.images, *(sample.swapped or ())):
        value = zlib.crc32(f"{image.mode}{image.size}".encode() + image.tobytes(), value)
    return value


def record_reference(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    adapter_disabled: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Reference:
    """Record what a full-precision model makes of the samples, so that it can be freed afterwards.

    Recorded per sample: log-probability of the right answer with the true, blank, noisy and swapped pictures,
    the most probable tokens at each answer position, whether the generated reply is right and ends by itself,
    and up to 32 rows per picture before and after the merger. Recorded once: the noise floor
    (:func:`noise_floor`) and how the vision tower answers to rounding.

    Args:
        model: A full-precision model; or any model with an adapter, see `adapter_disabled`.
        processor: Its processor.
        samples: Probes with different ids.
        adapter_disabled: Record the model with its adapters switched off: the "before" of a user's own
            adapter.
        max_new_tokens: At most so many per reply.

    Raises:
        ValueError: No samples, ids that are not unique, or a quantized model (unless `adapter_disabled`):
            held against itself it could not fail.
        CannotJudge: The noise floor could not be measured, because logits are not finite for instance.
    """
    _check_samples(samples)
    parts = anatomy(model)
    quantized = [state for state in linear_states(parts) if state.is_quantized]
    if quantized and not adapter_disabled:
        raise InputError(
            f"{len(quantized)} linears of this model are quantized (first: {quantized[0].name}, "
            f"{quantized[0].storage}): a reference is recorded from the full-precision model, loaded without "
            "quantization_config, or with adapter_disabled=True to compare an adapter with its own base"
        )
    if adapter_disabled and not adapted_layers(parts):
        raise InputError("adapter_disabled=True, but this model has no adapter to disable")
    dtype = dtype_name(coarsest_dtype(parts, LOGITS))
    source = f"{quantized[0].storage} base, adapter disabled" if quantized else f"full precision, {dtype}"
    if adapter_disabled and not quantized:
        source += ", adapter disabled"
    probes: dict[str, Probe] = {}
    noise = _Noise(parts, processor)
    with (
        preserved(model, training=False, seed=0),
        adapters_disabled(parts) if adapter_disabled else nullcontext(),
    ):
        for scored in score(parts, processor, samples):
            noise.take(scored.batch, scored.true)
            probes |= _probes(scored, tower_output(parts, scored.batch))
        response = ulp_response(parts, processor, samples)
        reference = Reference(source, probes, noise.floor(), str(dtype_name(_vision_dtype(parts))), response)
        if not reference.has_knowledge:  # nothing asks for its replies, and each would run to its last token
            return reference
        said = ask(parts, processor, samples, max_new_tokens=max_new_tokens)
    return replace(reference, probes={name: replace(p, said=said[name]) for name, p in probes.items()})


def noise_floor(model: Any, processor: Any, samples: Sequence[Sample], *, adapter_disabled: bool = False) -> NoiseFloor:
    """How far a model's logits move between computations that are equal but for rounding.

    Repeating a forward or swapping rows is bitwise the same and measures nothing. These are not: eager
    attention instead of SDPA; all positions shifted by a constant (rotary embeddings see differences only,
    arXiv:2104.09864); more padding on the left; and every sequence apart with its answer token by token,
    because the kernels for 4-bit and 16-bit matrix products depend on the number of rows. Each forward is
    teacher-forced over prompt and answer; the floor is the largest difference of any logit at any position
    that predicts an answer token. Measured as well is what no equal computation may happen to show: how far
    logits move when every module is off by one unit in the last place
    (:func:`pytest_qvl.checks.support.rounding.last_place_noise`; in float32, whose partial sums are rounded too, times
    :func:`pytest_qvl.checks.support.rounding.rounded_sums`).

    Measure it on a reference or base model, never on the model under suspicion: a defect that depends on
    padding or order would widen its own limit.

    Args:
        model: The reference or base model.
        processor: Its processor.
        samples: Probes; the whole set, since the floor is a maximum.
        adapter_disabled: Measure the base model under an adapter.

    Raises:
        ValueError: No samples, or ids that are not unique.
        CannotJudge: Nothing changed any logit, or logits are not finite.
    """
    _check_samples(samples)
    parts = anatomy(model)
    noise = _Noise(parts, processor)
    with (
        preserved(model, training=False, seed=0),
        adapters_disabled(parts) if adapter_disabled else nullcontext(),
    ):
        for group in chunks(samples):
            batch = make_batch(processor, group, answers=True, device=parts.device)
            noise.take(batch, answer_logits(parts, batch))
        return noise.floor()


def _check_samples(samples: Sequence[Sample]) -> None:
    ids = [sample.id for sample in samples]
    if not ids:
        raise InputError("no samples were given")
    if len(set(ids)) != len(ids):
        raise InputError(f"sample ids must be unique; {next(i for i in ids if ids.count(i) > 1)!r} is not")


def _vision_dtype(parts: Parts) -> torch.dtype:
    return coarsest_dtype(parts, TOWER)


class _Noise:
    """Collects the largest difference of each equal computation, batch by batch."""

    def __init__(self, parts: Parts, processor: Any) -> None:
        self._parts = parts
        self._pad = processor.tokenizer.pad_token_id or 0
        self._dtype = coarsest_dtype(parts, LOGITS)
        self._largest: dict[str, float] = {}
        self._logit = self._last_place = 0.0

    def take(self, batch: dict[str, torch.Tensor], base: AnswerLogits) -> None:
        parts, keep = self._parts, scored_columns(batch)
        if not bool(base.logits.isfinite().all()):
            origin = origin_of_not_finite(parts, lambda: answer_logits(parts, batch))
            raise CannotJudge(f"no noise floor: logits are not finite{origin}; if float16 overflows, use bfloat16")
        self._logit = max(self._logit, float(base.logits.abs().max()))
        computations: dict[str, tuple[AbstractContextManager[None], dict[str, torch.Tensor]]] = {
            "other attention kernel": (other_attention(parts), batch),
            f"positions shifted by {POSITION_SHIFT}": (
                positions_changed(parts, lambda p: p + POSITION_SHIFT),
                batch,
            ),
            f"{EXTRA_PADDING} more columns of left padding": (nullcontext(), _padded(batch, self._pad)),
            "rows apart, answers token by token": (rows_apart(parts, keep), batch),
        }
        for name, (context, inputs) in computations.items():
            self._largest[name] = max(self._largest.get(name, 0.0), self._difference(name, context, inputs, base))
        modules = [*leaves(parts.language_backbone), *leaves(parts.lm_head)]
        moved = self._difference("last places", last_place_noise(modules), batch, base)
        self._last_place = max(self._last_place, moved)

    def _difference(
        self, name: str, context: AbstractContextManager[None], inputs: dict[str, torch.Tensor], base: AnswerLogits
    ) -> float:
        with context:
            other = answer_logits(self._parts, inputs)
        difference = float((other.logits - base.logits).abs().max())
        if not math.isfinite(difference):
            raise CannotJudge(f"no noise floor: logits are not finite ({name}); if float16 overflows, use bfloat16")
        return difference

    def floor(self) -> NoiseFloor:
        value = max(self._largest.values())
        if value == self._last_place == 0:
            raise CannotJudge(
                f"no noise floor: {', '.join(self._largest)} and the last places of every module all leave every "
                "logit as it was"
            )
        terms = max(state.in_features for state in linear_states(self._parts) if state.group in LOGITS)
        return NoiseFloor(
            value,
            dict(self._largest),
            str(dtype_name(self._dtype)),
            step(self._dtype, self._logit),
            rounded_sums(self._dtype, terms) * self._last_place,
        )


def _padded(batch: dict[str, torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    import torch

    fill = {"input_ids": pad, "labels": IGNORED}
    shape = batch["input_ids"].shape
    return {
        name: torch.nn.functional.pad(value, (EXTRA_PADDING, 0), value=fill.get(name, 0))
        if value.shape == shape
        else value
        for name, value in batch.items()
    }


@contextmanager
def rows_apart(parts: Parts, last: int) -> Iterator[None]:
    """Compute every linear of the language backbone sequence by sequence, the last columns one by one.

    The same products in the same dtype; only the number of rows that the kernels see differs, as it does
    between a batch, a single prompt and a decoded token. Layers that see no ``(batch, length, width)`` input
    are left alone.

    Args:
        parts: The model.
        last: How many columns at the end to take one by one.
    """
    import torch

    def apart(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        inputs = args[0]
        if inputs.dim() != 3:
            return output
        split = max(inputs.shape[1] - last, 0)
        rows = []
        for row in inputs.split(1):
            pieces = [row[:, :split], *row[:, split:].split(1, dim=1)]
            rows.append(torch.cat([module.forward(piece) for piece in pieces if piece.shape[1]], dim=1))
        return torch.cat(rows)

    handles = [
        module.register_forward_hook(apart)
        for name, module in parts.named_linears()
        if parts.group_of(name) == "language"
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _probes(scored: Scored, pictures: list[TowerOutput]) -> dict[str, Probe]:
    import torch

    logits = scored.true.logits
    logprobs, ids = logits.log_softmax(-1).topk(min(TOP, logits.shape[-1]), dim=-1)
    rows = torch.tensor(scored.true.rows, device=logits.device)
    found, remaining = {}, iter(pictures)
    for row, sample in enumerate(scored.samples):
        tower = tuple(next(remaining) for _ in sample.images)
        own = rows == row
        found[sample.id] = Probe(digest(sample), scored.totals[row], ids[own].cpu(), logprobs[own].cpu(), tower, SILENT)
    return found
