"""The checks: plain functions that prove one promise each, usable in a test, a notebook or a training callback.

Each returns :class:`pytest_qvl.evidence.Evidence` or raises :class:`pytest_qvl.evidence.CheckFailed`. Modules load
when a name is first used, so that collecting the suite imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qvl.checks.adapter import adapter_census as adapter_census
    from pytest_qvl.checks.as_found import generation_as_found as generation_as_found
    from pytest_qvl.checks.backpropagation import vision_not_backpropagated as vision_not_backpropagated
    from pytest_qvl.checks.checkpoint import checkpoint_complete as checkpoint_complete
    from pytest_qvl.checks.collation import training_collation as training_collation
    from pytest_qvl.checks.data import batch as batch
    from pytest_qvl.checks.forecast import forecast_agrees as forecast_agrees
    from pytest_qvl.checks.forecast import forecast_fits_card as forecast_fits_card
    from pytest_qvl.checks.frozen import frozen_vision as frozen_vision
    from pytest_qvl.checks.generation import generation_repeatable as generation_repeatable
    from pytest_qvl.checks.generation import greedy_is_argmax as greedy_is_argmax
    from pytest_qvl.checks.generation_form import generation_wellformed as generation_wellformed
    from pytest_qvl.checks.generation_invariance import generation_batch_invariance as generation_batch_invariance
    from pytest_qvl.checks.generation_invariance import generation_cache_invariance as generation_cache_invariance
    from pytest_qvl.checks.golden import golden_record as golden_record
    from pytest_qvl.checks.gradients import gradient_arithmetic as gradient_arithmetic
    from pytest_qvl.checks.isolation import causality as causality
    from pytest_qvl.checks.isolation import image_isolation as image_isolation
    from pytest_qvl.checks.labels import label_mask as label_mask
    from pytest_qvl.checks.layers import layer_arithmetic as layer_arithmetic
    from pytest_qvl.checks.loss import loss_arithmetic as loss_arithmetic
    from pytest_qvl.checks.neutrality import adapter_neutrality as adapter_neutrality
    from pytest_qvl.checks.packing import packing_isolation as packing_isolation
    from pytest_qvl.checks.pairing import picture_pairing as picture_pairing
    from pytest_qvl.checks.positions import decode_positions as decode_positions
    from pytest_qvl.checks.positions import mrope_positions as mrope_positions
    from pytest_qvl.checks.positions import position_state as position_state
    from pytest_qvl.checks.preprocessing import image_preprocessing as image_preprocessing
    from pytest_qvl.checks.quantization import QuantizationPolicy as QuantizationPolicy
    from pytest_qvl.checks.quantization import quantization_census as quantization_census
    from pytest_qvl.checks.roundtrip import adapter_roundtrip as adapter_roundtrip
    from pytest_qvl.checks.routing import feature_scatter as feature_scatter
    from pytest_qvl.checks.routing import malformed_inputs as malformed_inputs
    from pytest_qvl.checks.routing import placeholder_counts as placeholder_counts
    from pytest_qvl.checks.routing import visual_token_order as visual_token_order
    from pytest_qvl.checks.support.mrope import mrope_oracle as mrope_oracle
    from pytest_qvl.checks.support.placeholders import validate_batch as validate_batch
    from pytest_qvl.checks.support.reference import Reference as Reference
    from pytest_qvl.checks.support.reference import record_reference as record_reference
    from pytest_qvl.checks.training import training_step as training_step
    from pytest_qvl.checks.vision import vision_stability as vision_stability
    from pytest_qvl.checks.visual_alignment import alignment as alignment
    from pytest_qvl.checks.vram import peak_vram as peak_vram
    from pytest_qvl.checks.weights import weights_as_stored as weights_as_stored
    from pytest_qvl.evidence import CannotJudge as CannotJudge
    from pytest_qvl.evidence import CheckFailed as CheckFailed
    from pytest_qvl.evidence import Evidence as Evidence
    from pytest_qvl.evidence import InputError as InputError
    from pytest_qvl.models.policy import AdapterPolicy as AdapterPolicy
    from pytest_qvl.models.quantized_layers import QuantizedLayers as QuantizedLayers

_OTHERS = {
    "AdapterPolicy": "pytest_qvl.models.policy",
    **dict.fromkeys(("CannotJudge", "CheckFailed", "Evidence", "InputError"), "pytest_qvl.evidence"),
    "QuantizationPolicy": f"{__name__}.quantization",
    "QuantizedLayers": "pytest_qvl.models.quantized_layers",
    **dict.fromkeys(("Reference", "record_reference"), f"{__name__}.support.reference"),
    "mrope_oracle": f"{__name__}.support.mrope",
    "validate_batch": f"{__name__}.support.placeholders",
}


def __getattr__(name: str) -> Any:
    from pytest_qvl.checks.declared import declared

    homes = {each.name: f"{__name__}.{each.module}" for each in declared().values()} | _OTHERS
    if name == "__all__":
        return sorted(homes)
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Bound at once, so that the next use finds it.
    value = getattr(import_module(homes[name]), name)
    globals()[name] = value
    return value
