"""Common mode: the reference has the same defect as the model that is held against it.

A user's reference is recorded with the user's own library, configuration, processor and checkpoint. What is broken
there is broken in both, and a comparison of the two may see nothing. Here a fault is made on the full-precision model
as well, and the reference recorded under it.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import find

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pytest_qvl.checks import Reference
    from pytest_qvl.faults.case import Case
    from pytest_qvl.faults.catalogue import Fault

# By what a fault changes: why no reference can have it. What is not named here is the library's, the configuration's,
# the processor's or the checkpoint's, unless the fault says otherwise.
UNSHARED = {
    "adapter": "a reference is recorded without the adapter",
    "batch": "a reference is recorded from samples, which the user's collator never sees",
}


@cache
def reads_reference(check: str) -> bool:
    """Whether a check takes the recorded reference: every other says the same, whatever was recorded."""
    from pytest_qvl import checks

    return "reference" in inspect.signature(getattr(checks, check)).parameters


def unshared(fault: Fault) -> str:
    """Why no reference can have the fault; empty where it can."""
    return fault.unshared or UNSHARED.get(fault.target, "")


def same_outcome(fault: Fault) -> str:
    """Why the fault's check says the same whether the reference was recorded before or after the damage.

    Empty where it may not: the check reads the reference, and the reference can have the fault.
    """
    if not reads_reference(fault.check):
        return f"{fault.check} reads no reference"
    return unshared(fault)


def in_full_precision(case: Case) -> Case:
    """The case with the model that references are recorded from: in full precision, without an adapter.

    Its :attr:`~pytest_qvl.faults.case.Case.load` loads nothing else, so that a fault of the checkpoint reaches it too.
    """

    def load(**options: Any) -> Any:
        return case.load(**{**options, "quantized": False, "lora": None})

    return replace(case, model=load(), load=load, collators=[])


def damaged_reference(name: str, full: Case) -> Reference:
    """What full precision makes of the probes with the fault in it.

    Args:
        name: Name of a fault in the catalogue.
        full: From :func:`in_full_precision`.

    Raises:
        ValueError: No such fault.
        CannotJudge: Nothing can be recorded of the damaged model, because its logits are not finite for instance.
    """
    from pytest_qvl.faults.case import apply

    return reference_under(apply(find(name).name, full), full)


def reference_under(damage: AbstractContextManager[Case | None], full: Case) -> Reference:
    """What full precision makes of the probes inside of a block.

    Args:
        damage: The block; gives the damaged case, or None where it changes `full` itself.
        full: From :func:`in_full_precision`.
    """
    from pytest_qvl import checks

    with damage as damaged:
        case = damaged or full
        return checks.record_reference(case.model, case.processor, case.probes)
