"""Where numbers stop being finite: said first, because everything computed from them then looks broken too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.activations import Peak, Peaks, first_not_finite, leaves, watched
from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.quantized import quant_state_tensors
from pytest_qvl.models.state import preserved

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pytest_qvl.models.anatomy import Parts


def origin_of_not_finite(parts: Parts, run: Callable[[], Any]) -> str:
    """Words that name the first module whose output is not finite while `run` computes; empty if all are.

    Args:
        parts: The model.
        run: Computes with the model once more what gave NaN or infinity; its result is not used.
    """
    import torch

    with preserved(parts.wrapped, training=False), watched(parts, leaves(parts.base)) as peaks, torch.no_grad():
        run()
    return origin_in(parts, peaks)


def origin_in(parts: Parts, peaks: Peaks) -> str:
    """As :func:`origin_of_not_finite`, from what was watched already and without another run."""
    origin = first_not_finite(peaks)
    return "" if origin is None else f"; this begins at {origin.module}, {_why(parts, origin)}"


def require_finite(parts: Parts, numbers: torch.Tensor, what: str, run: Callable[[], Any]) -> None:
    """Refuse to compare what is not finite, which looks unmoved, or moved, whatever is done to it.

    Args:
        parts: The model.
        numbers: What is to be compared.
        what: What to call it, in the plural.
        run: Computes it once more, to find the first module whose output is not finite.

    Raises:
        CannotJudge: Some number is NaN or infinite; names where that begins.
    """
    if not bool(numbers.isfinite().all()):
        raise CannotJudge(f"{what} are not finite{origin_of_not_finite(parts, run)}")


def _why(parts: Parts, origin: Peak) -> str:
    for name, parameter in parts.base.get_submodule(origin.module).named_parameters():
        quant = getattr(parameter, "quant_state", None)
        for key, tensor in [(name, parameter)] if quant is None else quant_state_tensors(name, quant):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return f"whose own {key} is not finite"
    return f"whose dtype ends at {origin.dtype_max:.6g}"
