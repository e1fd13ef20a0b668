"""Which instruction set torch and oneDNN really compute with in this process, in their own words."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qvl.faults.matrix.isa import Setting

ATEN_NAMES = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
SIDE = 64  # rows and columns of the product that oneDNN is asked for
_VERBOSE = 1


@dataclass(frozen=True)
class Used:
    """The instruction sets that torch and oneDNN compute with in one process.

    Attributes:
        aten: torch's own kernels, as ``torch.backends.cpu.get_cpu_capability()`` names them.
        onednn: oneDNN's instruction set, as its verbose mode names it; empty where torch has no oneDNN.
        bfloat16: oneDNN's implementation of a matrix product in bfloat16, such as ``"brg_matmul:avx512_core_amx"``;
            empty where torch computes it without oneDNN.
        threads: Threads of torch.
    """

    aten: str
    onednn: str
    bfloat16: str
    threads: int

    def contradicts(self, setting: Setting) -> str:
        """Why this cannot be what the setting asked for, in words; empty if it can."""
        wanted = ATEN_NAMES.get(setting.aten, self.aten)
        if self.aten != wanted:
            return f"torch computes with {self.aten}: the setting had no effect"
        if self.threads != setting.threads:
            return f"torch computes with {self.threads} threads: the setting had no effect"
        if self.onednn and setting.onednn and _width(self.onednn) != _width(setting.onednn):
            return f"oneDNN computes with {self.onednn}: the setting had no effect"
        return ""


def _width(name: str) -> tuple[bool, bool]:
    """Whether a name of an instruction set, oneDNN's words or its variable's value, has AMX, and 512 bits."""
    return "AMX" in name, "512" in name


def used() -> Used:
    """Ask torch, and oneDNN by a small convolution and a small product whose kernels it names."""
    import torch

    said = _printed(_compute_verbosely) if torch._C._has_mkldnn else ""
    return Used(
        torch.backends.cpu.get_cpu_capability(),
        _first(r",info,cpu,isa:(.*)", said),
        _first(r",exec,cpu,(?:matmul|inner_product),([^,]*),.*bf16", said),
        torch.get_num_threads(),
    )


def _compute_verbosely() -> None:
    import torch

    set_verbose = torch._C._verbose.mkldnn_set_verbose
    set_verbose(_VERBOSE)
    try:
        torch.nn.functional.conv2d(torch.ones(4, 16, 32, 32), torch.ones(16, 16, 3, 3))
        weight = torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
        torch.nn.functional.linear(weight, weight)
    finally:
        set_verbose(0)


def _printed(work: Callable[[], None]) -> str:
    """What libraries write to the process's standard output meanwhile: oneDNN's goes past ``sys.stdout``."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            work()
            ctypes.CDLL(None).fflush(None)
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode(errors="replace")


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1).strip() if found else ""
