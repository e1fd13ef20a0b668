"""Will it fit, and is the forecast that says so right? The forecast is itself under test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.vram import measure_work, prepare_to_measure, work_of
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.sources.model_source import parse_model
from pytest_qvl.vram.cards import Card
from pytest_qvl.vram.cards import card as find_card
from pytest_qvl.vram.forecast.request import DTYPES, Optimizer, Request
from pytest_qvl.vram.forecast.validation.agreement import ABOVE_FLOOR, Comparison, hold
from pytest_qvl.vram.units import GiB, format_bytes

if TYPE_CHECKING:
    from pytest_qvl.samples import Sample
    from pytest_qvl.vram.forecast.engine.trace import PhaseBytes
    from pytest_qvl.vram.forecast.result import Forecast, Largest
    from pytest_qvl.vram.meter import Meter
    from pytest_qvl.vram.usage import Usage

# The peak of decoding is that of the prompt it begins with; more steps add keys and values of single tokens.
REHEARSED_STEPS = 2
NO_CARD = "no card was named: --qvl-card t4 forecasts for one"


@check(promise=11, needs=("forecast", "request"), guarded=False)
def forecast_fits_card(
    model: str,
    quantization_config: Any,
    lora_config: Any,
    card: str | Card | None,
    *,
    samples: Sequence[Sample] | None = None,
    image: tuple[int, int] = (1024, 1024),
    images: int = 1,
    batch: int = 1,
    tokens: int = 256,
    gradient_checkpointing: bool = True,
    optimizer: Optimizer = "paged_adamw_8bit",
    generate: int = 32,
) -> Evidence:
    """Forecast loading, generation and a training step of this model with this adapter, and hold it to a card.

    No GPU and no weights are needed: the real code runs on tensors without data (``docs/forecast.md``). The limit is
    what torch's allocator can have on the card: the memory that torch sees there less the CUDA context. Where the
    forecast is above it, the allocator is replayed with that limit, giving cached memory back before it gives up, as
    torch's does.

    Args:
        model: ``"embedded"``, a folder, a hub id or ``"synthetic:..."``; its configuration is read, not its weights.
        quantization_config: A ``transformers.BitsAndBytesConfig``; decides which linears are in 4 bits, and the dtype
            to compute in (float16 where that is bfloat16 and the card lacks it).
        lora_config: A ``peft.LoraConfig``.
        card: Name of a card, or a card of one's own.
        samples: Images to train on; the largest image and the most images of one sample are forecast, instead of
            `image` and `images`.
        image: Height and width of each image in pixels.
        images: Images per sample.
        batch: Samples per step.
        tokens: Text tokens per sample.
        gradient_checkpointing: Whether layers are recomputed in backward.
        optimizer: Name of the optimizer as in Transformers' ``TrainingArguments``.
        generate: New tokens to decode.

    Raises:
        CannotJudge: No card was named, or the forecast does not follow what the configurations ask for.
        CheckFailed: It does not fit: says in which phase, by how much, and the largest image that does.
        ValueError: Unknown model or card.
    """
    if card is None:
        raise CannotJudge(NO_CARD)
    known = find_card(card) if isinstance(card, str) else card
    from pytest_qvl.vram.forecast.engine.recipes import NotFollowed, recipe_from_configs
    from pytest_qvl.vram.forecast.run import Forecaster, largest
    from pytest_qvl.vram.forecast.source import find_weights_source

    judge = Judge("forecast_fits_card", f"QLoRA fits {known.title}, by the forecast")
    weights = parse_model(model)
    source = find_weights_source(weights)
    sizes = [(shown.height, shown.width) for sample in samples or () for shown in sample.images]
    if samples and sizes:
        image = max(sizes, key=lambda size: size[0] * size[1])
        images = max(len(sample.images) for sample in samples)
    request = Request(
        model=weights.location,
        image=image,
        images=images,
        batch=batch,
        tokens=max(tokens, 2 * images + 2),
        lora_r=lora_config.r,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        compute_dtype=_compute_dtype(judge, quantization_config, known),  # type: ignore[arg-type]
        generate=generate,
        checkpoint="synthetic" if weights.kind == "synthetic" else "16bit",
        capability=known.compute_capability,
    )
    try:
        recipe = recipe_from_configs(source.config, quantization_config, lora_config)
    except NotFollowed as reason:
        raise CannotJudge(str(reason)) from None
    forecaster = Forecaster(request, known, source=source, recipe=recipe)
    found = forecaster.forecast(request)
    fits = found.verdict is not None and found.verdict.fits
    _judge_fit(judge, found, None if fits else largest(forecaster, found, "image"))
    rows = [(p.name, p.peak_allocated / GiB, p.peak_reserved / GiB) for p in found.phases]
    return judge.verdict(("phase", "allocated GiB", "reserved GiB"), rows)


def _compute_dtype(judge: Judge, quantization_config: Any, card: Card) -> str:
    asked = str(getattr(quantization_config, "bnb_4bit_compute_dtype", None)).removeprefix("torch.")
    if asked not in DTYPES:
        raise CannotJudge(f"the forecast knows models that compute in {' or '.join(DTYPES)}, not in {asked}")
    if asked == "bfloat16" and not card.bf16:
        judge.note(f"{card.title} has no bfloat16, so it computes in float16 there")
        return "float16"
    return asked


def _judge_fit(judge: Judge, found: Forecast, largest: Largest | None) -> None:
    verdict, request = found.verdict, found.request
    assert verdict is not None
    height, width = request.image
    judge.note(
        f"forecast for batch {request.batch}, {request.images} image{'s' if request.images > 1 else ''} of "
        f"{height}x{width} ({found.visual_tokens:,} visual + {request.tokens:,} text tokens), {request.optimizer}"
        f"{', gradient checkpointing' if request.gradient_checkpointing else ''}, {request.compute_dtype}"
    )
    for phase in found.phases:
        judge.report(f"{phase.name}: peak reserved", phase.peak_reserved / GiB, unit="GiB")
    judge.report("room", (verdict.available - verdict.reserved) / GiB, unit="GiB")
    if verdict.failure is None:
        # Cached segments that can be given back in time are not needed.
        needed = min(verdict.reserved, verdict.available)
        if verdict.tight:
            judge.note("it fits only because the allocator gives its cache back on the way, which is slow")
        where = max(found.phases, key=lambda phase: phase.peak_reserved).name
    else:
        needed, where = verdict.reserved, verdict.failure.phase
    assert largest is not None or verdict.fits
    judge.at_most(
        f"forecast for {verdict.card.title}",
        needed / GiB,
        verdict.available / GiB,
        unit="GiB",
        else_say=(
            f"{found.label} does not fit {verdict.card.title}: out of memory in {where!r}, "
            f"{format_bytes(needed - verdict.available)} more than it has would be reserved; {_largest(largest)}"
        ),
    )


def _largest(found: Largest | None) -> str:
    if found is None or found.forecast is None:
        return "no image is small enough"
    height, width = found.forecast.request.image
    tokens = found.forecast.visual_tokens // found.forecast.request.images
    return f"the largest image of that shape that fits is {height}x{width} ({tokens:,} visual tokens)"


@check(promise=11, needs=("gpu", "forecast"))
def forecast_agrees(model: Any, batch: Mapping[str, Any], training_batch: Mapping[str, Any], meter: Meter) -> Evidence:
    """Hold the forecast to what the meter measures for the same model, adapter, batches and work.

    The work is that of :func:`peak_vram`: vision encoding, prefill, decoding, a checkpointed forward and backward pass.
    The forecast runs the same functions on a model without data that is built from what this one really is (its
    quantized layers, adapter, dtypes), with the very ids, masks and grids.

    Every phase must be within 3 % or 64 MiB of the measured peak allocated, whichever is larger, and the peak less what
    was resident before within 10 % or 32 MiB. Where a forecast of the weights alone would pass (a tiny model), nothing
    is judged: docs/limits.md#forecast.

    Args:
        model: A LoRA model on CUDA.
        batch: Inputs with images, left-padded.
        training_batch: Inputs with images and labels.
        meter: The session's meter.

    Raises:
        CannotJudge: The model is not on CUDA, is of a kind that the forecast does not follow, or is too small.
        CheckFailed: The forecast of a phase is too far off.
    """
    parts = anatomy(model)
    if parts.device.type != "cuda":
        raise CannotJudge("a forecast is compared with a GPU: the model is on the CPU")
    from pytest_qvl.vram.forecast.engine.recipes import NotFollowed

    try:
        predicted = forecast_work(model, batch, training_batch)
    except NotFollowed as reason:
        raise CannotJudge(str(reason)) from None
    prepare_to_measure()
    measured = measure_work(model, batch, training_batch, meter, timed=False)
    return judge_agreement(predicted, [usage for usage, *_ in measured])


def forecast_work(model: Any, batch: Mapping[str, Any], training_batch: Mapping[str, Any]) -> dict[str, PhaseBytes]:
    """Forecast the work that :func:`peak_vram` measures, for a model like this one; runs on the CPU.

    Raises:
        NotFollowed: The model is of a kind that the forecast does not follow.
    """
    from pytest_qvl.vram.forecast.engine.dry_run import DryRun
    from pytest_qvl.vram.forecast.engine.recipes import recipe_from_model
    from pytest_qvl.vram.forecast.engine.trace import replay

    request, source, recipe = recipe_from_model(model)
    work = partial(work_of, decode_steps=REHEARSED_STEPS)
    trace = DryRun(request, source, recipe).run_work((batch, training_batch), work)
    return replay(trace).phases


def judge_agreement(forecast: Mapping[str, PhaseBytes], measured: Sequence[Usage]) -> Evidence:
    """Hold forecast phases to measured ones of the same names; see :func:`forecast_agrees` for the limits.

    Args:
        forecast: By name; others may be among them.
        measured: In the order they ran; what was allocated when the first began counts as resident, on both sides.

    Raises:
        CannotJudge: Nothing was measured, or a forecast of weights alone would pass.
        CheckFailed: The forecast of a phase is too far off.
        KeyError: The forecast lacks a phase.
    """
    for usage in measured:
        if not usage.measured:
            raise CannotJudge(f"{usage.name} was not measured: {usage.reason}")
    resident, forecast_resident = measured[0].alive_allocated, forecast[measured[0].name].start_allocated
    compared = [
        Comparison(
            usage.name,
            forecast=forecast[usage.name].peak_allocated,
            measured=usage.allocated,
            forecast_resident=forecast_resident,
            measured_resident=resident,
            workspace=forecast[usage.name].by_kind.get("workspace", 0),
        )
        for usage in measured
    ]
    if not any(comparison.telling for comparison in compared):
        most = max(comparison.above_measured - comparison.workspace for comparison in compared)
        raise CannotJudge(
            f"a forecast of the weights alone would pass: beside them and the libraries' workspaces this model takes "
            f"{format_bytes(max(0, most))} at most, and {format_bytes(ABOVE_FLOOR)} are allowed"
        )
    judge = Judge("forecast_agrees", "the forecast is what the GPU measures")
    judge.report("resident", resident / GiB, unit="GiB")
    judge.report("resident by the forecast", forecast_resident / GiB, unit="GiB")
    for comparison in compared:
        hold(judge, comparison)
    columns = ("phase", "forecast GiB", "measured GiB", "above resident: forecast GiB", "measured GiB")
    rows = [
        (
            c.phase,
            c.forecast / GiB,
            c.measured / GiB,
            (c.forecast - c.forecast_resident) / GiB,
            c.above_measured / GiB,
        )
        for c in compared
    ]
    return judge.verdict(columns, rows)
