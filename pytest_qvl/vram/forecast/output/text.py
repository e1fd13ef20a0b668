"""A forecast as a table for the terminal. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.engine.trace import KINDS
from pytest_qvl.vram.units import MiB, format_bytes

if TYPE_CHECKING:
    from pytest_qvl.vram.forecast.request import Request, Sample
    from pytest_qvl.vram.forecast.result import Forecast, Largest, Refused, Verdict

TRAINERS = {
    "hf": "transformers.Trainer",
    "trl": "trl.SFTTrainer",
    "unsloth": "Unsloth's trainer",
    "loop": "a plain loop",
}


LINEAR_ATTENTION = {
    "torch": "Transformers' PyTorch code",
    "fla": "fla's kernels, its convolution by PyTorch",
    "fla+causal-conv1d": "the kernels of fla and causal-conv1d",
}


def render(forecast: Forecast, largest: Largest | None = None, assumed: tuple[str, ...] = ()) -> str:
    """The whole answer: what was asked, a row per phase, the peak, the verdict.

    Args:
        forecast: To be shown.
        largest: What was found to fit still, if that was searched for.
        assumed: What nobody asked for, as options.
    """
    parts = [_asked(forecast), _table(forecast), _peak(forecast)]
    if assumed:
        parts[0] += f"\nassumed, as nothing was said: {' '.join(assumed)}"
    if forecast.verdict is not None:
        parts.append(_verdict(forecast.verdict))
    if largest is not None:
        parts.append(_largest(largest))
    return "\n\n".join(parts)


def _asked(forecast: Forecast) -> str:
    request = forecast.request
    training = _training(request) if request.lora_r else "no adapter, inference only"
    kinds = list(dict.fromkeys(request.batch_of_samples))
    text = forecast.sequence - forecast.visual_tokens
    tokens = f"{forecast.visual_tokens:,} visual + {text:,} text = {forecast.sequence:,} tokens"
    if len(kinds) > 1:
        how = "packed into one row, the longest" if request.packed else "padded to the longest"
        samples = f"{len(request.batch_of_samples)} samples {how}: {tokens}"
    else:
        together = ", packed into one row" if request.packed else ""
        shown = f"images {_images(kinds[0])}" if kinds[0].images or not kinds[0].videos else ""
        shown = ", ".join(filter(None, [shown, *(f"video of {_video(*video)}" for video in kinds[0].videos)]))
        samples = f"batch {len(request.batch_of_samples)}, {shown}: {tokens} each{together}"
    updates = f", {request.accumulation} batches per update" if request.accumulation > 1 else ""
    packed = {4: "NF4 with nested statistics, rest ", 8: "LLM.int8(), rest "}
    base = packed.get(request.base_bits, "") + request.compute_dtype
    mixers = f"\nlinear attention by {LINEAR_ATTENTION[request.linear_attention]}" if forecast.linear_attention else ""
    return f"{forecast.label}: {base}; {training}\n{samples}{updates}{mixers}"


def _training(request: Request) -> str:
    # PEFT casts what it loads.
    adapter = "bf16" if request.adapter_in_bfloat16 and not request.resume else "fp32"
    targets = request.lora_targets
    named = targets if isinstance(targets, str) else " + ".join(targets)
    where = "language linears" if targets == "language" else named
    autocast = f"{request.autocast_dtype} autocast" if request.autocast_dtype else "without autocast"
    options = [
        f"{'DoRA' if request.use_dora else 'LoRA'} r={request.lora_r} ({adapter}, {where})",
        TRAINERS[request.trainer] + ("" if request.compiled else ", not compiled"),
        autocast,
        request.optimizer,
    ]
    kind = "reentrant " if request.reentrant and request.gradient_checkpointing else ""
    options.append(f"{kind}gradient checkpointing" if request.gradient_checkpointing else "no gradient checkpointing")
    options += ["vision hook left on"] if request.keeps_vision_hook else []
    options += ["fp32 upcast"] if request.kbit_upcast else []
    options += ["Liger's kernels"] if request.liger else []
    options += ["resumed"] if request.resume else []
    options += [f"init_lora_weights={request.init_lora_weights}"] if request.init_lora_weights else []
    options += ["DDP"] if request.ddp else []
    return ", ".join(options)


def _images(sample: Sample) -> str:
    sizes = [f"{height}x{width}" for height, width in sample.images]
    if len(set(sizes)) <= 1:
        return f"{len(sizes)} x {sizes[0]}" if sizes else "none"
    return " + ".join(sizes)


def _video(frames: int, height: int, width: int) -> str:
    return f"{frames} frames of {height}x{width}"


def _table(forecast: Forecast) -> str:
    shown = [kind for kind in KINDS if any(phase.by_kind.get(kind, 0) >= MiB / 2 for phase in forecast.phases)]
    rows = [["phase", "allocated", "reserved", *shown]]
    for phase in forecast.phases:
        sizes = (phase.peak_allocated, phase.peak_reserved, *(phase.by_kind.get(kind, 0) for kind in shown))
        rows.append([phase.name, *(f"{size / MiB:,.0f}" for size in sizes)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join(["MiB at the peak of each phase", lines[0], rule, *lines[1:]])


def _peak(forecast: Forecast) -> str:
    peak = forecast.peak
    return (
        f"peak: {format_bytes(peak.peak_allocated)} allocated in {peak.name!r} "
        f"({phases.EXPLAIN[peak.name]}), of it {format_bytes(peak.peak_allocated - forecast.resident)} above the "
        f"loaded model; {format_bytes(forecast.peak_reserved)} reserved by the allocator"
    )


def _verdict(verdict: Verdict) -> str:
    card = verdict.card
    have = (
        f"{card.title}: torch sees {format_bytes(card.usable_bytes)}, less about "
        f"{format_bytes(card.context_bytes)} for the CUDA context and libraries leaves "
        f"{format_bytes(verdict.available)}"
    )
    if verdict.failure is not None:
        return (
            f"{have}\nDOES NOT FIT: out of memory in {verdict.failure.phase!r}, asking for "
            f"{format_bytes(verdict.failure.requested)}"
        )
    if verdict.tight:
        return (
            f"{have}\nFITS, JUST: {format_bytes(verdict.reserved - verdict.available)} too much would be "
            "reserved, so the allocator has to give its cache back on the way, which is slow"
        )
    return f"{have}\nFITS with {format_bytes(verdict.available - verdict.reserved)} to spare"


def _largest(largest: Largest) -> str:
    what = "image" if largest.dimension == "image" else "batch"
    if largest.forecast is None:
        return f"no {what} fits"
    found = f"largest {what} that still fits: {_name(largest, largest.forecast)}"
    if largest.bounded:
        return f"{found}; the processor shrinks every larger image to this size, so any image fits"
    if largest.refused is not None:
        return f"{found}; {_name(largest, largest.refused)} does not"
    return f"{found} (no larger one was tried)"


def _name(largest: Largest, forecast: Forecast | Refused) -> str:
    request: Request = forecast.request
    if largest.dimension == "batch":
        return str(request.batch)
    return f"{request.image[0]}x{request.image[1]} ({forecast.visual_tokens // request.images:,} visual tokens)"
