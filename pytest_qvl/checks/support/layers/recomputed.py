"""Gradient checkpointing recomputes what the forward computed: dropout has to fall on the same numbers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.layers.tally import Tally
from pytest_qvl.models.training import checkpointing

if TYPE_CHECKING:
    import torch

    from pytest_qvl.checks.support.layers.adapters import Adapters
    from pytest_qvl.models.anatomy import Parts

OPERATION = "recomputed dropout"
ELEMENTS = 2**22
"""Numbers that are added up at a time: 32 MiB of float64."""


def judge_recomputation(parts: Parts, inputs: dict[str, Any], adapters: Adapters, tally: Tally) -> None:
    """Run a checkpointed training forward and its backward, and hold each dropout's second result to its first.

    Every bit, since the recomputation runs the same kernels on the same numbers. A model that checkpoints in a way of
    its own keeps it. Without dropout nothing is run: all else that a forward computes is no matter of chance.
    """
    import torch

    first: dict[tuple[str, str], torch.Tensor] = {}

    def compare(place: str, adapter: str, _module: Any, _args: Any, output: torch.Tensor) -> None:
        print_ = _fingerprint(output.detach())
        earlier = first.setdefault((place, adapter), print_)
        if earlier is not print_:
            words = "drops other numbers when checkpointing recomputes it than it dropped in the forward"
            tally.same(OPERATION, place, print_, earlier, f"{words}: its gradient is that of another function")

    dropping = adapters.dropping()
    if not dropping:
        return
    handles = [module.register_forward_hook(partial(compare, *names)) for names, module in dropping.items()]
    model: Any = parts.wrapped
    try:
        model.train()
        with checkpointing(parts, enabled=True), torch.enable_grad():
            total = model(**inputs, use_cache=False, logits_to_keep=1).logits.float().mean()
            if total.requires_grad:
                total.backward()
            else:
                tally.leave_out("no gradient passes the checkpoints", "recomputed dropout")
    finally:
        model.eval()
        for handle in handles:
            handle.remove()


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Which elements are zero and what the others sum up to, ``(2,)`` float64: other masks differ in either."""
    import torch

    flat = tensor.flatten()
    made = torch.zeros(2, dtype=torch.float64, device=tensor.device)
    for start in range(0, len(flat), ELEMENTS):
        part = flat[start : start + ELEMENTS]
        places = torch.arange(start + 1, start + len(part) + 1, device=tensor.device, dtype=torch.float64)
        made += torch.stack((places.where(part != 0, 0.0).sum(), part.double().sum()))
    return made
