"""Make a bigger GPU behave like a smaller card: its memory, its attention kernels, its dtypes.

What this simulates is memory. Speed, and kernels compiled for the card's own generation, are not: say "memory
cap simulated", never "tested on a T4". Memory that does not come from torch's allocator (paged optimizers use
the driver's managed memory) is not capped.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.vram.cards import Card

# Torch's flash and cuDNN attention kernels need Ampere; its memory-efficient and plain ones run everywhere.
_FLASH_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Cap:
    """What a GPU was capped to.

    Attributes:
        card: The card to behave like.
        allocator: Bytes torch's allocator may reserve: the card's usable memory less its CUDA context.
        device: Bytes the real GPU has.
        attention: Attention kernels torch may choose from.
    """

    card: Card
    allocator: int
    device: int
    attention: tuple[str, ...]

    def __str__(self) -> str:
        return f"{describe_cap(self.card)}; this GPU has {format_bytes(self.device)}"


@contextmanager
def capped(card: Card, device: int = 0) -> Iterator[Cap]:
    """Cap torch's allocator and pin the attention kernels to what the card has, until the block ends.

    Take it before anything is loaded: what is reserved already stays reserved.

    Args:
        card: The card to behave like.
        device: Index among the devices of this process.

    Raises:
        CannotJudge: No CUDA here.
        ValueError: The card has more memory than this GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise CannotJudge(f"the memory of {card.name} can only be simulated on a GPU, and there is no CUDA here")
    total = torch.cuda.mem_get_info(device)[1]
    allowed = allocator_bytes(card)
    if allowed > total:
        raise ValueError(
            f"{card.name} has {format_bytes(allowed)} for the allocator and this GPU only "
            f"{format_bytes(total)}; cap to a smaller card, or test on the card itself without a cap"
        )
    asked: Any = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in torch 2.6
    before = asked(device) if asked else 1.0
    with ExitStack() as undo:
        undo.callback(torch.cuda.set_per_process_memory_fraction, before, device)
        torch.cuda.set_per_process_memory_fraction(allowed / total, device)
        kernels = undo.enter_context(pinned_attention(card.compute_capability))
        yield Cap(card, allowed, total, kernels)


@contextmanager
def lifted(device: int = 0) -> Iterator[None]:
    """No cap until the block ends, for what the card would not have to hold."""
    import torch

    cuda: Any = torch.cuda
    asked = getattr(cuda, "get_per_process_memory_fraction", None)  # not in torch 2.6
    before = asked(device) if asked and cuda.is_initialized() else 1.0
    if before == 1.0:
        yield
        return
    cuda.set_per_process_memory_fraction(1.0, device)
    try:
        yield
    finally:
        cuda.set_per_process_memory_fraction(before, device)


def describe_cap(card: Card) -> str:
    """What a cap to this card means, in one line for people."""
    allowed, usable, context = map(format_bytes, (allocator_bytes(card), card.usable_bytes, card.context_bytes))
    return (
        f"memory cap of {card.title} simulated on CUDA: the allocator may reserve {allowed} ({usable} less {context} "
        f"for the CUDA context), attention kernels {', '.join(attention_kernels(card.compute_capability))}"
    )


def allocator_bytes(card: Card) -> int:
    """Bytes torch's allocator can have on a card: what the driver gives a process, less the CUDA context."""
    return card.usable_bytes - card.context_bytes


def attention_kernels(compute_capability: tuple[int, int]) -> tuple[str, ...]:
    """The attention kernels torch may choose from so that every card of a generation chooses the same one.

    cuDNN's is left out everywhere: where it exists (Hopper and later) torch prefers it, and changing the
    kernel alone moves the logits of a 7B model by 0.3.
    """
    return ("flash", "efficient", "math") if compute_capability >= _FLASH_CAPABILITY else ("efficient", "math")


@contextmanager
def pinned_attention(compute_capability: tuple[int, int]) -> Iterator[tuple[str, ...]]:
    """Let torch choose only from :func:`attention_kernels` until the block ends."""
    import torch

    cuda: Any = torch.backends.cuda
    kernels = attention_kernels(compute_capability)
    switches = {
        "flash": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        "efficient": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        "math": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        "cudnn": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    }
    with ExitStack() as undo:
        for name, (enabled, enable) in switches.items():
            undo.callback(enable, enabled())
            enable(name in kernels)
        yield kernels


def compute_dtype(card: Card, asked: str = "auto") -> str:
    """The dtype to compute in on a card.

    Args:
        card: The card.
        asked: ``auto`` (bfloat16 where the card has it, else float16) or a dtype's name.

    Raises:
        ValueError: bfloat16 was asked for and the card lacks it. Torch emulates it there, so that
            ``torch.cuda.is_bf16_supported()`` is true all the same.
    """
    if asked == "auto":
        return "bfloat16" if card.bf16 else "float16"
    if asked == "bfloat16" and not card.bf16:
        raise ValueError(f"{card.name} has no bfloat16 (torch only emulates it, slowly); use float16 or auto")
    return asked
