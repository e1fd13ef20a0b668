"""What ``DistributedDataParallel`` keeps and copies on each card, as Transformers' trainers wrap an adapter in it.

Gradients are copied into flat buckets, reduced there and copied back. Since a PEFT model is no ``PreTrainedModel``,
the trainers ask for ``find_unused_parameters``: with it buckets stay as they were made, and every output that has a
gradient is copied, of the model's own head all logits in fp32.

What NCCL has for itself is outside torch's allocator, and not counted.

Source: ``torch/nn/parallel/distributed.py`` (``_ddp_init_helper``, ``_post_forward``, ``_DDPSink``),
``transformers/trainer.py`` (``_build_accelerator_args``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from pytest_qvl.vram.units import MiB

if TYPE_CHECKING:
    from collections.abc import Sequence

# ``_DEFAULT_FIRST_BUCKET_BYTES``, ``bucket_cap_mb`` where nobody says, and ``broadcast_bucket_size``.
_FIRST, _CAP = MiB, 25 * MiB
_BROADCAST = 250 * MiB


def _assigned(tensors: Sequence[torch.Tensor], caps: list[int]) -> list[list[int]]:
    """Which tensors share a bucket, by their indices."""
    from torch._C._distributed_c10d import _compute_bucket_assignment_by_size  # not in every build of torch

    shapes = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors]
    found: list[list[int]] = _compute_bucket_assignment_by_size(shapes, caps)[0]
    return found


def buckets(parameters: Sequence[Any], cap_mb: int | None = None) -> list[torch.Tensor]:
    """The buckets of the gradients of ``parameters``.

    Args:
        parameters: Those that are trained, in the model's order.
        cap_mb: MiB of a bucket; ``None`` for torch's 25, and a small first one.
    """
    caps = [_FIRST, _CAP] if cap_mb is None else [cap_mb * MiB]
    found = _assigned(parameters, caps)
    return [parameters[own[0]].new_empty(sum(parameters[i].numel() for i in own)) for own in reversed(found)]


def synchronized(model: torch.nn.Module) -> None:
    """The copies in which a model's parameters and buffers go to the other processes, two at a time at most."""
    states = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    sent: list[torch.Tensor] = []
    for own in _assigned(states, [_BROADCAST]):
        if len(own) > 1:  # one alone goes as it is
            sent = [*sent[-1:], states[own[0]].new_empty(sum(states[i].numel() for i in own))]


def copied(outputs: Any) -> Any:
    """A model's outputs as the wrapped model returns them."""
    leaves, structure = tree_flatten(outputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None]
    for place, copy in zip(places, _Copied.apply(*(leaves[i] for i in places)), strict=True):  # type: ignore[no-untyped-call]
        leaves[place] = copy
    return tree_unflatten(leaves, structure)


class _Copied(torch.autograd.Function):
    """Each tensor's copy, through which its gradient goes as it is."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copies."""
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: ARG004
        """Gradients."""
        return gradients
