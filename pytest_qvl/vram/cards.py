"""GPU cards: what a process really gets of the gigabytes on the box. Standard library only.

Three numbers per card, all in bytes: what the maker advertises, what torch sees
(``torch.cuda.get_device_properties(0).total_memory``: less by error correction and the driver's own reserve),
and what the CUDA context and the loaded libraries take from that before the first tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from pytest_qvl.vram.units import GiB, KiB, MiB

# A context reserves a stack for every thread that can be resident (1 KiB by default, ``cudaLimitStackSize``)
# and loads kernels of CUDA, cuBLAS, cuDNN and torch. On an H200 a context took 617 MiB when created and 770
# MiB after a training run; 264 MiB of that are stacks, so kernels are taken as 506 MiB. Only the H200's
# figure is measured.
STACK_PER_THREAD = 1 * KiB
LOADED_KERNELS = 506 * MiB


@dataclass(frozen=True)
class Card:
    """One type of GPU.

    Attributes:
        name: What users call it on the command line.
        title: The maker's name.
        nominal_bytes: Advertised memory.
        usable_bytes: What torch sees as the device's total memory.
        multiprocessors: Streaming multiprocessors.
        threads_per_multiprocessor: Threads that can be resident on each.
        compute_capability: CUDA compute capability.
        source: Where :attr:`usable_bytes` was read.
    """

    name: str
    title: str
    nominal_bytes: int
    usable_bytes: int
    multiprocessors: int
    threads_per_multiprocessor: int
    compute_capability: tuple[int, int]
    source: str

    @property
    def context_bytes(self) -> int:
        """What the CUDA context and loaded libraries take, stacks of all resident threads and kernels (an estimate)."""
        return LOADED_KERNELS + STACK_PER_THREAD * self.multiprocessors * self.threads_per_multiprocessor

    @property
    def bf16(self) -> bool:
        """Whether bfloat16 runs in hardware; torch also calls it supported where it is emulated."""
        return self.compute_capability >= (8, 0)

    def __str__(self) -> str:
        return self.name


def _card(  # noqa: PLR0917  (a table row)
    name: str,
    title: str,
    nominal_gib: int,
    usable_gib: float,
    multiprocessors: int,
    threads: int,
    capability: tuple[int, int],
    source: str,
) -> Card:
    usable = int(usable_gib * GiB)
    return Card(name, title, nominal_gib * GiB, usable, multiprocessors, threads, capability, source)


# Usable sizes are what torch printed in public error messages; where several are known, the smallest.
_CARDS = (
    _card(
        "t4",
        "Tesla T4",
        16,
        14.56,
        40,
        1024,
        (7, 5),
        "14.56 to 14.75 GiB in Unsloth's and TRL's T4 notebooks",
    ),
    _card("p100", "Tesla P100 16 GB", 16, 15.78, 56, 2048, (6, 0), "taken as the V100's (same memory)"),
    _card("v100-16gb", "Tesla V100 16 GB", 16, 15.78, 80, 2048, (7, 0), "kchengiva/Shift-GCN issue 34"),
    _card("v100-32gb", "Tesla V100 32 GB", 32, 31.74, 80, 2048, (7, 0), "haotian-liu/LLaVA issue 812"),
    _card(
        "rtx3060-12gb",
        "GeForce RTX 3060 12 GB",
        12,
        11.76,
        28,
        1536,
        (8, 6),
        "TencentARC/PhotoMaker issue 47",
    ),
    _card("rtx3090", "GeForce RTX 3090", 24, 23.70, 82, 1536, (8, 6), "GaoLii/DSP issue 10"),
    _card("rtx4090", "GeForce RTX 4090", 24, 23.64, 128, 1536, (8, 9), "ali-vilab/VGen issue 104"),
    _card("rtx5090", "GeForce RTX 5090", 32, 31.36, 170, 1536, (12, 0), "unslothai/unsloth issue 1856"),
    _card("l4", "L4", 24, 22.03, 58, 1536, (8, 9), "ArcInstitute/evo2 issue 190"),
    _card("a10g", "A10G", 24, 22.03, 80, 1536, (8, 6), "taken as the L4's (same memory with error correction)"),
    _card("l40s", "L40S", 48, 44.40, 142, 1536, (8, 9), "an L40 in QwenLM/Qwen3-VL issue 2097"),
    _card("a100-40gb", "A100 40 GB", 40, 39.50, 108, 2048, (8, 0), "TianheWu/CoSeR issue 10"),
    _card("a100-80gb", "A100 80 GB", 80, 79.14, 108, 2048, (8, 0), "lianqi1008/Control-GIC issue 6"),
    _card("h100", "H100 80 GB", 80, 79.11, 132, 2048, (9, 0), "vllm-project/vllm issue 27508"),
    _card("h200", "H200", 141, 139.79, 132, 2048, (9, 0), "measured: 143,155 MiB"),
)
_BY_NAME = {card.name: card for card in _CARDS}


def card_names() -> tuple[str, ...]:
    """Names of all known cards, smallest memory first."""
    return tuple(card.name for card in sorted(_CARDS, key=lambda card: card.usable_bytes))


def card(name: str) -> Card:
    """The card called ``name``, in any case.

    Raises:
        ValueError: No such card; the message lists the known ones and those that may have been meant.
    """
    wanted = name.strip().lower()
    try:
        return _BY_NAME[wanted]
    except KeyError:
        near = get_close_matches(wanted, card_names(), cutoff=0.5)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"card {name!r} is unknown; known: {', '.join(card_names())}{meant}") from None
