"""The same question put to others: ``accelerate estimate-memory`` and the rules of thumb in use.

None of them knows images, sequence length or logits; the comparison shows what that costs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.vram.units import GiB

if TYPE_CHECKING:
    from pytest_qvl.vram.forecast.result import Forecast

GB = 10**9
# Smallest GPU memory said to train a model of this many billion parameters with QLoRA.
UNSLOTH_QLORA = {3: 3.5 * GB, 7: 5 * GB, 8: 6 * GB, 14: 8.5 * GB}
LLAMA_FACTORY_QLORA = {7: 6 * GB, 14: 12 * GB, 30: 24 * GB, 70: 48 * GB}
# Share that accelerate's documentation adds to the weights for inference.
ACCELERATE_INFERENCE = 1.2
# Bytes per logit that are alive at once in the loss: log-probabilities, their gradient and the logits'
# gradient in fp32.
BYTES_PER_LOGIT = 12
# LoRA in fp32: weight, gradient and two 8-bit states with an fp32 scale per 256 values.
BYTES_PER_ADAPTER_PARAMETER = 4 + 4 + 2 * (1 + 4 / 256)


@dataclass(frozen=True)
class Rule:
    """What a tool or a rule of thumb answers.

    Attributes:
        source: Who says so.
        size: Bytes it says are needed; ``None`` where it has no answer for this model.
        about: What the number means.
    """

    source: str
    size: int | None
    about: str


def side_by_side(forecast: Forecast, config: Any) -> list[Rule]:
    """What others answer for the model and step of ``forecast``.

    Args:
        forecast: Made with an adapter.
        config: The model's Transformers configuration.
    """
    int4 = accelerate_int4(config)
    # The tables go by the size in the name, which counts neither vision tower nor embeddings.
    named = re.search(r"(\d+)b\b", forecast.label.lower())
    billions = int(named[1]) if named else 0
    unsloth, factory = UNSLOTH_QLORA.get(billions), LLAMA_FACTORY_QLORA.get(billions)
    return [
        Rule("accelerate estimate-memory, int4", int4, "weights alone, all of them in 4 bit"),
        Rule("the same, + 20 % for inference", int(int4 * ACCELERATE_INFERENCE), "accelerate's documentation"),
        Rule(
            "Unsloth's table, QLoRA",
            None if unsloth is None else int(unsloth),
            "minimum for text fine-tuning",
        ),
        Rule(
            "LLaMA-Factory's table, QLoRA",
            None if factory is None else int(factory),
            "estimate for text fine-tuning",
        ),
        Rule(
            "analytic rule",
            analytic_bytes(forecast, config),
            "weights + adapter + layer inputs + 12 B per logit",
        ),
    ]


def accelerate_int4(config: Any) -> int:
    """Bytes that ``accelerate estimate-memory --dtypes int4`` answers, by its own function on a model without data."""
    import torch
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.tie_weights()
    fp32, _ = calculate_maximum_sizes(model)
    return int(fp32) // 8


def analytic_bytes(forecast: Forecast, config: Any) -> int:
    """Weights as loaded, adapter with gradient and states, one input per checkpointed layer, and the loss.

    Sound for gradient checkpointing only; without it every intermediate result is kept, which takes the
    model's code to count.
    """
    text = config.get_text_config()
    tokens = forecast.request.batch * forecast.sequence
    attach = next((phase for phase in forecast.phases if phase.by_kind.get("adapters")), None)
    adapter = attach.by_kind["adapters"] if attach else 0
    return int(
        forecast.resident
        + adapter / 4 * BYTES_PER_ADAPTER_PARAMETER
        + tokens * text.num_hidden_layers * text.hidden_size * 2
        + tokens * text.vocab_size * BYTES_PER_LOGIT
    )


def render_rules_of_thumb(rules: list[Rule], forecast: Forecast) -> str:
    """The comparison as lines for the terminal, in GiB."""
    step = forecast.training_peak or forecast.peak
    rows: list[tuple[str, int | None, str]] = [
        ("this forecast, allocated", step.peak_allocated, f"peak of {step.name!r}")
    ]
    rows += [(rule.source, rule.size, rule.about) for rule in rules]
    width = max(len(row[0]) for row in rows)
    lines = [
        f"{name.ljust(width)}  {'-' if size is None else f'{size / GiB:.2f} GiB':>10}  {about}"
        for name, size, about in rows
    ]
    return "\n".join(["what others answer", *lines])
