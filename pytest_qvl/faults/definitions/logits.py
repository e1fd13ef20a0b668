"""Logits that change behind the head: by a hook on the model, or a wrapper around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.faults.case import Case


@fault(
    "logits-scaled-in-eval",
    "A hook on the model's output, left over from calibration, multiplies logits by 1.25 in eval mode only.",
    target="model",
    check="layer_arithmetic",
    expected_words=("logits of the model", "does not return the logits of its head in eval mode: a hook or a patch"),
)
def _scaled_in_eval(case: Case) -> Iterator[None]:
    def scale(module: Any, _args: Any, output: Any) -> Any:
        if module.training or isinstance(output, tuple):
            return output
        return type(output)(**{**output, "logits": output.logits * 1.25})

    with after([case.model], scale):
        yield
