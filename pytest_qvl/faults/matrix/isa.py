"""Instruction sets that torch's kernels choose between, and which of them this CPU offers."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
# Values of ONEDNN_MAX_CPU_ISA (oneDNN: "CPU dispatcher control") with the flags of /proc/cpuinfo that they need.
ONEDNN = {
    "AVX2": ("avx2", "fma"),
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_BF16": (*_AVX512, "avx512_bf16"),
    "AVX512_CORE_FP16": (*_AVX512, "avx512_bf16", "avx512_fp16"),
    "AVX512_CORE_AMX": (*_AVX512, "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
}
# Values of ATEN_CPU_CAPABILITY (torch's own kernels).
ATEN: dict[str, tuple[str, ...]] = {"default": (), "avx2": ("avx2", "fma"), "avx512": _AVX512}
THREADS = (1, 2)


@dataclass(frozen=True)
class Cpu:
    """Name and instruction-set flags of this machine's CPU.

    Attributes:
        model: Its name, as the system gives it.
        flags: What it offers; empty where the system does not say.
    """

    model: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """How one process computes: variables that act when torch starts.

    Attributes:
        onednn: Value of ``ONEDNN_MAX_CPU_ISA``; empty leaves it as it is.
        aten: Value of ``ATEN_CPU_CAPABILITY``; empty leaves it as it is.
        threads: Threads of one process.
    """

    onednn: str
    aten: str
    threads: int

    def __str__(self) -> str:
        names = f"oneDNN {self.onednn}, ATen {self.aten}" if self.onednn else "as the machine is"
        return f"{names}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables; threads that wait sleep, because many processes share the cores."""
        found = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        found["OMP_WAIT_POLICY"] = "PASSIVE"
        if self.onednn:
            found |= {"ONEDNN_MAX_CPU_ISA": self.onednn, "ATEN_CPU_CAPABILITY": self.aten}
        return found

    def lacks(self, cpu: Cpu) -> tuple[str, ...]:
        """Flags that this setting needs and the CPU does not have."""
        needed = (*ONEDNN.get(self.onednn, ()), *ATEN.get(self.aten, ()))
        return tuple(dict.fromkeys(flag for flag in needed if flag not in cpu.flags))


def this_cpu() -> Cpu:
    """Model name and flags, from ``/proc/cpuinfo``."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    pairs = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return Cpu(
        pairs.get("model name", platform.processor() or platform.machine()), tuple(pairs.get("flags", "").split())
    )


def settings(isa: str) -> list[Setting]:
    """The settings to run under: ``"all"``, or ``"native"`` for the machine as it is.

    Raises:
        ValueError: Neither of them.
    """
    if isa == "native":
        return [Setting("", "", 1)]
    if isa != "all":
        raise ValueError(f"--isa is all or native, not {isa!r}")
    # Where oneDNN has AMX torch packs with AVX512 itself, and refuses to be told to do without
    # ("pack_vnni2 is only supported when avx512 is supported").
    return [
        Setting(onednn, aten, threads)
        for onednn in ONEDNN
        for aten in ATEN
        for threads in THREADS
        if aten == "avx512" or "AMX" not in onednn
    ]
