"""Mutations of the base model's tensors: weights, buffers, packed 4-bit data and their statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.faults.mutation.drawn import TENSOR, Mutation
from pytest_qvl.faults.tools import values
from pytest_qvl.models.quantized import base_tensors

if TYPE_CHECKING:
    import random

    import torch

    from pytest_qvl.models.anatomy import Parts

BLOCK = 64
FACTORS = (0.0, 0.5, 0.9, 0.99, 1.01, 1.1, 2.0, -1.0)
DOSES = (1e-3, 1e-2, 1e-1, 1.0)


def tensors_of(parts: Parts) -> list[tuple[str, torch.Tensor]]:
    """Every tensor of the base model by name.

    Without those of a fresh adapter, of which any draw is as good as another, and without flags.
    """
    import torch

    return [(name, tensor) for name, tensor in base_tensors(parts) if tensor.dtype != torch.bool and tensor.numel()]


def draw_tensor(tensors: list[tuple[str, torch.Tensor]], generator: random.Random) -> Mutation | None:
    """Change an element, a block of 64, a row or all of one tensor; nothing if the change would not be one."""
    import torch

    name, tensor = generator.choice(tensors)
    size, start, region = _region(tensor, generator)
    changed, what = _changed(tensor, size, start, generator)
    if torch.equal(changed, tensor.detach()):
        return None
    return Mutation(TENSOR, f"{name}, {region}: {what}", lambda: values(tensor, lambda _: changed))


def _region(tensor: torch.Tensor, generator: random.Random) -> tuple[int, int, str]:
    """Length and first element of what is changed, in the flat tensor, and words for it."""
    count = tensor.numel()
    row = count // tensor.shape[0] if tensor.ndim else 1
    sizes = {"element": 1, "block": min(BLOCK, count), "row": row, "tensor": count}
    unit = generator.choice(list(sizes))
    size = sizes[unit]
    number = generator.randrange(count // size)
    return size, number * size, "all of it" if unit == "tensor" else f"{unit} {number} of {count // size}"


def _changed(tensor: torch.Tensor, size: int, start: int, generator: random.Random) -> tuple[torch.Tensor, str]:
    """A changed copy of the tensor, and words for the change."""
    import torch

    made = tensor.detach().clone()
    flat = made.view(-1)
    part = flat[start : start + size]
    if generator.random() < 0.25:
        other = generator.randrange(flat.numel() // size) * size
        kept = part.clone()
        part.copy_(flat[other : other + size])
        flat[other : other + size] = kept
        return made, f"exchanged with number {other // size}"
    noise = torch.Generator().manual_seed(generator.randrange(2**31))
    if not tensor.is_floating_point():
        limits = torch.iinfo(tensor.dtype)
        low, high = max(limits.min, -128), min(limits.max, 255)
        part.copy_(torch.randint(low, high + 1, part.shape, generator=noise))
        return made, "random integers"
    if generator.random() < 0.5:
        factor = generator.choice(FACTORS)
        part.mul_(factor)
        return made, f"times {factor:g}"
    dose = generator.choice(DOSES)
    scale = tensor.detach().float().pow(2).mean().sqrt().item()
    part.add_((torch.randn(part.shape, generator=noise) * dose * scale).to(part))
    return made, f"noise of {dose:g} of its root mean square"
