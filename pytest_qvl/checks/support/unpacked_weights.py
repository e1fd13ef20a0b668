"""Quantized weights stay as they are packed: no CPU kernel may rewrite them under a check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.anatomy import Parts
from pytest_qvl.models.quantized import keep_quantized_weights_in_place, linear_states

if TYPE_CHECKING:
    from collections.abc import Sequence


def require_unpacked_weights(parts: Parts) -> None:
    """Make sure that a forward does not rewrite the quantized weights, before a check runs one.

    Raises:
        CannotJudge: They have been rewritten already, so nothing can be compared bitwise.
    """
    repacked = [state.name for state in linear_states(parts) if state.repacked]
    if repacked:
        raise CannotJudge(repacked_sentence(repacked))
    keep_quantized_weights_in_place(parts.base)


def repacked_sentence(names: Sequence[str]) -> str:
    """What to say of quantized weights that were rewritten, by the names of their layers."""
    return (
        f"{len(names)} quantized weights were rewritten in place for a CPU kernel by an earlier eval forward "
        f"(first: {names[0]}), which loses their double quantization and breaks training: load the model "
        "again and call pytest_qvl.models.quantized.keep_quantized_weights_in_place(model) before any "
        "forward"
    )
