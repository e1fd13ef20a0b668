"""Memory for models: whether one fits, and freeing what dropped ones leave behind."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.sources.hub import model_folder
from pytest_qvl.models.sources.model_source import parameter_count

if TYPE_CHECKING:
    from pytest_qvl.models.backends import LoadRequest

GIB = 2**30


def refuse_if_too_big(request: LoadRequest) -> None:
    """Refuse to load in full precision what cannot fit.

    Raises:
        CannotJudge: The weights alone need more than is free; says how much.
    """
    import torch

    folder = model_folder(request.source)
    if folder is None:
        return
    needed = parameter_count(folder) * getattr(torch, request.dtype).itemsize
    free = torch.cuda.mem_get_info()[0] if request.device == "cuda" else _free_memory()
    if free is not None and needed > free:
        raise CannotJudge(
            f"the full-precision reference of {request.source} needs {needed / GIB:.1f} GiB for its weights "
            f"alone, {free / GIB:.1f} GiB are free on {request.device}"
        )


def _free_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; ``None`` where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else int(kib) * 1024


def collect() -> None:
    """Free what Python and the CUDA allocator still hold of dropped models."""
    import torch

    gc.collect()
    # Asking is_available() would fix CUDA's devices, before a lease may have chosen one.
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        cuda.empty_cache()
