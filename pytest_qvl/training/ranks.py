"""Several processes train one model: each judges what it sees, all stop together, and one writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.training.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence


def of_all_processes(findings: Sequence[Finding], device: Any) -> list[Finding]:
    """The findings of every process, the same list in each; every process has to call this.

    One number is added up over the processes; what was found is gathered only where that is not zero. One process alone
    asks nobody.

    Args:
        findings: Of this process, since the last call.
        device: Where the collectives of this training happen (``TrainingArguments.device``).
    """
    import torch
    from torch import distributed

    if not many_processes():
        return list(findings)
    on_host = str(distributed.get_backend()) == "gloo"
    total = torch.tensor(len(findings), device="cpu" if on_host else device)
    distributed.all_reduce(total)
    if not int(total):
        return []
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, [finding.as_dict() for finding in findings])
    return [Finding.from_dict(data) for each in gathered for data in each]


def many_processes() -> bool:
    """Whether more than one process trains this model."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
