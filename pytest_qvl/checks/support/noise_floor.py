"""How far logits move between computations that are equal but for rounding."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.activations import leaves
from pytest_qvl.checks.support.not_finite import origin_of_not_finite
from pytest_qvl.checks.support.rounding import coarsest, last_place_noise, rounded_sums, step
from pytest_qvl.checks.support.scoring import (
    AnswerLogits,
    answer_logits,
    chunks,
    coarsest_dtype,
    scored_columns,
)
from pytest_qvl.evidence import CannotJudge, InputError
from pytest_qvl.models.adapters import adapters_disabled
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.attention import other_attention
from pytest_qvl.models.autocast import autocast_dtype
from pytest_qvl.models.quantized import dtype_name, linear_states
from pytest_qvl.models.state import preserved
from pytest_qvl.models.taps import positions_changed
from pytest_qvl.samples import Sample, make_batch
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pytest_qvl.models.anatomy import Group

EVIDENCE = 1.0
FLOOR_FACTOR = 4.0
POSITION_SHIFT = 16
EXTRA_PADDING = 5
LOGITS: tuple[Group, ...] = ("language", "lm_head")  # what rounds them


def logits_dtype(parts: Parts) -> torch.dtype:
    """The coarsest dtype that logits are computed in: the backbone's and the head's, or that of autocast around."""
    return coarsest((coarsest_dtype(parts, LOGITS), autocast_dtype(parts.device.type)))


@dataclass(frozen=True)
class NoiseFloor:
    """How far the logits of one model move when the same thing is computed in another order.

    Attributes:
        value: Largest difference of any logit at any scored position of any probe, over all computations.
        computations: The largest difference of each computation, by name.
        dtype: What the language backbone computes in, or autocast around it, such as ``"bfloat16"``.
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

    def limit_for(self, largest: float, *, response: float = 0.0) -> float:
        """How far (logit) two computations of the same logits may differ: four times the floor.

        A nat at most, and never less than the response to a last place in every module plus one step of the dtype:
        rounding alone explains that. Derived in docs/limits.md#noise-floor.

        Args:
            largest: Largest magnitude among the logits compared: a step belongs to what is judged.
            response: How far the logits compared themselves move when every module is a last place off, as a root mean
                square, where that is known; four times that are allowed too (docs/limits.md#own-rounding).
        """
        import torch

        return self._limit(max(self.resolution, step(getattr(torch, self.dtype), largest)), response)

    def _limit(self, resolution: float, response: float = 0.0) -> float:
        noise = max(FLOOR_FACTOR * max(self.value, response), self.last_place + resolution)
        return min(noise, max(EVIDENCE, FLOOR_FACTOR * resolution))


def noise_floor(model: Any, processor: Any, samples: Sequence[Sample], *, adapter_disabled: bool = False) -> NoiseFloor:
    """How far a model's logits move between computations that are equal but for rounding (docs/limits.md#noise-floor).

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
    require_samples(samples)
    parts = anatomy(model)
    noise = NoiseCollector(parts, processor)
    with (
        preserved(model, training=False, seed=0),
        adapters_disabled(parts) if adapter_disabled else nullcontext(),
    ):
        for group in chunks(samples):
            batch = make_batch(processor, group, answers=True, device=parts.device)
            noise.take(batch, answer_logits(parts, batch))
        return noise.floor()


def require_samples(samples: Sequence[Sample]) -> None:
    """Refuse an empty set of probes and one in which two have the same id.

    Raises:
        ValueError: Says which.
    """
    ids = [sample.id for sample in samples]
    if not ids:
        raise InputError("no samples were given")
    if len(set(ids)) != len(ids):
        raise InputError(f"sample ids must be unique; {next(i for i in ids if ids.count(i) > 1)!r} is not")


class NoiseCollector:
    """Collects the largest difference of each equal computation, batch by batch."""

    def __init__(self, parts: Parts, processor: Any) -> None:
        self._parts = parts
        self._pad = processor.tokenizer.pad_token_id or 0
        self._dtype = logits_dtype(parts)
        self._largest: dict[str, float] = {}
        self._logit = self._last_place = 0.0

    def take(self, batch: dict[str, torch.Tensor], base: AnswerLogits) -> None:
        """Compute a batch's logits in every equal way, and keep the largest difference to `base`."""
        import torch

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
        # What is made in 16 bits (by a 4-bit product, under autocast) may be handed on in float32.
        noise = last_place_noise(modules, torch.finfo(self._dtype).eps)
        moved = self._difference("last places", noise, batch, base)
        self._last_place = max(self._last_place, moved)

    def _difference(
        self, name: str, context: AbstractContextManager[None], inputs: dict[str, torch.Tensor], base: AnswerLogits
    ) -> float:
        with context:
            other = answer_logits(self._parts, inputs)
        difference = float((other.logits - base.logits).abs_().max())
        if not math.isfinite(difference):
            raise CannotJudge(f"no noise floor: logits are not finite ({name}); if float16 overflows, use bfloat16")
        return difference

    def floor(self) -> NoiseFloor:
        """The summary of all batches.

        Raises:
            CannotJudge: Nothing changed any logit.
        """
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
