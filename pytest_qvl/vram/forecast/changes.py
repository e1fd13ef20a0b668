"""What to change so that a training step fits its card: the changes that cost least, each forecast."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.units import GiB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.vram.forecast.engine.trace import Kind
    from pytest_qvl.vram.forecast.request import Request
    from pytest_qvl.vram.forecast.result import Forecast

# Forecasts beyond this many are not made: a step that none of the first ones makes fit needs a smaller model or card.
MOST = 6
LEAST_RANK = 4


@dataclass(frozen=True)
class Change:
    """One change, or several at once, and the forecast with it.

    Attributes:
        options: As options of the command.
        cost: What it costs.
        forecast: With the change.
    """

    options: str
    cost: str
    forecast: Forecast

    @property
    def fits(self) -> bool:
        """Whether that makes it fit."""
        return self.forecast.verdict is not None and self.forecast.verdict.fits


@dataclass(frozen=True)
class Candidate:
    """A change before it is forecast.

    Attributes:
        options: As options of the command.
        cost: What it costs.
        fields: Of the request.
        saves: Most bytes that it can save, where that is known.
    """

    options: str
    cost: str
    fields: dict[str, Any]
    saves: int | None = None


def candidates(forecast: Forecast) -> Iterator[Candidate]:
    """Changes of settings that save memory, those that cost least first: nothing, time, then what is learned."""
    request = forecast.request
    states, trained = _held(forecast, "optimizer"), _held(forecast, "adapters", "gradients", "optimizer")
    yield from _of_evaluation(forecast)
    if request.keeps_vision_hook and request.lora_targets == "language":
        yield Candidate(
            "--no-vision-hook",
            "nothing: the frozen vision tower needs no gradients; take its make_inputs_require_grads hook off",
            {"vision_hook": False},
        )
    if request.base_bits == 8 and request.gradient_checkpointing and not request.reentrant:
        yield Candidate(
            "--reentrant",
            "nothing: checkpoints with use_reentrant=True let go of the inputs that 8-bit products keep",
            {"reentrant": True},
        )
    if request.optimizer != "paged_adamw_8bit":
        yield Candidate(
            "--optimizer paged_adamw_8bit",
            f"next to nothing: optimizer states in 8 bits{'' if request.resume else ', paged'}",
            {"optimizer": "paged_adamw_8bit"},
            states,
        )
    if request.kbit_upcast:
        yield Candidate(
            "--no-kbit-upcast",
            "next to nothing: norms and embeddings stay in 16 bits, without prepare_model_for_kbit_training",
            {"kbit_upcast": False},
        )
    if not request.gradient_checkpointing:
        yield Candidate(
            "--gradient-checkpointing", "about a third more time per step", {"gradient_checkpointing": True}
        )
    if request.batch > 1 and not request.samples:
        accumulation = request.accumulation * request.batch
        yield Candidate(
            f"--batch 1 --accumulation {accumulation}",
            "time: the same gradient from smaller batches",
            {"batch": 1, "accumulation": accumulation},
        )
    if request.lora_r > LEAST_RANK:
        rank = max(LEAST_RANK, request.lora_r // 4)
        yield Candidate(f"--lora-r {rank}", "a smaller adapter", {"lora_r": rank}, trained)


def _of_evaluation(forecast: Forecast) -> Iterator[Candidate]:
    """Changes of an evaluation that does not fit by itself, which no change of the training step helps."""
    request, verdict = forecast.request, forecast.verdict
    most = max((phase.peak_allocated for phase in forecast.phases if phase.name == phases.EVALUATION), default=0)
    if verdict is None or most <= verdict.available:
        return
    if request.keeps_logits and not request.preprocess_logits:
        yield Candidate(
            "--preprocess-logits argmax",
            "metrics get ids in place of logits, by preprocess_logits_for_metrics",
            {"preprocess_logits": "argmax"},
        )
    if request.keeps_logits and not request.eval_accumulation_steps:
        yield Candidate(
            "--eval-accumulation-steps 1", "time: kept logits go to the host", {"eval_accumulation_steps": 1}
        )
    if request.evaluation > 1:
        batches = request.evaluation_batches * request.evaluation
        yield Candidate(
            "--evaluation 1" + (f" --evaluation-batches {batches}" if request.keeps_logits else ""),
            "time: smaller batches of the evaluation",
            {"evaluation": 1, "evaluation_batches": batches if request.keeps_logits else request.evaluation_batches},
        )


def _held(forecast: Forecast, *kinds: Kind) -> int:
    """Most bytes of those kinds at the peak of any phase of the training step."""
    steps = [phase for phase in forecast.phases if phase.name in phases.TRAINING]
    return max((sum(phase.by_kind.get(kind, 0) for kind in kinds) for phase in steps), default=0)


def cheapest(
    forecast: Forecast, make: Callable[[Request], Forecast], smaller: Forecast | None = None, count: int = 3
) -> list[Change]:
    """The ``count`` cheapest changes that make a training step fit, each forecast.

    Where fewer do it alone, the cheapest that do it together come last.

    Args:
        forecast: Does not fit its card.
        make: Makes a forecast for a request on the same card.
        smaller: Of the largest image that fits, if that was found: the change that costs most.
        count: How many changes at most.
    """
    if forecast.verdict is None or forecast.verdict.fits or not forecast.request.lora_r:
        return []
    excess = forecast.verdict.reserved - forecast.verdict.available
    found: list[Change] = []
    tried: list[Candidate] = []
    for candidate in candidates(forecast):
        if candidate.saves is not None and candidate.saves < excess:
            tried.append(candidate)
            continue
        if len([change for change in found if change.fits]) == count or len(tried) == MOST:
            break
        tried.append(candidate)
        found.append(_made(forecast, make, [candidate]))
    fitting = [change for change in found if change.fits]
    if smaller is not None and len(fitting) < count:
        height, width = smaller.request.image
        fitting.append(Change(f"--image {height}x{width}", "detail: fewer visual tokens", smaller))
    if not any(change.fits for change in found) and len(tried) > 1:
        together = _made(forecast, make, tried)
        fitting += [together] if together.fits else []
    return fitting[:count]


def _made(forecast: Forecast, make: Callable[[Request], Forecast], chosen: list[Candidate]) -> Change:
    fields = {name: value for candidate in chosen for name, value in candidate.fields.items()}
    options = " ".join(candidate.options for candidate in chosen)
    cost = "; ".join(candidate.cost for candidate in chosen)
    return Change(options, cost, make(replace(forecast.request, **fields)))


def render_changes(changes: list[Change]) -> str:
    """A line per change: options, peak, what it costs."""
    if not changes:
        return "no change of these settings makes it fit: take a smaller model, a smaller image or a larger card"
    lines = ["the cheapest changes that make it fit:"]
    for change in changes:
        verdict = change.forecast.verdict
        assert verdict is not None
        spare = (verdict.available - verdict.reserved) / GiB
        fits = f"{spare:.2f} GiB to spare" if spare >= 0 else "just"
        lines.append(f"  {change.options}: {change.forecast.peak_reserved / GiB:.2f} GiB, {fits} ({change.cost})")
    return "\n".join(lines)
