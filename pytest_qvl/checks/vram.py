"""Peak VRAM of what a QLoRA user does with the model, phase by phase."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.placeholders import attended, refuse_positions_in_generation
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.compiled import compilations
from pytest_qvl.models.quantized import base_tensors
from pytest_qvl.models.state import preserved
from pytest_qvl.models.training import FIRST_FLOAT16_SCALE, checkpointing, computes_in_float16
from pytest_qvl.vram.units import GiB, format_bytes

if TYPE_CHECKING:
    import torch

    from pytest_qvl.evidence import Value
    from pytest_qvl.vram.meter import Meter
    from pytest_qvl.vram.usage import Number, Usage

DECODE_STEPS = 8
COLUMNS = ("phase", "allocated GiB", "reserved GiB", "process GiB", "seconds", "tokens/s")
TOP_TOKENS = "most probable tokens"
SOME_LOGITS = "some logits"
DIGEST_LOGITS = 64
RESIDENT_SHARE = 0.01
SMALL_THINGS = 64 * 2**20
LOADING = ("load", "attach adapter")
MOST_REPEATS = 2  # Unsloth compiles a step of decoding only when a shape comes for the second time


@check(promise=11, needs=("gpu",))
def peak_vram(
    model: Any,
    batch: Mapping[str, Any],
    training_batch: Mapping[str, Any],
    meter: Meter,
    *,
    limit: int | None = None,
    of: Number = "fit",
) -> Evidence:
    """Measure vision encoding, prefill, decoding and a checkpointed training step, and hold each to a limit.

    So is loading, as the meter has measured it. Bytes that torch has handed out beyond the tensors of the model itself
    (base, quantization states, adapter) stay within 1 % of the model plus 64 MiB (docs/limits.md#resident-memory).
    Peaks are held to ``limit`` where one is given, and reported otherwise.

    Args:
        model: A LoRA model on CUDA.
        batch: Inputs with images, left-padded.
        training_batch: Inputs with images and labels.
        meter: The session's meter.
        limit: Bytes that no phase may exceed.
        of: Which number the limit bounds.

    Raises:
        CannotJudge: The model is not on CUDA, or the number to bound was not measured.
        CheckFailed: Something beside the model stays resident, or a phase is above the limit.
    """
    parts = anatomy(model)
    if parts.device.type != "cuda":
        raise CannotJudge("VRAM needs CUDA: the model is on the CPU")
    judge = Judge("peak_vram", "peak VRAM within its limit")
    prepare_to_measure()
    _judge_resident(judge, _own_bytes(parts), _requested_bytes(parts))
    rows: list[tuple[str | float | None, ...]] = []
    for usage in loading(meter):
        rows.append((*_row(usage), None))
        _judge_phase(judge, usage, limit, of)
    tokens = _tokens(parts, batch, training_batch)
    for usage, result, compiling in measure_work(model, batch, training_batch, meter):
        rows.append((*_row(usage), tokens[usage.name] / usage.seconds))
        _judge_phase(judge, usage, limit, of)
        if compiling:
            judge.note(f"{usage.name}: the last of {1 + MOST_REPEATS} calls compiled something too, within its seconds")
        if result is not None:
            _report_digest(judge, usage.name, result)
        del result
    return judge.verdict(COLUMNS, rows)


def loading(meter: Meter) -> list[Usage]:
    """What loading the model that is there now and attaching its adapter used, if the meter has measured it."""
    ended = {usage.name: usage for usage in meter.session().inner}
    return [ended[name] for name in LOADING if name in ended]


def logits_digest(logits: torch.Tensor) -> dict[str, list[Value]]:
    """What two runs are compared by: the most probable token of each row, and logits of some fixed tokens.

    Args:
        logits: ``(rows, vocabulary)``.

    Returns:
        :data:`TOP_TOKENS`, one per row; :data:`SOME_LOGITS`, :data:`DIGEST_LOGITS` per row (all of a smaller
        vocabulary) to six significant digits.
    """
    import torch

    vocabulary = logits.shape[-1]
    some = torch.linspace(0, vocabulary - 1, min(DIGEST_LOGITS, vocabulary), device=logits.device).round().long()
    values = logits.float()[:, some].flatten().tolist()
    return {
        TOP_TOKENS: [int(token) for token in logits.argmax(-1).tolist()],
        SOME_LOGITS: [float(f"{value:.6g}") for value in values],
    }


def _report_digest(judge: Judge, phase: str, logits: torch.Tensor) -> None:
    """Digest of a phase's logits: as data for reports that compute with it, as text for the record."""
    for name, values in logits_digest(logits).items():
        judge.data[f"{phase}: {name}"] = values
        judge.report(
            f"{phase}: {name}", " ".join(f"{value:.6g}" if name == SOME_LOGITS else str(value) for value in values)
        )


def _tokens(parts: Parts, batch: Mapping[str, Any], training_batch: Mapping[str, Any]) -> dict[str, int]:
    """How many tokens each phase works on: visual, read, written, trained on."""
    rows = len(batch["input_ids"])
    return {
        "vision": batch["pixel_values"].shape[0] // parts.merge_size**2,
        "prefill": int(attended(batch).sum()),
        f"decode {DECODE_STEPS}": rows * DECODE_STEPS,
        "train step": int(attended(training_batch).sum()),
    }


def prepare_to_measure() -> None:
    """Leave nothing on the GPU but what somebody holds."""
    import torch

    gc.collect()
    # cuBLAS keeps 32 MiB for each of its handles (the backward pass has one of its own) in torch's allocator; torch's
    # own leak check gives them back in the same way (torch/testing/_internal/common_utils.py).
    torch._C._cuda_clearCublasWorkspaces()


def measure_work(
    model: Any, batch: Mapping[str, Any], training_batch: Mapping[str, Any], meter: Meter, *, timed: bool = True
) -> Iterator[tuple[Usage, Any, bool]]:
    """Do the work of :func:`work_of` phase by phase, and leave the model as it was.

    Args:
        model: A LoRA model.
        batch: Inputs with images, left-padded.
        training_batch: Inputs with images and labels.
        meter: The session's meter.
        timed: Do the work again, as phases ``"NAME, again"`` of their own: a first call loads kernels. Where something
            was compiled on the way, once more. The seconds are those of the last time, the numbers the highest of
            all times.

    Yields:
        What each phase used, what it returned, and whether something was still compiled the last time.
    """
    for name, work in work_of(anatomy(model), batch, training_batch).items():
        used: list[Usage] = []
        made: list[Any] = []
        for phase_name in (name, *[f"{name}, again"] * MOST_REPEATS) if timed else (name,):
            made.clear()
            before = compilations()
            with preserved(model), meter.phase(phase_name) as phase:
                made.append(work())
            assert phase.usage is not None
            used.append(phase.usage)
            compiling = compilations() > before
            if phase_name != name and not compiling:
                break
        # Popped, so that it is not alive beside the next phase's work.
        yield _together(used), made.pop(), compiling


def _together(used: Sequence[Usage]) -> Usage:
    """One usage for the same work done several times: the highest of each number, the seconds of the last."""
    numbers = ("allocated", "reserved", "process", "context")
    found = {number: [value for one in used if (value := getattr(one, number)) is not None] for number in numbers}
    highest: dict[str, Any] = {number: max(values, default=None) for number, values in found.items()}
    return replace(used[0], seconds=used[-1].seconds, **highest)


def room_beside(parts: Parts) -> int:
    """Bytes that may be allocated beside a model's own, for :func:`peak_vram`."""
    return _resident_limit(_own_bytes(parts))


def _resident_limit(own: int) -> int:
    """Bytes that may be allocated beside a model of ``own`` bytes."""
    return int(RESIDENT_SHARE * own) + SMALL_THINGS


def _own_bytes(parts: Parts) -> int:
    """Bytes of the model's own storages on CUDA, each counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for _, tensor in (*base_tensors(parts), *parts.base.named_parameters())
        if tensor.is_cuda
    }
    return sum(storages.values())


def _requested_bytes(parts: Parts) -> int:
    """Bytes that torch's callers asked for and have not given back; blocks themselves are rounded up."""
    import torch

    requested: int = torch.cuda.memory_stats(parts.device)["requested_bytes.all.current"]
    return requested


def _judge_resident(judge: Judge, own: int, requested: int) -> None:
    limit = _resident_limit(own)
    judge.report("model", own / GiB, unit="GiB")
    judge.at_most(
        "resident beside the model",
        (requested - own) / GiB,
        limit / GiB,
        unit="GiB",
        else_say=(
            f"{format_bytes(requested - own)} are allocated beside the model's own {format_bytes(own)}: something "
            "keeps tensors alive (a 16-bit copy of the weights, a kept loss or cache)"
        ),
    )


def work_of(
    parts: Parts,
    batch: Mapping[str, Any],
    training_batch: Mapping[str, Any],
    decode_steps: int = DECODE_STEPS,
) -> dict[str, Callable[[], Any]]:
    """What a QLoRA user does with a model, by name; also run by the forecast, on tensors without data.

    Only prefill returns something: the logits of the last position, ``(rows, vocabulary)``.
    """
    import torch

    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def vision() -> None:
        with torch.no_grad():
            parts.core.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])

    def prefill() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = parts.wrapped(**inputs, logits_to_keep=1).logits[:, -1]
        return logits

    def decode() -> None:
        refuse_positions_in_generation(inputs)
        generate: Any = parts.wrapped.generate
        generate(**inputs, do_sample=False, min_new_tokens=decode_steps, max_new_tokens=decode_steps)

    def train() -> None:
        parts.wrapped.train()
        with checkpointing(parts, True, own_way=True), _inputs_require_grad(parts):
            loss: Any = parts.wrapped(**training_batch).loss
            # The memory of gradients that overflow is that of any others.
            (loss * FIRST_FLOAT16_SCALE if computes_in_float16(parts) else loss).backward()

    return {"vision": vision, "prefill": prefill, f"decode {DECODE_STEPS}": decode, "train step": train}


@contextmanager
def _inputs_require_grad(parts: Parts) -> Iterator[None]:
    """As users train: checkpointed layers need an input that requires grad where the adapter starts above them."""
    embeddings: Any = parts.embeddings
    handle = embeddings.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()


def _judge_phase(judge: Judge, usage: Usage, limit: int | None, of: Number) -> None:
    for number in ("allocated", "reserved"):
        judge.report(f"{usage.name}: peak {number}", (usage.number(number) or 0) / GiB, unit="GiB")
    if limit is None:
        return
    value = usage.number(of)
    if value is None:
        raise CannotJudge(f"{usage.name}: {usage.missing(of)}")
    judge.at_most(
        f"{usage.name}: {of}",
        value / GiB,
        limit / GiB,
        unit="GiB",
        else_say=f"{usage.name} needs {format_bytes(value)} ({of}), {format_bytes(value - limit)} above the limit",
    )


def _row(usage: Usage) -> tuple[str | float | None, ...]:
    process = None if usage.process is None else usage.process / GiB
    return usage.name, usage.allocated / GiB, usage.reserved / GiB, process, usage.seconds
