"""The promises that the suite proves, and which checks prove each of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """One line of the summary.

    Attributes:
        title: What is promised.
        checks: Names of the check functions that prove it.
        on_request: Those that a run without a certain setting does not ask for; they are not missed there.
        needs_limit: Whether it is about a limit, so that measuring alone keeps nothing.
    """

    title: str
    checks: tuple[str, ...]
    on_request: tuple[str, ...] = ()
    needs_limit: bool = False


PROMISES = (
    Promise("quantized where it should be", ("quantization_census", "checkpoint_complete")),
    Promise("LoRA on the language backbone, whole", ("adapter_census", "adapter_roundtrip")),
    Promise("fresh or disabled adapter is neutral", ("adapter_neutrality",)),
    Promise("vision stays frozen", ("frozen_vision",)),
    Promise(
        "features land on their placeholders",
        (
            "placeholder_counts",
            "feature_scatter",
            "visual_token_order",
            "causality",
            "image_isolation",
            "picture_pairing",
            "malformed_inputs",
        ),
    ),
    Promise("M-RoPE positions", ("mrope_positions", "decode_positions", "position_state")),
    Promise("vision and merger are stable", ("vision_stability",)),
    Promise(
        "generation is stable",
        (
            "greedy_is_argmax",
            "generation_repeatable",
            "generation_batch_invariance",
            "generation_cache_invariance",
            "generation_wellformed",
        ),
    ),
    Promise("answers come from the pictures", ("alignment",)),
    Promise("training step", ("training_step", "vision_not_backpropagated", "label_mask")),
    Promise(
        "peak VRAM within its limit",
        ("peak_vram", "forecast_fits_card", "forecast_agrees"),
        on_request=("forecast_fits_card",),
        needs_limit=True,
    ),
)


def promise_of(check: str) -> int | None:
    """Index in :data:`PROMISES` of the promise that a check proves; ``None`` for somebody else's check."""
    return next((i for i, promise in enumerate(PROMISES) if check in promise.checks), None)
