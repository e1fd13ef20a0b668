"""What a full-precision pass says, recorded so that the model can go before the quantized one comes."""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.binomial import FALSE_ALARM, tail
from pytest_qvl.checks.support.noise_floor import EVIDENCE, NoiseCollector, NoiseFloor, logits_dtype, require_samples
from pytest_qvl.checks.support.scoring import ABLATIONS, Said, Scored, ask, score
from pytest_qvl.checks.support.tower import Drift, TowerOutput, tower_dtype, tower_output, ulp_response
from pytest_qvl.evidence import InputError
from pytest_qvl.models.adapters import adapted_layers, adapters_disabled
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.quantized import dtype_name, linear_states
from pytest_qvl.models.state import preserved
from pytest_qvl.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


TOP = 64
MAX_NEW_TOKENS = 64
SILENT = Said(right=False, stopped=False)


@dataclass(frozen=True)
class Probe:
    """What was recorded of one sample.

    Attributes:
        digest: Of question, answer and images, so that a reference is never held against other samples.
        totals: Log-probability of the right answer (nat) with the ``"true"`` images and under each
            ablation.
        top_ids: ``(answer tokens, k)`` int64, the most probable tokens at each answer position.
        top_logprobs: ``(answer tokens, k)`` float32, their log-probabilities.
        tower: For each image, what its rows look like before and after the merger.
        said: How the generated reply went; neither right nor stopped where the model has no knowledge.
    """

    digest: int
    totals: dict[str, float]
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    tower: tuple[TowerOutput, ...]
    said: Said

    def margin(self, ablation: str) -> float | None:
        """How much more probable (nat) the right answer is with the true images than with ablated ones."""
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
            the tower is off by one unit in the last place; see :func:`pytest_qvl.checks.support.tower.ulp_response`.
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
            ValueError: It was not recorded, or its question, answer or images were others.
        """
        probe = self.probes.get(sample.id)
        if probe is None:
            raise InputError(f"the reference holds no sample {sample.id!r}: record it for the samples you check")
        if probe.digest != digest(sample):
            raise InputError(
                f"sample {sample.id!r} is not the one the reference was recorded for (question, answer or "
                "images differ): record the reference again"
            )
        return probe

    def sees(self, ablation: str) -> bool:
        """Whether the true images speak for the right answer, against the ablated ones, beyond chance.

        Among the probes whose answer moves by a nat or more, those that move the right way must be more than
        a fair coin gives in one of 10,000 runs: fourteen of fourteen, for instance (docs/limits.md#accuracy).
        """
        margins = [m for p in self.probes.values() if (m := p.margin(ablation)) is not None and abs(m) >= EVIDENCE]
        return tail(sum(m > 0 for m in margins), len(margins), 0.5) <= FALSE_ALARM if margins else False

    @property
    def has_knowledge(self) -> bool:
        """Whether the recorded model draws right answers from images at all.

        Random weights are moved by images too. Swapped images look like the true ones to a model that
        knows nothing, so there its answers move either way alike; blank and noisy images look different
        from all true ones, and may push all its answers one way. So the swapped ones decide where there are
        any.
        """
        if any("swapped" in probe.totals for probe in self.probes.values()):
            return self.sees("swapped")
        return any(self.sees(ablation) for ablation in ABLATIONS)


def digest(sample: Sample) -> int:
    """CRC-32 of a sample's question, answer and images, the swapped ones included."""
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

    Recorded per sample: log-probability of the right answer with the true, blank, noisy and swapped images,
    the most probable tokens at each answer position, whether the generated reply is right and ends by itself,
    and up to 32 rows per image before and after the merger. Recorded once: the noise floor
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
    import torch

    require_samples(samples)
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
    dtype = dtype_name(logits_dtype(parts))
    source = f"{quantized[0].storage} base, adapter disabled" if quantized else f"full precision, {dtype}"
    if adapter_disabled and not quantized:
        source += ", adapter disabled"
    probes: dict[str, Probe] = {}
    noise = NoiseCollector(parts, processor)
    with (
        preserved(model, training=False, seed=0),
        adapters_disabled(parts) if adapter_disabled else nullcontext(),
    ):
        for scored in score(parts, processor, samples):
            noise.take(scored.batch, scored.true)
            probes |= _probes(scored, tower_output(parts, scored.batch))
            torch.cuda.empty_cache()  # the next group has other shapes, and full precision leaves least room for gaps
        response = ulp_response(parts, processor, samples)
        reference = Reference(source, probes, noise.floor(), str(dtype_name(tower_dtype(parts))), response)
        if not reference.has_knowledge:  # nothing asks for its replies, and each would run to its last token
            return reference
        said = ask(parts, processor, samples, max_new_tokens=max_new_tokens)
    return replace(reference, probes={name: replace(p, said=said[name]) for name, p in probes.items()})


def _probes(scored: Scored, images: list[TowerOutput]) -> dict[str, Probe]:
    import torch

    logits = scored.true.logits
    logprobs, ids = logits.log_softmax(-1).topk(min(TOP, logits.shape[-1]), dim=-1)
    rows = torch.tensor(scored.true.rows, device=logits.device)
    found, remaining = {}, iter(images)
    for row, sample in enumerate(scored.samples):
        tower = tuple(next(remaining) for _ in sample.images)
        own = rows == row
        found[sample.id] = Probe(digest(sample), scored.totals[row], ids[own].cpu(), logprobs[own].cpu(), tower, SILENT)
    return found


def floor_of(parts: Parts, reference: Reference | NoiseFloor) -> NoiseFloor:
    """The noise floor that judges a model.

    Raises:
        ValueError: It was measured in another dtype than the model computes in.
    """
    floor = reference.floor if isinstance(reference, Reference) else reference
    dtype = dtype_name(logits_dtype(parts))
    if dtype != floor.dtype:
        raise InputError(
            f"the noise floor was measured in {floor.dtype}, the model computes in {dtype}: record the "
            "reference, or measure noise_floor() on the base model, in the same dtype and the same autocast"
        )
    return floor
